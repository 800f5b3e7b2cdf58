"""Tables and plots of the stored results, as Markdown and PNG."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from benchmarks.common import records as results
from benchmarks.common.records import Result
from benchmarks.common.statistics import spread
from benchmarks.paper import plots
from benchmarks.paper.beyond import ALL
from benchmarks.paper.experiments import Experiment
from benchmarks.paper.summary import Arm, collect, gain, speed_up

HOW = """Top-1 on the test set after the last epoch, per cent, mean ± standard deviation over seeds. *Gain* is the mean
difference from the first arm, seed by seed, with its 95 % confidence interval (Student's t) and the p of the paired
t-test; *from* another arm the same.
*Speed-up* is the number of epochs of the first arm over the epoch in which the arm's mean curve first reaches the
first arm's final accuracy, over the seeds that both have. Time is of training alone: of the clock on an accelerator,
of the process on a CPU.
"""


def write(scale: str, file: Path, folder: Path, seeds: int = 100) -> Path:
    """Writes SCALE.md and the plots.

    Args:
        scale: of the runs to report.
        file: the results, JSON lines.
        folder: for the report.
        seeds: how many are looked for.
    """
    have = results.read(file)
    source = f"Written by `benchmarks/paper report` from the runs in [{file.name}]({file.name})"
    lines = [
        f"# Results at the {scale} scale",
        "",
        f"{source}; what they mean is told in [the summary](index.md).",
        "",
        HOW,
    ]
    used: dict[str, Result] = {}
    for name, experiment in ALL.items():
        found = collect(experiment, scale, seeds, have)
        settings = {setting: arms for setting, arms in found.items() if len(arms) > 1}
        used |= {run.key: run for arms in settings.values() for arm in arms.values() for run in arm.runs.values()}
        if settings:
            lines += _section(name, experiment, settings, f"{scale}-{name}", folder)
    lines += ["## Runs", "", *_provenance(used.values())]
    path = folder / f"{scale}.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _section(
    name: str, experiment: Experiment, settings: dict[str, dict[str, Arm]], stem: str, folder: Path
) -> list[str]:
    lines = [f"## {experiment.title}", "", f"`benchmarks/paper run {name}`", ""]
    for setting, arms in settings.items():
        lines += [f"**{setting}**", ""] if setting else []
        lines += [*_table(arms, experiment.reference), ""]
    plots.curves(experiment.title, settings, folder / f"{stem}.png")
    lines += [f"![{experiment.title}: test accuracy against epochs and against time]({stem}.png)", ""]
    if name == "lambda_sweep":
        for arms in settings.values():
            plots.sweep(experiment.title, arms, folder / f"{stem}-final.png")
            lines += [f"![{experiment.title}: final accuracy against lambda]({stem}-final.png)", ""]
    return lines


def _table(arms: dict[str, Arm], reference: str) -> list[str]:
    first, base = next(iter(arms.items()))
    other = arms.get(reference)
    more = [f"from {reference}", "p"] if other else []
    names = ["arm", "epochs", "seeds", "top-1", "gain", "p", *more, "speed-up", "minutes"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for name, arm in arms.items():
        gains = _gain(arm, base) if name != first else ["", ""]
        if other:
            gains += _gain(arm, other) if name not in (first, reference) else ["", ""]
        factor = speed_up(arm, base)
        faster = "" if name == first else f"{factor:.2f}" if factor else "not reached"
        epochs, minutes = arm.curves.shape[1], np.mean(arm.seconds[:, -1]) / 60
        row = [name, str(epochs), str(len(arm.runs)), spread(arm.final), *gains, faster, f"{minutes:.1f}"]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def _gain(arm: Arm, base: Arm) -> list[str]:
    difference = gain(arm, base)
    wide = f" ± {difference.half_width:.1f}" if difference.half_width is not None else ""
    return [f"{difference.mean:+z.1f}{wide}", f"{difference.p:.3f}" if difference.p is not None else ""]


def _provenance(runs: Iterable[Result]) -> list[str]:
    """Commands, hardware and versions, each once, with the number of runs."""
    runs = list(runs)
    seeds = sorted({run.seed for run in runs})
    lines = [f"{len(runs)} runs, seeds {seeds[0]} to {seeds[-1]}." if runs else "No runs.", ""]
    told = {
        run.key: (run.command, run.hardware, ", ".join(f"{name} {it}" for name, it in run.versions.items()))
        for run in runs
    }
    for each in sorted(set(told.values())):
        command, hardware, versions = each
        lines += [f"- {list(told.values()).count(each)} by `{command}` on {hardware}, with {versions}"]
    return lines
