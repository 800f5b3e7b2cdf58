"""Decides E1 of docs/results/plan.md: in how many seconds an arm reaches what the baseline has after its longest run.

Each arm has whole runs of several lengths, its horizons, each with a learning rate that falls to 0 at its end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.common.bootstrap import Estimate, estimate
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


def speed_up(arm: Horizons, base: Horizons, *more: Horizons) -> Estimate:
    """Return in how many times fewer seconds the arm reaches the accuracy that the base has after its longest run.

    The accuracy of each is the line through the means over seeds at the horizons, so a base whose accuracy has stopped
    rising is as fast as itself. Where the arm never gets there, it is 0. Each end of the interval is the wider of two:
    Student's over seeds, of the logarithm by the jackknife, and the resampled seeds', which see where a line jumps.
    Where one left-out seed decides whether the arm gets there, it is all that is possible.

    Args:
        arm: whose seconds are asked for.
        base: sets the goal.
        more: other runs of the base, such as those at another learning rate; the fastest count as the base's.
    """

    def ratios(chosen: np.ndarray) -> np.ndarray:
        """Take numbers of seeds, (samples, seeds)."""
        goals = base.accuracy[chosen].mean(1)[:, -1]
        of_base = [_seconds_to(goals, line, chosen) for line in (base, *more)]
        # A goal that is never reached takes infinite seconds, so the ratio is 0.
        result: np.ndarray = np.min(of_base, axis=0) / _seconds_to(goals, arm, chosen)
        return result

    seeds = np.arange(len(base.accuracy))
    value, low, high = estimate(ratios, seeds)
    left_out = ratios(np.array([seeds[seeds != seed] for seed in seeds]))
    if 0 in (value, *left_out):
        return Estimate(value, 0.0, math.inf)
    pseudo = len(seeds) * np.log(value) - (len(seeds) - 1) * np.log(left_out)
    width = float(half_widths(pseudo))
    return Estimate(value, min(low, value * math.exp(-width)), max(high, value * math.exp(width)))


def _seconds_to(goals: np.ndarray, line: Horizons, chosen: np.ndarray) -> np.ndarray:
    """Return the seconds to a goal in each sample of seeds, (samples,)."""
    points = zip(goals, line.seconds[chosen].mean(1), line.accuracy[chosen].mean(1), strict=True)
    return np.array([seconds_to_reach(goal, seconds, accuracy) for goal, seconds, accuracy in points])


def is_above_at_once(arm: Horizons, base: Horizons) -> bool:
    """Return whether the arm's shortest run is at the base's last accuracy already: it may get there before."""
    return bool(arm.accuracy.mean(0)[0] >= base.accuracy.mean(0)[-1])


def seconds_to_reach(goal: float, seconds: np.ndarray, accuracy: np.ndarray) -> float:
    """Return where a line first reaches a goal; inf where it does not, the first point if that is above.

    Args:
        goal: the accuracy.
        seconds: of the points, ascending, (points,).
        accuracy: of the points, (points,).
    """
    above = np.flatnonzero(accuracy >= goal)
    if not len(above):
        return math.inf
    first = int(above[0])
    if first == 0:
        return float(seconds[0])
    return float(np.interp(goal, accuracy[first - 1 : first + 1], seconds[first - 1 : first + 1]))


def sentence(arm: str, speed_ups: Mapping[str, Estimate]) -> str:
    """Return what may be said of an arm, from its speed-up on each data set."""
    if _least(speed_ups) <= LEAST:
        return NO_SPEED_UP
    return f"{arm}: at least {least_in_words(speed_ups)} times as fast in time, on {' and '.join(speed_ups)}."


def least_in_words(speed_ups: Mapping[str, Estimate]) -> str:
    """Return the lowest end of all data sets' intervals, not rounded up."""
    return f"{math.floor(100 * _least(speed_ups)) / 100:.2f}"


def _least(speed_ups: Mapping[str, Estimate]) -> float:
    return min(found.low for found in speed_ups.values())


def in_words(found: Estimate, above_at_once: bool = False) -> str:
    """Return a speed-up and its interval in words.

    Args:
        found: the speed-up.
        above_at_once: whether it is a lower bound.
    """
    if found.value == 0:
        return "not reached"
    text = found.text(digits=2)
    if found.low == 0:
        text = f"{found.value:.2f}, and not reached without some of the seeds"
    return f"at least {text}" if above_at_once else text
