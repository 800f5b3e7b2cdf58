"""Writes tables and plots of the stored results, as Markdown and PNG."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.common import markdown
from benchmarks.common.records import RunRecord, read_records
from benchmarks.common.statistics import interval, p_text
from benchmarks.paper import conclusions, plots
from benchmarks.paper.catalogue import ALL, OF_DIFFERENCES, OF_WHOLE_RUNS, PLANNED, UNTIMED, edges
from benchmarks.paper.choices import Choice, arm_of, choose, planned, split_name
from benchmarks.paper.experiment import Experiment
from benchmarks.paper.summary import Arm, Arms, collect, corrected_by_name, gain, speed_up, speed_up_in_time
from benchmarks.paper.verdicts import challengers, step_size

MAX_SEEDS = 100
# Fewer seeds have too few different samples.
SEEDS_TO_RESAMPLE = 5
# Columns that tell of time.
ALONG_A_RUN = ("speed-up", "in time", "minutes")
OF_WHOLE_RUN = ("ms a step", "minutes")
HEAD = Path(__file__).with_name("head.md").read_text(encoding="utf-8")
COMMAND = "python -m benchmarks.paper"
# By the name of the file of results.
TITLES = {"evidence": "The runs of the plan, E0 to E4"}
GRID_GREW = (
    "The second seed tries the best two cells of each arm by the first. A third with two seeds was one of them before "
    "the grid grew, and decides nothing."
)
LINES_ONLY = "test accuracy against epochs and against time"
UNTIMED_LINES = "on the left the test accuracy by epochs, on the right the final accuracy"
WITH_ENDS = (
    "on the left the test accuracy by epochs of the first arm, {reference}the best others (of three seeds first); "
    "on the right the final accuracy of every arm"
)


def write(scale: str, file: Path, folder: Path) -> Path:
    """Write a page and its plots, named like the file of results.

    Args:
        scale: of the runs to report.
        file: the results, JSON lines.
        folder: for the report.
    """
    have = read_records(file)
    title = TITLES.get(file.stem, f"Results at the {scale} scale")
    lines = [HEAD.format(title=title, command=COMMAND, file=file.name)]
    used: dict[str, RunRecord] = {}
    for name, experiment in ALL.items():
        settings = _compared(collect(experiment, scale, seeds_of(name), have))
        for arms in settings.values():
            for arm in arms.values():
                for run in arm.runs.values():
                    used[run.key] = run
        unfinished = _unfinished(name, experiment, scale, have)
        if unfinished:
            lines += [f"## {experiment.title}", "", unfinished, ""]
        elif settings:
            stem = folder / f"{file.stem}-{name}"
            if experiment.finalists:
                lines += _choice(name, experiment, choose(experiment, scale, have), settings)
            else:
                lines += _section(name, experiment, settings, stem)
    lines += conclusions.lines(scale, have)
    lines += ["## Runs", "", *_provenance(used.values())]
    path = folder / f"{file.stem}.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def seeds_of(name: str) -> int | None:
    """Return how many seeds of an experiment are reported; None for those of its plan."""
    return None if name in PLANNED else MAX_SEEDS


def _unfinished(name: str, experiment: Experiment, scale: str, have: Mapping[str, RunRecord]) -> str:
    """Say how far a planned experiment is, before whose last run nobody is to look; empty for a whole one."""
    if name not in PLANNED:
        return ""
    keys = {job.key for job in planned(experiment, scale, have)}
    done = len(keys & have.keys())
    if done in (0, len(keys)):
        return ""
    return f"{done} of {len(keys)} runs are done. Nothing is decided, and nothing is shown, before the last one."


def _compared(found: Mapping[str, Arms]) -> dict[str, Arms]:
    """Return the settings in which there are arms to compare."""
    return {setting: arms for setting, arms in found.items() if len(arms) > 1}


def _section(name: str, experiment: Experiment, settings: dict[str, Arms], stem: Path) -> list[str]:
    lines = _head(name, experiment)
    for setting, arms in settings.items():
        if setting:
            lines += [f"**{setting}**", ""]
        lines += _tables(name, arms, experiment.reference)
    at_edge = edges(name)
    if at_edge:
        lines += [f"The best rate is at the edge of the grid for {', '.join(at_edge)}.", ""]
    if name == "evidence_step_size":
        for arms in settings.values():
            lines += [*step_size(arms).lines(), *challengers(arms)]
    lines += _curves(name, experiment, settings, stem.with_suffix(".png"))
    if name == "lambda_sweep":
        for arms in settings.values():
            plot = plots.sweep(experiment.title, arms, stem.with_name(f"{stem.name}-final.png"))
            lines += [f"![{experiment.title}: final accuracy against lambda]({plot.name})", ""]
    return lines


def _curves(name: str, experiment: Experiment, settings: dict[str, Arms], path: Path) -> list[str]:
    """Plot an experiment; return what a page says of it."""
    timed = name not in UNTIMED
    lines = []
    if not timed:
        lines = ["Times are not compared: the runs are of several devices, which they shared.", ""]
    plot = plots.curves(experiment.title, settings, experiment.reference, path, timed)
    return [*lines, f"![{experiment.title}: {_caption(experiment, settings, timed)}]({plot.name})", ""]


def _choice(name: str, experiment: Experiment, choices: list[Choice], settings: dict[str, Arms]) -> list[str]:
    """Return what was tried on the validation rows, and what is chosen."""
    lines = _head(name, experiment)
    chosen = {}
    for choice in choices:
        chosen[choice.cell] = "yes"
        if choice.at_edge:
            chosen[choice.cell] += ", at the edge of the grid"
    rows = []
    tried_twice: Counter[str] = Counter()
    for arms in settings.values():
        for cell, arm in arms.items():
            rows.append([cell, str(len(arm.runs)), f"{arm.final.mean():.1f}", chosen.get(cell, "")])
            tried_twice[arm_of(cell)] += len(arm.runs) > 1
    lines += markdown.table(["cell", "seeds", "top-1 on the validation rows", "chosen"], rows)
    if max(tried_twice.values()) > experiment.finalists:
        lines += ["", GRID_GREW]
    return [*lines, ""]


def _head(name: str, experiment: Experiment) -> list[str]:
    """Return an experiment's title and the command that runs it."""
    return [f"## {experiment.title}", "", f"`{COMMAND} run {name} --results outputs/mine.jsonl`", ""]


def _tables(name: str, arms: Arms, reference: str) -> list[str]:
    """Return the table of an experiment's arms, one for each length of whole runs."""
    if name not in OF_WHOLE_RUNS:
        times = () if name in OF_DIFFERENCES else ALONG_A_RUN
        return [*_table(arms, reference, times), ""]
    of_whole_runs = () if name in UNTIMED else OF_WHOLE_RUN
    lines = []
    for part in _by_length(arms).values():
        lines += [*_table(part, reference, of_whole_runs), ""]
    return lines


def _by_length(arms: Arms) -> dict[str, Arms]:
    """Return the arms of each length of whole runs."""
    found: dict[str, Arms] = {}
    for name, arm in arms.items():
        found.setdefault(split_name(name)[1], {})[name] = arm
    return found


def _caption(experiment: Experiment, settings: dict[str, Arms], timed: bool) -> str:
    """Say what the plot shows, and which arms have no line in it."""
    if not plots.is_crowded(settings):
        return LINES_ONLY if timed else UNTIMED_LINES
    reference = ""
    if experiment.reference:
        reference = f"{experiment.reference} and "
    return WITH_ENDS.format(reference=reference)


def _table(arms: Arms, reference: str, times: Sequence[str]) -> list[str]:
    """Return a table of arms, which are compared with the first, with some of the columns that tell of time."""
    base = next(iter(arms.values()))
    names = ["arm", "epochs", "seeds", "top-1", "gain", "p"]
    gains = [_gains(arms, base)]
    if reference in arms:
        names += [f"from {reference}", "p"]
        gains.append(_gains(arms, arms[reference]))
    names += times
    rows = []
    for name, arm in arms.items():
        row = [name, str(arm.curves.shape[1]), str(len(arm.runs)), interval(arm.final).text()]
        for cells in gains:
            row += cells.get(name, ["", ""])
        rows.append([*row, *_times(arm, base, times)])
    return markdown.table(names, rows)


def _gains(arms: Arms, base: Arm) -> dict[str, list[str]]:
    """Return the cells of each arm's gain and of its p, which is corrected for the number of arms."""
    found = {name: gain(arm, base) for name, arm in arms.items() if arm is not base}
    tested = {name: difference for name, difference in found.items() if difference.p is not None}
    probabilities = corrected_by_name(tested)
    cells = {}
    for name, difference in found.items():
        text = difference.text("+")
        shared = len(arms[name].with_seeds_of(base).runs)
        if shared < len(arms[name].runs):
            text += f" ({shared} {'seed' if shared == 1 else 'seeds'})"
        p = p_text(probabilities[name]) if name in probabilities else ""
        cells[name] = [text, p]
    return cells


def _times(arm: Arm, base: Arm, columns: Sequence[str]) -> list[str]:
    """Return what these columns tell of an arm's time."""
    cells = []
    for column in columns:
        if column == "speed-up":
            cells.append(_speed_up(arm, base))
        elif column == "in time":
            cells.append(_speed_up_in_time(arm, base))
        elif column == "ms a step":
            cells.append(f"{arm.milliseconds:.0f}")
        else:
            cells.append(f"{np.mean(arm.seconds[:, -1]) / 60:.1f}")
    return cells


def _speed_up(arm: Arm, base: Arm) -> str:
    if arm is base:
        return ""
    factor = speed_up(arm, base)
    if factor is None:
        return "not reached"
    return f"{factor:.2f}"


def _speed_up_in_time(arm: Arm, base: Arm) -> str:
    factor = None
    if arm is not base:
        factor = speed_up_in_time(arm, base)
    if factor is None:
        return ""
    if len(arm.with_seeds_of(base).runs) < SEEDS_TO_RESAMPLE:
        return f"{factor.value:.2f}"
    return factor.text(digits=2)


def _provenance(runs: Iterable[RunRecord]) -> list[str]:
    """Return commands, hardware and versions, each once, with the number of runs."""
    runs = list(runs)
    if not runs:
        return ["No runs."]
    seeds = [run.seed for run in runs]
    lines = [f"{len(runs)} runs, seeds {min(seeds)} to {max(seeds)}.", ""]
    origins = Counter(_origin(run) for run in runs)
    for origin, count in sorted(origins.items()):
        lines.append(f"- {count} by {origin}")
    return lines


def _origin(run: RunRecord) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in run.versions.items())
    origin = f"`{run.command}` on {run.hardware}, with {versions}"
    if run.commit:
        origin += f", commit {run.commit}, data {run.data}"
    return origin
