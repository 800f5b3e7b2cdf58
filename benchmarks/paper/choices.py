"""Chooses the best cell of each arm by its tuning runs, and makes the final runs of what was chosen."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import yaml

from benchmarks.common.records import RunRecord
from benchmarks.paper.experiment import Changes, Experiment, Job, read_values

CHOSEN = Path(__file__).with_name("chosen.yaml")
HEAD = "# The best cell of each arm on the validation rows; `python -m benchmarks.paper choose` writes this.\n"
# What stands in a cell's name behind that of its arm: perhaps a damping, and a rate.
CELL = re.compile(r",? ?[\d.]*, lr .*$")
# How many cells of an arm a second seed decides between, after the first has tried all of them.
FINALISTS = 2
# Stands behind the share of the longest runs' epochs.
LENGTH = " % of the epochs"
# Seeds below have been looked at, or chose something.
FRESH_SEED = 100


class Choice(NamedTuple):
    """Holds the best cell of an arm."""

    arm: str
    cell: str
    # On the validation rows, from 0 to 1, the mean over seeds.
    top1: float
    # Whether its rate is the lowest or the highest that was tried.
    at_edge: bool


def arm_of(cell: str) -> str:
    """Return the arm that a cell belongs to, by its name: "TrAct 0.1, lr 0.002" is one of TrAct's."""
    return CELL.sub("", cell)


def name_at(arm: str, share: int) -> str:
    """Return the name of an arm's whole runs whose length is that many per cent of the longest."""
    return f"{arm}, {share}{LENGTH}"


def planned(experiment: Experiment, scale: str, have: Mapping[str, RunRecord], seeds: int | None = None) -> list[Job]:
    """Return the runs of an experiment: of a choice, those of the second seed once the first says which they are.

    Args:
        experiment: any.
        scale: of the runs.
        have: what has been run.
        seeds: the first so many; by default the usual number.
    """
    jobs = list(experiment.jobs(scale, seeds))
    if not experiment.finalists:
        return jobs
    # The first seed of everything stands before the second.
    first = jobs[: len(experiment.arm_names(scale))]
    if not {job.key for job in first} <= have.keys():
        return first
    picked: list[str] = []
    for cells in _scores(first, have).values():
        picked += sorted(cells, key=cells.__getitem__, reverse=True)[: experiment.finalists]
    return first + [job for job in jobs[len(first) :] if job.arm in picked]


def count_planned(experiment: Experiment, scale: str) -> int:
    """Return the number of runs of an experiment, with those that are not known yet."""
    jobs = list(experiment.jobs(scale))
    if not experiment.finalists:
        return len(jobs)
    cells = experiment.arm_names(scale)
    arms = set(map(arm_of, cells))
    later_seeds = len(jobs) // len(cells) - 1
    return len(cells) + later_seeds * len(arms) * experiment.finalists


def split_name(name: str) -> tuple[str, str]:
    """Return the arm and the length of whole runs, which is empty where there is one length alone."""
    arm, _, length = name.rpartition(", ")
    if length.endswith(LENGTH):
        return arm, length
    return name, ""


def choose(experiment: Experiment, scale: str, have: Mapping[str, RunRecord]) -> list[Choice]:
    """Return the cell of each arm that is the best on average, the first of equals, of those that all seeds tried.

    Raises:
        SystemExit: where a cell has not been run yet.
    """
    jobs = planned(experiment, scale, have)
    for job in jobs:
        if job.key not in have:
            raise SystemExit(f"{experiment.title}: seed {job.seed} of {job.arm} is missing; `run` makes it.")
    choices = []
    for arm, cells in _scores(jobs, have).items():
        most = max(map(len, cells.values()))
        means = {cell: sum(found) / most for cell, found in cells.items() if len(found) == most}
        best = max(means, key=means.__getitem__)
        choices.append(Choice(arm, best, means[best], is_at_edge(experiment, best)))
    return choices


def _scores(jobs: Iterable[Job], have: Mapping[str, RunRecord]) -> dict[str, dict[str, list[float]]]:
    """Return the final top-1 by each seed, of the cells of each arm."""
    scores: dict[str, dict[str, list[float]]] = {}
    for job in jobs:
        top1 = have[job.key].curve["top1"][-1]
        scores.setdefault(arm_of(job.arm), {}).setdefault(job.arm, []).append(top1)
    return scores


def is_at_edge(experiment: Experiment, cell: str) -> bool:
    """Return whether a cell has the lowest or the highest rate of its arm."""
    rates = []
    for name, changes in experiment.arms.items():
        if arm_of(name) == arm_of(cell):
            rates.append(changes["learning_rate"])
    return experiment.arms[cell]["learning_rate"] in (min(rates), max(rates))


def remember(name: str, choices: Iterable[Choice], file: Path = CHOSEN) -> None:
    """Write the choices of a tuning experiment beside those of others."""
    chosen = dict(read(file))
    chosen[name] = {choice.arm: choice.cell for choice in choices}
    file.write_text(HEAD + yaml.safe_dump(chosen, sort_keys=False), encoding="utf-8")
    read.cache_clear()


@functools.cache
def read(file: Path = CHOSEN) -> Mapping[str, Mapping[str, str]]:
    """Return the cell of each arm, by the name of the tuning experiment."""
    found: dict[str, dict[str, str]] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return found


def final_runs(
    title: str, tuned: str, tuning: Experiment, small: Changes, seeds: range, shares: tuple[int, ...] = ()
) -> Experiment | None:
    """Return the runs of each arm's chosen cell; None before the choice is made, or if it names a cell of before.

    Args:
        title: of the experiment.
        tuned: the name of the tuning experiment.
        tuning: that experiment.
        small: of the small scale, without the validation split.
        seeds: fresh ones; where time is measured, no other experiment has them, since runs of other days do not count.
        shares: lengths of whole runs in per cent of the recipe's epochs, shortest first; without them the recipe's.
    """
    cells = {}
    for arm, cell in read().get(tuned, {}).items():
        if cell not in tuning.arms:
            return None
        cells[arm] = dict(tuning.arms[cell])
        cells[arm].pop("epochs", None)
    if not cells:
        return None
    arms: dict[str, Changes] = {}
    whole = read_values(tuning.recipe)["epochs"]
    # The longest stand first, since the first arm is what others are compared with.
    for share in reversed(shares):
        for arm, changes in cells.items():
            arms[name_at(arm, share)] = changes | {"epochs": round(share * whole / 100)}
    reference = ""
    if not shares:
        reference = "TrAct"
    return Experiment(
        title,
        tuning.recipe,
        {"": {}},
        arms or cells,
        small,
        tuning.smoke,
        full_seeds=len(seeds),
        small_seeds=len(seeds),
        first_seed=seeds.start,
        reference=reference,
        neighbours=len(cells),
    )


def known(experiments: Mapping[str, Experiment | None]) -> dict[str, Experiment]:
    """Return the experiments whose cells are chosen."""
    found = {}
    for name, experiment in experiments.items():
        if experiment:
            found[name] = experiment
    return found
