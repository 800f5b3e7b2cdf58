"""Compares TrAct in pre-training, in fine-tuning and in both: {vanilla, TrAct} squared, the paper's table 4 in full.

    python examples/transfer_matrix.py --pretrain_dataset uoft-cs/cifar10 --datasets dpdl-benchmark/oxford_flowers102

pre-trains one ViT with TrAct and one without (pretrain_vit.py), fine-tunes both with and without it from several seeds
(transfer.py), and writes a table (matrix.md) and a plot (matrix.png). A run that is done is not done again.
"""

import argparse
import shlex
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.common.processes import Work, run_all
from benchmarks.common.statistics import spread
from hf_tract.integrations import TrainingRecord
from hf_tract.integrations.training_record import RECORD_FILE, without_local_path

mpl.use("Agg")
import matplotlib.pyplot as plt

ARMS = ("vanilla", "TrAct")
CELLS = [(before, after) for before in ARMS for after in ARMS]
EXAMPLES = Path(__file__).parent


def main() -> None:
    args = parse()
    jobs = [pretraining(arm, args) for arm in ARMS]
    run_missing("pre-training", jobs, args.jobs)
    jobs = [
        fine_tuning(dataset, cell, seed, args)
        for dataset in args.datasets
        for seed in range(args.seeds)
        for cell in CELLS
    ]
    run_missing("fine-tuning", jobs, args.jobs)
    top1 = {
        dataset: {
            cell: np.array([100 * accuracy(folder_of(dataset, cell, seed, args)) for seed in range(args.seeds)])
            for cell in CELLS
        }
        for dataset in args.datasets
    }
    before = {arm: 100 * accuracy(args.output_dir / f"pretrain-{arm}" / "model") for arm in ARMS}
    text = table(top1, before, args)
    (args.output_dir / "matrix.md").write_text(text + "\n", encoding="utf-8")
    Console().print(Markdown(text))
    print(plot(top1, args.output_dir / "matrix.png"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipe", type=Path, default=EXAMPLES / "recipes" / "transfer_vit.yaml", help="of the pre-training"
    )
    parser.add_argument("--pretrain_dataset", default="uoft-cs/cifar10", help="a Hub id, photo_crops, or a folder")
    parser.add_argument(
        "--datasets",
        nargs="+",
        default=["dpdl-benchmark/oxford_flowers102", "tanganke/stanford_cars"],
        metavar="DATASET",
    )
    parser.add_argument("--seeds", type=int, default=3, help="of each fine-tuning (default: %(default)s)")
    parser.add_argument("--lam", type=float, default=0.1)
    parser.add_argument("--pretrain_options", default="", help="more options of pretrain_vit.py, in one string")
    parser.add_argument("--transfer_options", default="", help="more options of transfer.py, in one string")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at once, which share the cores (default: %(default)s)"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/transfer_matrix"))
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    return args


def pretraining(arm: str, args: argparse.Namespace) -> tuple[Path, list[str]]:
    """Where the model of an arm will be, and the command that makes it."""
    folder = args.output_dir / f"pretrain-{arm}"
    command = [
        "pretrain_vit.py",
        "--recipe",
        str(args.recipe),
        "--dataset",
        args.pretrain_dataset,
        "--output_dir",
        str(folder),
    ]
    command += ["--resume_from_checkpoint", "latest", *without_or(arm, args), *shlex.split(args.pretrain_options)]
    return folder / "model", command


def fine_tuning(dataset: str, cell: tuple[str, str], seed: int, args: argparse.Namespace) -> tuple[Path, list[str]]:
    """Where the model of a cell will be, and the command that makes it."""
    folder, checkpoint = folder_of(dataset, cell, seed, args), args.output_dir / f"pretrain-{cell[0]}" / "model"
    command = ["transfer.py", "--checkpoint", str(checkpoint), "--dataset", dataset, "--output_dir", str(folder)]
    return folder, [*command, "--seed", str(seed), *without_or(cell[1], args), *shlex.split(args.transfer_options)]


def without_or(arm: str, args: argparse.Namespace) -> list[str]:
    """The options of an arm."""
    return ["--no_tract"] if arm == "vanilla" else ["--lam", str(args.lam)]


def folder_of(dataset: str, cell: tuple[str, str], seed: int, args: argparse.Namespace) -> Path:
    """Of a fine-tuning."""
    return Path(args.output_dir, f"{Path(dataset).name}-{cell[0]}-{cell[1]}-{seed}")


def run_missing(what: str, jobs: list[tuple[Path, list[str]]], at_once: int) -> None:
    """Runs what is not done yet; each run's output goes into a file beside its folder."""
    todo = []
    for folder, (script, *options) in jobs:
        if not (folder / RECORD_FILE).exists():
            log = (folder.parent if folder.name == "model" else folder).with_suffix(".log")
            todo.append(Work([[sys.executable, str(EXAMPLES / script), *options]], log))
    if failed := run_all(what, todo, at_once):
        raise SystemExit(f"{len(failed)} of {len(todo)} runs failed.")


def accuracy(folder: Path) -> float:
    """Of a finished run, on its test images."""
    return TrainingRecord.from_json_file(folder / RECORD_FILE).metrics["accuracy"]


def table(
    top1: dict[str, dict[tuple[str, str], np.ndarray]], before: dict[str, float], args: argparse.Namespace
) -> str:
    """Mean and standard deviation of each cell, and what TrAct changes, by seed."""
    heads = [f"{one} → {other}" for one, other in CELLS]
    lines = [f"| top-1, % | {' | '.join(heads)} |", "|---" * (1 + len(CELLS)) + "|"]
    for dataset, cells in top1.items():
        lines.append(f"| {without_local_path(dataset)} | {' | '.join(spread(cells[cell]) for cell in CELLS)} |")
    lines += ["", "| gain, points | in pre-training alone | in fine-tuning alone | in both |", "|---|---|---|---|"]
    base = CELLS[0]
    for dataset, cells in top1.items():
        gains = [
            cells[cell] - cells[base] for cell in (("TrAct", "vanilla"), ("vanilla", "TrAct"), ("TrAct", "TrAct"))
        ]
        lines.append(f"| {without_local_path(dataset)} | {' | '.join(spread(gain, sign='+') for gain in gains)} |")
    name = without_local_path(args.pretrain_dataset)
    said = (
        f"Pre-training reached {before['vanilla']:.1f} % on {name} without TrAct and {before['TrAct']:.1f} % with it"
    )
    seeds = f"Mean ± standard deviation over {args.seeds} seeds" if args.seeds > 1 else "One seed"
    lines += ["", f"{said} (one run each). {seeds} of fine-tuning."]
    return "\n".join(lines)


def plot(top1: dict[str, dict[tuple[str, str], np.ndarray]], path: Path) -> Path:
    """Every run as a point, the means as lines, by cell."""
    figure, axes = plt.subplots(1, len(top1), figsize=(4 * len(top1), 3.6), layout="constrained", squeeze=False)
    for axis, (dataset, cells) in zip(axes[0], top1.items(), strict=True):
        for place, (cell, values) in enumerate(cells.items()):
            color = ("#7f7f7f", "#ff9896", "#d62728")[cell.count("TrAct")]
            axis.plot([place] * len(values), values, "o", color=color, alpha=0.7)
            axis.hlines(values.mean(), place - 0.3, place + 0.3, color=color, linewidth=2)
        axis.set_xticks(range(len(cells)), [f"{one}\n→ {other}" for one, other in cells])
        axis.set(title=without_local_path(dataset), ylabel="top-1, %")
        axis.grid(axis="y", alpha=0.2)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


if __name__ == "__main__":
    main()
