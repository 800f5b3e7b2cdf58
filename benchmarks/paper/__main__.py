"""Runs the paper's experiments and those beyond it: `python benchmarks/paper run cifar10_vit --scale small`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.paper import report as reporting
from benchmarks.paper import runner
from benchmarks.paper.beyond import ALL, BEYOND
from benchmarks.paper.experiments import EXPERIMENTS, HERE, SCALES

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
RESULTS = HERE.parents[1] / "docs" / "results"


@app.command("list")
def list_() -> None:
    """What there is, and how many runs it takes at each scale."""
    table = Table("experiment", "what", *SCALES, title="Runs with the usual number of seeds")
    for name, experiment in ALL.items():
        table.add_row(name, experiment.title, *(str(len(list(experiment.jobs(scale)))) for scale in SCALES))
    Console().print(table)


@app.command()
def run(
    experiments: Annotated[list[str], typer.Argument(help="names of experiments; all: the paper's; beyond: ours")],
    scale: Annotated[
        str, typer.Option(help="full: the paper's; small: hours on two cores; smoke: does it run")
    ] = "small",
    seeds: Annotated[int | None, typer.Option(help="seeds 0 to N-1; by default 5 at full scale, 3 at small")] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FOLDER", help="where a data set of the recipes lies; may be repeated"),
    ] = None,
    jobs: Annotated[int, typer.Option(help="runs at once, which share the cores")] = 1,
    processes: Annotated[int, typer.Option(help="of each run, by accelerate launch")] = 1,
    devices: Annotated[str, typer.Option(help="CUDA_VISIBLE_DEVICES of the runs in turn: 0 1 2, or 0,1 2,3")] = "",
    options: Annotated[str, typer.Option(help="more options of train.py, in one string")] = "",
    launch_options: Annotated[str, typer.Option(help="more options of accelerate launch, in one string")] = "",
    results: Annotated[Path | None, typer.Option(help="JSON lines; by default docs/results/SCALE.jsonl")] = None,
    output_dir: Annotated[Path, typer.Option(help="for checkpoints and logs")] = Path("outputs/paper"),
    keep: Annotated[bool, typer.Option(help="keep the checkpoints of runs that are done")] = False,
) -> None:
    """Runs what has not been run yet. Killed, it goes on where it was."""
    groups = {"all": list(EXPERIMENTS), "beyond": list(BEYOND)}
    wanted = [name for each in experiments for name in groups.get(each, [each])]
    if unknown := [name for name in wanted if name not in ALL]:
        raise typer.BadParameter(f"{', '.join(unknown)}: there are {', '.join(ALL)}, all and beyond.")
    if scale not in SCALES:
        raise typer.BadParameter(f"--scale {scale}: there are {', '.join(SCALES)}.")
    if wrong := [each for each in dataset or [] if "=" not in each]:
        raise typer.BadParameter(f"--dataset {wrong[0]}: it is NAME=FOLDER, such as uoft-cs/cifar10=/data/cifar10.")
    failed = runner.run(
        (job for name in wanted for job in ALL[name].jobs(scale, seeds)),
        results or (output_dir if scale == "smoke" else RESULTS) / f"{scale}.jsonl",
        output_dir / scale,
        dict(each.split("=", 1) for each in dataset or []),
        jobs,
        processes,
        devices.split(),
        shlex.split(options),
        shlex.split(launch_options),
        keep,
    )
    raise SystemExit(f"{len(failed)} runs failed." if failed else 0)


@app.command()
def report(
    scale: Annotated[str, typer.Option(help="of the runs")] = "small",
    results: Annotated[Path | None, typer.Option(help="JSON lines; by default docs/results/SCALE.jsonl")] = None,
    output_dir: Annotated[Path, typer.Option(help="for the report and its plots")] = RESULTS,
) -> None:
    """Writes tables and plots of the stored results."""
    file = results or RESULTS / f"{scale}.jsonl"
    if not file.exists():
        raise typer.BadParameter(f"--results {file}: there is no such file; `run` makes it.")
    print(reporting.write(scale, file, output_dir))


if __name__ == "__main__":
    app()
