"""Compares TrAct in pre-training, in fine-tuning and in both: {vanilla, TrAct} squared, the paper's table 4 in full.

    python -m benchmarks.transfer_matrix --pretrain_dataset uoft-cs/cifar10 --datasets FOLDER FOLDER

pre-trains one ViT with TrAct and one without, fine-tunes both with and without it from several seeds, and writes the
results (matrix.jsonl), a table (matrix.md) and a plot (matrix.png) to --output_dir. A run that is done is not done
again.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.common import markdown, plots
from benchmarks.common.options import new_parser
from benchmarks.common.processes import Work, run_all
from benchmarks.common.records import RunRecord, add_record, command, key_of, read_records
from benchmarks.common.statistics import interval
from benchmarks.paper.runner import TRAIN, read_run, write_recipe
from benchmarks.training.recipe import RECIPES
from hf_tract.integrations.training_record import without_local_path

ARMS = ("vanilla", "TrAct")
CELLS = ("vanilla → vanilla", "vanilla → TrAct", "TrAct → vanilla", "TrAct → TrAct")
DATASETS = ["dpdl-benchmark/oxford_flowers102", "tanganke/stanford_cars"]
GAINS = {"in pre-training alone": CELLS[2], "in fine-tuning alone": CELLS[1], "in both": CELLS[3]}
# The accuracies (seeds,) of each cell, by data set.
Top1 = dict[str, dict[str, np.ndarray]]


class Run(NamedTuple):
    """Describes a pre-training or a fine-tuning."""

    arm: str
    recipe: dict[str, Any]
    tract: bool
    seed: int
    # Holds the folders of all runs.
    parent: Path
    # The key of the pre-training that a fine-tuning starts from.
    pretraining: str = ""

    @property
    def key(self) -> str:
        """Return the same for runs that are the same."""
        return key_of(self.arm, self.settings(), self.seed)

    @property
    def folder(self) -> Path:
        """Return the folder of the run: another for other settings, since a run goes on from what it finds there."""
        name = Path(self.recipe["dataset"]).name if self.pretraining else f"pretrain-{self.arm}"
        return self.parent / f"{name}-{self.key}"

    def settings(self) -> dict[str, Any]:
        """Return what tells the run apart, without folders of this machine."""
        settings = {**self.recipe, "dataset": without_local_path(self.recipe["dataset"])}
        settings.pop("seed", None)
        if self.pretraining:
            # The model is in a folder of this machine.
            del settings["model"]
            settings["pretraining"] = self.pretraining
        return settings

    def command(self) -> list[str]:
        """Return the command of the run."""
        words = [sys.executable, *TRAIN, *write_recipe(self.folder, self.recipe)]
        if not self.tract:
            words.append("--no_tract")
        if not self.pretraining:
            words.append("--save_model")
        return words

    def record(self) -> RunRecord:
        """Return what came out."""
        return RunRecord(self.key, self.arm, self.settings(), self.seed, command=command(), **read_run(self.folder))


def main() -> None:
    """Run what is not done yet, and report."""
    args = parse()
    file = args.output_dir / "matrix.jsonl"
    pretrainings = {arm: pretraining(arm, args) for arm in ARMS}
    run_missing("pre-training", list(pretrainings.values()), file, args.jobs)
    for run in pretrainings.values():
        if not (run.folder / "model").is_dir():
            raise SystemExit(f"{run.folder} is not there, though {file} has its run: name another --output_dir.")
    todo = []
    for dataset in args.datasets:
        for seed in range(args.seeds):
            for cell in CELLS:
                todo.append(fine_tuning(dataset, cell, seed, pretrainings, args))
    run_missing("fine-tuning", todo, file, args.jobs)
    have = read_records(file)
    report([have[run.key] for run in [*pretrainings.values(), *todo]], args.output_dir)


def pretraining(arm: str, args: argparse.Namespace) -> Run:
    """Return the pre-training of an arm."""
    recipe = read_yaml(args.pretrain_recipe) | {"dataset": args.pretrain_dataset}
    return Run(arm, recipe, arm == "TrAct", 0, args.output_dir)


def fine_tuning(dataset: str, cell: str, seed: int, pretrainings: dict[str, Run], args: argparse.Namespace) -> Run:
    """Return the fine-tuning of a cell, which sees images as its model was trained to."""
    before, after = cell.split(" → ")
    model = pretrainings[before].folder / "model"
    look = json.loads((model / "preprocessor_config.json").read_text(encoding="utf-8"))
    recipe = read_yaml(args.transfer_recipe)
    recipe |= {"dataset": dataset, "model": str(model), "seed": seed}
    recipe |= {"mean": look["image_mean"], "std": look["image_std"]}
    return Run(cell, recipe, after == "TrAct", seed, args.output_dir, pretrainings[before].key)


def read_yaml(file: Path) -> dict[str, Any]:
    """Return the values of a recipe."""
    values: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return values


def run_missing(what: str, runs: list[Run], file: Path, at_once: int) -> None:
    """Run what is not in the file yet; what a run prints goes into a file beside its folder."""
    have = read_records(file)
    todo = {}
    works = []
    for each in runs:
        if each.key not in have:
            todo[each.key] = each
            log = each.folder.with_suffix(".log")
            works.append(Work([each.command()], log, each.key))

    def done(work: Work) -> None:
        add_record(file, todo[work.name].record())

    failed = run_all(what, works, at_once, done)
    if failed:
        raise SystemExit(f"{len(failed)} of {len(works)} runs failed.")


def report(records: list[RunRecord], folder: Path) -> None:
    """Write and print the table, and draw the plot."""
    text = table(records)
    (folder / "matrix.md").write_text(text + "\n", encoding="utf-8")
    Console().print(Markdown(text))
    print(plot(by_cell(records), folder / "matrix.png"))


def final(record: RunRecord) -> float:
    """Return top-1 after the last epoch, in per cent."""
    return 100 * record.curve["top1"][-1]


def by_cell(records: list[RunRecord]) -> Top1:
    """Return the accuracies of the fine-tunings, (seeds,), of each cell of each data set."""
    top1: Top1 = {}
    for record in sorted(records, key=lambda record: record.seed):
        if record.arm in CELLS:
            cells = top1.setdefault(record.settings["dataset"], dict.fromkeys(CELLS, np.array([])))
            cells[record.arm] = np.append(cells[record.arm], final(record))
    return top1


def table(records: list[RunRecord]) -> str:
    """Return the mean of each cell, what TrAct changes seed by seed, and what the pre-training reached."""
    top1 = by_cell(records)
    ends, differences = [], []
    for dataset, cells in top1.items():
        row = [dataset]
        for cell in CELLS:
            row.append(interval(cells[cell]).text())
        ends.append(row)
        row = [dataset]
        for cell in GAINS.values():
            gains = cells[cell] - cells[CELLS[0]]
            row.append(interval(gains).text("+"))
        differences.append(row)
    lines = [*markdown.table(["top-1, %", *CELLS], ends), ""]
    lines += markdown.table(["gain, points", *GAINS], differences)
    lines += ["", "Mean ± the half width of its 95 % confidence interval (Student's t) over seeds of fine-tuning."]
    for record in records:
        if record.arm in ARMS:
            lines.append(f"Pre-training ({record.arm}) reached {final(record):.1f} % on {record.settings['dataset']}.")
    return "\n".join(lines)


def plot(top1: Top1, path: Path) -> Path:
    """Draw every run as a point and the means as lines, by cell."""
    figure, [axes] = plots.new_figure(1, len(top1), 4.4 * len(top1), 3.8)
    for axis, (dataset, cells) in zip(axes, top1.items(), strict=True):
        for place, values in enumerate(cells.values()):
            color = plots.COLORS[place]
            axis.plot([place] * len(values), values, plots.MARKERS[place], color=color, alpha=0.8)
            axis.hlines(values.mean(), place - 0.3, place + 0.3, color=color, linewidth=2)
        axis.set_xticks(range(len(cells)), [cell.replace(" →", "\n→") for cell in cells])
        axis.set(title=dataset, ylabel="test top-1 after fine-tuning, %")
    figure.suptitle("Pre-training → fine-tuning: each run is a point, the line is their mean")
    return plots.save(figure, path)


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--pretrain_dataset", default="uoft-cs/cifar10", help="a Hub id, photo_crops, or a folder")
    add("--datasets", nargs="+", default=DATASETS, metavar="DATASET", help="to fine-tune on")
    add("--seeds", type=int, default=3, help="of each fine-tuning")
    add("--pretrain_recipe", type=Path, default=RECIPES / "transfer_vit.yaml", help="a YAML file")
    add("--transfer_recipe", type=Path, default=RECIPES / "transfer_finetune.yaml", help="a YAML file")
    add("--jobs", type=int, default=1, help="runs at once, which share the cores")
    add("--output_dir", type=Path, default=Path("outputs/transfer_matrix"), help="for results, tables and plots")
    return parser.parse_args()


if __name__ == "__main__":
    main()
