"""Tells what stored robustness runs say: benchmarks/robustness.py makes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.common.records import RunRecord, read_records
from benchmarks.common.statistics import interval, p_text
from benchmarks.paper.summary import corrected
from benchmarks.robustness import ARMS, CLEAN, CORRUPTIONS, SEEDS

BASE = ARMS[0]
# Per cent that a guess gets right, of ten classes.
CHANCE = 10
HEAD = ["arm", "clean", "corrupted", "points lost", "from vanilla", "p", "share lost, %", "from vanilla", "p"]
ERROR_HEAD = ["arm", "ECE of clean images, %", "of corrupted ones, %"]


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
    for record in read_records(path).values():
        records[record.arm].append(record)
    if min(map(len, records.values())) < len(SEEDS):
        return {}
    return {name: Arm(found) for name, found in records.items()}


def rows(arms: dict[str, Arm]) -> list[list[str]]:
    """Return the rows under HEAD: means over all corruptions, and what is lost to them."""
    lost, shares = {}, {}
    for name, arm in arms.items():
        lost[name] = arm.lost
        shares[name] = arm.share_lost
    by_points, by_share = _from_vanilla(lost), _from_vanilla(shares)
    made = []
    for name, arm in arms.items():
        row = [name, interval(arm.clean).text(), interval(arm.corrupted).text()]
        row += [interval(lost[name]).text(), *by_points[name]]
        row += [interval(shares[name]).text(), *by_share[name]]
        made.append(row)
    return made


def _from_vanilla(values: dict[str, np.ndarray]) -> dict[str, list[str]]:
    """Return the difference from vanilla and its p by Holm, by arm."""
    others = [name for name in values if name != BASE]
    differences = [interval(values[name] - values[BASE]) for name in others]
    cells = {BASE: ["", ""]}
    for name, found, p in zip(others, differences, corrected(differences), strict=True):
        cells[name] = [found.text("+"), p_text(p)]
    return cells


def error_rows(arms: dict[str, Arm]) -> list[list[str]]:
    """Return the rows under ERROR_HEAD."""
    made = []
    for name, arm in arms.items():
        made.append([name, interval(arm.clean_error).text(), interval(arm.corrupted_error).text()])
    return made


def rows_by_corruption(arms: dict[str, Arm]) -> list[list[str]]:
    """Return a row for each arm: top-1 under each corruption, in the order of CORRUPTIONS."""
    made = []
    for name, arm in arms.items():
        row = [name]
        for values in arm.each.values():
            row.append(interval(values).text())
        made.append(row)
    return made
