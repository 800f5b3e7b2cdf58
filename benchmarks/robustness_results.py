"""Tells what stored robustness runs say: benchmarks/robustness.py makes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.common.records import RunRecord, read_records
from benchmarks.common.statistics import interval
from benchmarks.paper.summary import holm
from benchmarks.robustness import ARMS, CLEAN, CORRUPTIONS, SEEDS

BASE = ARMS[0]
HEAD = ["arm", "clean", "corrupted", "lost", "loses more than vanilla", "p", "ECE, clean", "ECE, corrupted"]


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
    """Return the rows under HEAD: means over all corruptions, what is lost to them, and calibration errors."""
    others = [name for name in arms if name != BASE]
    more = [interval(arms[name].lost - arms[BASE].lost) for name in others]
    corrected = holm([found.p or 1.0 for found in more])
    cells = {BASE: ["", ""]}
    for name, found, p in zip(others, more, corrected, strict=True):
        cells[name] = [found.text("+"), f"{p:.3f}"]
    made = []
    for name, arm in arms.items():
        row = [name]
        for values in (arm.clean, arm.corrupted, arm.lost):
            row.append(interval(values).text())
        row += cells[name]
        for values in (arm.clean_error, arm.corrupted_error):
            row.append(interval(values).text())
        made.append(row)
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
