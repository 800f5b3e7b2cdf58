"""Runs the paper's experiments and those beyond it, and reports what came out.

python -m benchmarks.paper list
python -m benchmarks.paper run cifar10_vit --scale small
python -m benchmarks.paper report --scale small
"""

import argparse
import shlex
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import ROOT
from benchmarks.paper import report, runner
from benchmarks.paper.beyond import ALL, BEYOND
from benchmarks.paper.experiment import SCALES, Job
from benchmarks.paper.experiments import EXPERIMENTS
from benchmarks.paper.runner import Launch

RESULTS = ROOT / "docs" / "results"
GROUPS = {"all": list(EXPERIMENTS), "beyond": list(BEYOND)}


def main() -> None:
    """Do what the command line says."""
    args = parse()
    if args.do == "list":
        list_experiments()
    elif args.do == "run":
        run_experiments(args)
    else:
        write_report(args)


def list_experiments() -> None:
    """Print what there is, and how many runs it takes at each scale."""
    table = Table("experiment", "what", *SCALES, title="Runs with the usual number of seeds")
    for name, experiment in ALL.items():
        counts = [str(len(list(experiment.jobs(scale)))) for scale in SCALES]
        table.add_row(name, experiment.title, *counts)
    Console().print(table)


def run_experiments(args: argparse.Namespace) -> None:
    """Run what has not been run yet."""
    folder = args.output_dir if args.scale == "smoke" else RESULTS
    launch = Launch(
        args.output_dir / args.scale,
        _places(args.dataset),
        args.jobs,
        args.processes,
        args.devices.split(),
        shlex.split(args.options),
        shlex.split(args.launch_options),
        args.keep,
    )
    failed = runner.run(_jobs(args), args.results or folder / f"{args.scale}.jsonl", launch)
    if failed:
        raise SystemExit(f"{len(failed)} runs failed.")


def _jobs(args: argparse.Namespace) -> Iterator[Job]:
    names: list[str] = []
    for name in args.experiments:
        names += GROUPS.get(name, [name])
    unknown = [name for name in names if name not in ALL]
    if unknown:
        raise SystemExit(f"{', '.join(unknown)}: there are {', '.join(ALL)}, all and beyond.")
    for name in names:
        yield from ALL[name].jobs(args.scale, args.seeds)


def _places(datasets: list[str]) -> dict[str, str]:
    """Return where data sets lie, by their names."""
    places = {}
    for each in datasets:
        name, equals, folder = each.partition("=")
        if not equals:
            raise SystemExit(f"--dataset {each}: it is NAME=FOLDER, such as uoft-cs/cifar10=/data/cifar10.")
        places[name] = folder
    return places


def write_report(args: argparse.Namespace) -> None:
    """Write tables and plots of the stored results."""
    file = args.results or RESULTS / f"{args.scale}.jsonl"
    if not file.exists():
        raise SystemExit(f"--results {file}: there is no such file; `run` makes it.")
    print(report.write(args.scale, file, args.output_dir))


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="do", required=True)
    commands.add_parser("list", help="what there is, and how many runs it takes at each scale")
    run = commands.add_parser("run", help="run what has not been run yet; killed, it goes on where it was")
    run.add_argument("experiments", nargs="+", help="names of experiments; all: the paper's; beyond: ours")
    run.add_argument("--seeds", type=int, help="seeds 0 to N-1 (default: 5 at full scale, 3 at small)")
    run.add_argument(
        "--dataset",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="where a data set of the recipes lies; may be repeated",
    )
    run.add_argument("--jobs", type=int, default=1, help="runs at once, which share the cores (default: 1)")
    run.add_argument("--processes", type=int, default=1, help="of each run, by accelerate launch (default: 1)")
    run.add_argument("--devices", default="", help="CUDA_VISIBLE_DEVICES of the runs in turn: 0 1 2, or 0,1 2,3")
    run.add_argument("--options", default="", help="more options of benchmarks.paper.train, in one string")
    run.add_argument("--launch_options", default="", help="more options of accelerate launch, in one string")
    run.add_argument(
        "--output_dir", type=Path, default=Path("outputs/paper"), help="for checkpoints (default: outputs/paper)"
    )
    run.add_argument("--keep", action="store_true", help="keep the checkpoints of runs that are done")
    write = commands.add_parser("report", help="write tables and plots of the stored results")
    write.add_argument("--output_dir", type=Path, default=RESULTS, help="for the report (default: docs/results)")
    for command in (run, write):
        command.add_argument(
            "--scale",
            choices=SCALES,
            default="small",
            help="full: the paper's; small: hours on two cores; smoke: does it run (default: small)",
        )
        command.add_argument("--results", type=Path, help="JSON lines (default: docs/results/SCALE.jsonl)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
