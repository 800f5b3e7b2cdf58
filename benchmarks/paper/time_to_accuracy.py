"""Decides E1 of docs/results/plan.md: in how many seconds an arm reaches what the baseline has after its longest run.

Each arm has whole runs of several lengths, its horizons, each with a learning rate that falls to 0 at its end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.common.bootstrap import Estimate, estimate
from benchmarks.paper.choices import name_at
from benchmarks.paper.summary import Arms

# A speed-up is claimed if its interval's lower end is above this on every data set.
LEAST = 1.15
NO_SPEED_UP = "No speed-up in time was shown at this scale."


class Horizons(NamedTuple):
    """Holds an arm's runs, shortest first, of the same seeds for all arms."""

    # In training, of whole runs, (seeds, horizons).
    seconds: np.ndarray
    # After the last epoch, (seeds, horizons).
    accuracy: np.ndarray


def horizons_of(arms: Arms, arm: str, shares: Sequence[int]) -> Horizons:
    """Return the runs of an arm, by their lengths in per cent of the longest, shortest first."""
    found = [arms[name_at(arm, each)] for each in shares]
    seconds = np.stack([each.seconds[:, -1] for each in found], axis=1)
    accuracy = np.stack([each.final for each in found], axis=1)
    return Horizons(seconds, accuracy)


def speed_up(arm: Horizons, base: Horizons) -> Estimate:
    """Return the base's seconds for its longest run over those in which the arm is as accurate.

    The arm's accuracy is the line through its means over seeds at its horizons. The interval is over resampled seeds,
    of both arms together; a sample that never gets there counts as 0.
    """

    def ratios(chosen: np.ndarray) -> np.ndarray:
        """Take numbers of seeds, (samples, seeds)."""
        goals = base.accuracy[chosen].mean(1)[:, -1]
        whole = base.seconds[chosen].mean(1)[:, -1]
        spent = seconds_to_reach(goals, arm.seconds[chosen].mean(1), arm.accuracy[chosen].mean(1))
        result: np.ndarray = whole / spent
        return result

    return estimate(ratios, np.arange(len(base.accuracy)))


def seconds_to_reach(goals: np.ndarray, seconds: np.ndarray, accuracy: np.ndarray) -> np.ndarray:
    """Return where lines first reach their goals, (samples,); inf where they do not, the first point if it is above.

    Args:
        goals: (samples,).
        seconds: of the points, ascending, (samples, points).
        accuracy: of the points, (samples, points).
    """
    above = accuracy >= goals[:, None]
    rows = np.arange(len(goals))
    first = above.argmax(1)
    before = np.maximum(first - 1, 0)
    rise = accuracy[rows, first] - accuracy[rows, before]
    missing = goals - accuracy[rows, before]
    share = np.ones(len(goals))
    np.divide(missing, rise, out=share, where=first > 0)
    start = seconds[rows, before]
    reached = start + share * (seconds[rows, first] - start)
    return np.where(above.any(1), reached, np.inf)


def sentence(arm: str, speed_ups: Mapping[str, Estimate]) -> str:
    """Return what may be said of an arm, from its speed-up on each data set."""
    least = min(found.low for found in speed_ups.values())
    if least <= LEAST:
        return NO_SPEED_UP
    return f"{arm}: at least {least:.2f} times as fast in time, on {' and '.join(speed_ups)}."
