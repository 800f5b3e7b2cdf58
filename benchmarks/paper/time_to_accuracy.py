"""Decides E1 of docs/results/plan.md: in how many seconds an arm reaches what the baseline has after its longest run.

Each arm has whole runs of several lengths, its horizons, each with a learning rate that falls to 0 at its end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.common.bootstrap import Estimate
from benchmarks.common.statistics import half_widths
from benchmarks.paper.choices import name_at
from benchmarks.paper.summary import Arms

# A speed-up is claimed if its interval's lower end is above this on every data set.
LEAST = 1.15
NO_SPEED_UP = "No speed-up in time was shown at this scale."


class Horizons(NamedTuple):
    """Holds an arm's runs, shortest first, of the same seeds for all arms."""

    # In training, of whole runs, (seeds, horizons); an epoch has the mean of all lengths of its seed.
    seconds: np.ndarray
    # After the last epoch, (seeds, horizons).
    accuracy: np.ndarray


def horizons_of(arms: Arms, arm: str, shares: Sequence[int]) -> Horizons:
    """Return the runs of an arm, by their lengths in per cent of the longest, shortest first."""
    found = [arms[name_at(arm, each)] for each in shares]
    first = np.stack([each.seconds[:, 0] for each in found], axis=1)
    rest = np.stack([each.seconds[:, -1] for each in found], axis=1) - first
    epochs = np.array([each.seconds.shape[1] - 1 for each in found])
    # An epoch costs the same in each of them, but for the first, before which a start may stand.
    an_epoch = rest.sum(1, keepdims=True) / epochs.sum()
    seconds = first + epochs * an_epoch
    accuracy = np.stack([each.final for each in found], axis=1)
    return Horizons(seconds, accuracy)


def speed_up(arm: Horizons, base: Horizons) -> Estimate:
    """Return in how many times fewer seconds the arm reaches the accuracy that the base has after its longest run.

    The accuracy of both is the line through the means over seeds at the horizons, so a base whose accuracy has stopped
    rising is as fast as itself. Where the arm never gets there, it is 0. The interval is Student's over seeds, of the
    logarithm by the jackknife; where one left-out seed decides whether the arm gets there, it is all that is possible.
    """
    seeds = np.arange(len(base.accuracy))
    value = _ratio(arm, base, seeds)
    left_out = []
    for seed in seeds:
        left_out.append(_ratio(arm, base, seeds[seeds != seed]))
    if not value or not min(left_out):
        return Estimate(value, 0.0, float("inf"))
    pseudo = len(seeds) * np.log(value) - (len(seeds) - 1) * np.log(left_out)
    width = float(half_widths(pseudo))
    return Estimate(value, float(value * np.exp(-width)), float(value * np.exp(width)))


def _ratio(arm: Horizons, base: Horizons, seeds: np.ndarray) -> float:
    """Return the base's seconds to its last accuracy over the arm's, over these seeds."""
    goal = base.accuracy[seeds].mean(0)[-1]
    whole = seconds_to_reach(goal, base.seconds[seeds].mean(0), base.accuracy[seeds].mean(0))
    return whole / seconds_to_reach(goal, arm.seconds[seeds].mean(0), arm.accuracy[seeds].mean(0))


def seconds_to_reach(goal: float, seconds: np.ndarray, accuracy: np.ndarray) -> float:
    """Return where a line first reaches a goal; inf where it does not, the first point if that is above.

    Args:
        goal: the accuracy.
        seconds: of the points, ascending, (points,).
        accuracy: of the points, (points,).
    """
    above = np.flatnonzero(accuracy >= goal)
    if not len(above):
        return float("inf")
    first = int(above[0])
    if not first:
        return float(seconds[0])
    return float(np.interp(goal, accuracy[first - 1 : first + 1], seconds[first - 1 : first + 1]))


def sentence(arm: str, speed_ups: Mapping[str, Estimate]) -> str:
    """Return what may be said of an arm, from its speed-up on each data set."""
    least = min(found.low for found in speed_ups.values())
    if least <= LEAST:
        return NO_SPEED_UP
    # Not rounded up.
    return f"{arm}: at least {math.floor(100 * least) / 100:.2f} times as fast in time, on {' and '.join(speed_ups)}."


def in_words(found: Estimate) -> str:
    """Return a speed-up and its interval in words."""
    if not found.value:
        return "not reached"
    if not found.low:
        return f"{found.value:.2f}, and not reached without one of the seeds"
    return found.text(digits=2)
