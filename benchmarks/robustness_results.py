"""Tells what stored robustness runs say, by E5 of docs/results/plan.md: benchmarks/robustness.py makes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.common.records import RunRecord, read_records
from benchmarks.common.statistics import LEVEL, Interval, interval, p_text
from benchmarks.paper.summary import corrected_by_name
from benchmarks.robustness import ARMS, CLEAN, CORRUPTIONS, SEEDS

BASE = ARMS[0]
# Per cent that a guess gets right, of ten classes.
CHANCE = 10
FROM_BASE = ["from vanilla", "p"]
HEAD = ["arm", "clean", "corrupted", *FROM_BASE, "points lost", *FROM_BASE, "share lost, %", *FROM_BASE]
ERROR_HEAD = ["arm", "ECE of clean images, %", *FROM_BASE, "of corrupted ones, %", *FROM_BASE]
CORRUPTION_HEAD = ["top-1, %", *CORRUPTIONS]


class Arm:
    """Holds an arm's figures in per cent, one of each for every seed."""

    def __init__(self, records: Sequence[RunRecord]) -> None:
        ordered = sorted(records, key=lambda record: record.seed)
        self.seeds = [record.seed for record in ordered]
        self.clean = _of(ordered, CLEAN)
        self.clean_error = _of(ordered, f"{CLEAN} ECE")
        self.each: dict[str, np.ndarray] = {}
        errors = []
        for name in CORRUPTIONS:
            self.each[name] = _of(ordered, name)
            errors.append(_of(ordered, f"{name} ECE"))
        self.corrupted = np.mean(list(self.each.values()), axis=0)
        self.corrupted_error = np.mean(errors, axis=0)

    @property
    def lost(self) -> np.ndarray:
        """Return the points from clean images to corrupted ones."""
        points: np.ndarray = self.clean - self.corrupted
        return points

    @property
    def share_lost(self) -> np.ndarray:
        """Return the same in per cent of what the arm has above chance: a better arm has more to lose."""
        share: np.ndarray = 100 * self.lost / (self.clean - CHANCE)
        return share


def _of(records: Sequence[RunRecord], name: str) -> np.ndarray:
    """Return a figure in per cent, the mean over strengths, (seeds,)."""
    values: np.ndarray = 100 * np.array([np.mean(record.curve[name]) for record in records])
    return values


def read(path: Path) -> dict[str, Arm]:
    """Return the arms of a file, in the plan's order; empty before the last run is stored."""
    records: dict[str, list[RunRecord]] = {name: [] for name in ARMS}
    strengths = {name: list(of_name) for name, of_name in CORRUPTIONS.items()}
    for record in read_records(path).values():
        if record.seed in SEEDS and record.settings["corruptions"] == strengths:
            records[record.arm].append(record)
    if min(map(len, records.values())) < len(SEEDS):
        return {}
    return {name: Arm(found) for name, found in records.items()}


def rows(arms: dict[str, Arm]) -> list[list[str]]:
    """Return the rows under HEAD: means over all corruptions, and what is lost to them."""
    made = []
    for name, arm in arms.items():
        row = [name, interval(arm.clean).text()]
        made.append(row + _compared(arms, name, ("corrupted", "lost", "share_lost")))
    return made


def _compared(arms: dict[str, Arm], name: str, figures: tuple[str, ...]) -> list[str]:
    """Return each figure of an arm, how far it is from vanilla's, and p."""
    cells = []
    for values in figures:
        cells.append(interval(getattr(arms[name], values)).text())
        cells += _in_words(from_vanilla(arms, values).get(name))
    return cells


class Difference(NamedTuple):
    """Holds how far an arm is from vanilla."""

    found: Interval
    # By Holm over the arms.
    p: float


def from_vanilla(arms: dict[str, Arm], values: str) -> dict[str, Difference]:
    """Return the differences of a figure from vanilla's, by arm.

    Args:
        arms: all of them.
        values: the name of a property of Arm.
    """
    base = getattr(arms[BASE], values)
    found = {name: interval(getattr(arm, values) - base) for name, arm in arms.items() if name != BASE}
    return {name: Difference(found[name], p) for name, p in corrected_by_name(found).items()}


def _in_words(difference: Difference | None) -> list[str]:
    if difference is None:
        return ["", ""]
    return [difference.found.text("+"), p_text(difference.p)]


def sentence(arms: dict[str, Arm], name: str) -> str:
    """Return what may be said of an arm's robustness: it needs both losses, in points and as a share."""
    points, p_of_points = from_vanilla(arms, "lost")[name]
    share, p_of_share = from_vanilla(arms, "share_lost")[name]
    subject = name[0].upper() + name[1:]
    are_both_shown = max(p_of_points, p_of_share) < LEVEL
    if are_both_shown and max(points.mean, share.mean) < 0:
        return f"{subject} loses less than vanilla to corruptions."
    if are_both_shown and min(points.mean, share.mean) > 0:
        return f"{subject} loses more than vanilla to corruptions."
    return f"That {name} is more or less robust than vanilla is not shown."


def error_rows(arms: dict[str, Arm]) -> list[list[str]]:
    """Return the rows under ERROR_HEAD."""
    return [[name, *_compared(arms, name, ("clean_error", "corrupted_error"))] for name in arms]


def rows_by_corruption(arms: dict[str, Arm]) -> list[list[str]]:
    """Return the rows under CORRUPTION_HEAD: vanilla's top-1, and how far the other arms are from it."""
    base = arms[BASE]
    made = [[BASE, *(interval(values).text() for values in base.each.values())]]
    for name in arms:
        if name == BASE:
            continue
        row = [f"{name}, from vanilla"]
        for corruption in CORRUPTIONS:
            row.append(under(arms, name, corruption).text("+"))
        made.append(row)
    return made


def under(arms: dict[str, Arm], name: str, corruption: str) -> Interval:
    """Return how far an arm is from vanilla in points of top-1 under one corruption."""
    return interval(arms[name].each[corruption] - arms[BASE].each[corruption])
