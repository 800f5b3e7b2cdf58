"""Runs the paper's experiments and those beyond it, and reports what came out.

python -m benchmarks.paper list
python -m benchmarks.paper run cifar10_vit --scale small
python -m benchmarks.paper choose evidence_tuning_cifar10 --results docs/results/evidence.jsonl
python -m benchmarks.paper report --scale small
"""

import argparse
import shlex
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import ROOT
from benchmarks.common.options import new_parser, options_of
from benchmarks.common.records import RunRecord, read_records
from benchmarks.paper import report, runner
from benchmarks.paper.catalogue import ALL, GROUPS, refuse_stale_choice
from benchmarks.paper.choices import CHOSEN, choose, count_planned, planned, remember
from benchmarks.paper.experiment import SCALES, Job
from benchmarks.paper.runner import Launch

RESULTS = ROOT / "docs" / "results"
SCALE_HELP = "full: the paper's; small: hours on two cores; smoke: does it run"
DATASET_HELP = "where a data set of the recipes lies; may be repeated"


def main() -> None:
    """Do what the command line says."""
    args = parse()
    if args.do == "list":
        list_experiments()
    elif args.do == "run":
        run_experiments(args)
    elif args.do == "choose":
        choose_cells(args)
    else:
        write_report(args)


def list_experiments() -> None:
    """Print what there is, and how many runs it takes at each scale."""
    table = Table("experiment", "what", *SCALES, title="Runs with the usual number of seeds")
    for name, experiment in ALL.items():
        counts = [str(count_planned(experiment, scale)) for scale in SCALES]
        table.add_row(name, experiment.title, *counts)
    Console().print(table)


def run_experiments(args: argparse.Namespace) -> None:
    """Run what has not been run yet."""
    folder = args.output_dir if args.scale == "smoke" else RESULTS
    file = args.results or folder / f"{args.scale}.jsonl"
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
    have = read_records(file)
    for name in _names(args):
        refuse_stale_choice(name, args.scale, have)
    jobs = _jobs(args, have)
    failed = runner.run(jobs.values(), file, launch)
    # What the second round of a choice runs is known after its first.
    later = _jobs(args, read_records(file))
    failed += runner.run([job for key, job in later.items() if key not in jobs], file, launch)
    if failed:
        raise SystemExit(f"{len(failed)} runs failed.")


def _jobs(args: argparse.Namespace, have: Mapping[str, RunRecord]) -> dict[str, Job]:
    """Return the runs that are asked for by their keys, as far as they are known."""
    found: dict[str, Job] = {}
    for name in _names(args):
        for job in planned(ALL[name], args.scale, have, args.seeds):
            found[job.key] = job
    return found


def _names(args: argparse.Namespace) -> list[str]:
    """Return the names of the experiments that are asked for."""
    names: list[str] = []
    for name in args.experiments:
        names += GROUPS.get(name, [name])
    unknown = [name for name in names if name not in ALL]
    if unknown:
        raise SystemExit(f"{', '.join(unknown)}: there are {', '.join(ALL)}, and {', '.join(GROUPS)}.")
    return names


def choose_cells(args: argparse.Namespace) -> None:
    """Choose each arm's best cell by its tuning runs, and remember it for the final runs."""
    have = read_records(args.results or RESULTS / f"{args.scale}.jsonl")
    table = Table("experiment", "arm", "best cell", "top-1", "its rate")
    for name in _names(args):
        choices = choose(ALL[name], args.scale, have)
        remember(name, choices)
        for choice in choices:
            edge = "is at the edge of the grid" if choice.at_edge else "lies between others"
            table.add_row(name, choice.arm, choice.cell, f"{100 * choice.top1:.1f} %", edge)
    Console().print(table)
    print(f"Written to {CHOSEN.relative_to(ROOT)}: commit it before the final runs start.")


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
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(dest="do", required=True)
    commands.add_parser("list", help="what there is, and how many runs it takes")
    run = options_of(commands, "run", "run what has not been run yet; killed, it goes on")
    pick = options_of(commands, "choose", "choose the best cell of each arm by its tuning runs, for the final runs")
    write = options_of(commands, "report", "write tables and plots of the stored results")
    for command in (run, pick, write):
        add = command.add_argument
        add("--scale", choices=SCALES, default="small", help=SCALE_HELP)
        add("--results", type=Path, help="JSON lines; by default docs/results/SCALE.jsonl")
    write.add_argument("--output_dir", type=Path, default=RESULTS, help="for the report")
    pick.add_argument("experiments", nargs="+", help="names of tuning experiments")
    add = run.add_argument
    add("experiments", nargs="+", help="names; all: the paper's; beyond: ours; evidence: by docs/results/plan.md")
    add("--seeds", type=int, help="the first N seeds; by default 5 at full scale, 3 at small, and more for evidence")
    add("--dataset", action="append", default=[], metavar="NAME=FOLDER", help=DATASET_HELP)
    add("--jobs", type=int, default=1, help="runs at once, which share the cores")
    add("--processes", type=int, default=1, help="of each run, by accelerate launch")
    add("--devices", default="", help="CUDA_VISIBLE_DEVICES of the runs: 0 1 2, or 0,1 2,3")
    add("--options", default="", help="more options of benchmarks.paper.train, in a string")
    add("--launch_options", default="", help="more options of accelerate launch, in a string")
    add("--output_dir", type=Path, default=Path("outputs/paper"), help="for checkpoints")
    add("--keep", action="store_true", help="keep the checkpoints of runs that are done")
    return parser.parse_args()


if __name__ == "__main__":
    main()
