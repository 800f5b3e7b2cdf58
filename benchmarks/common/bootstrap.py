"""Computes bootstrap intervals of what measured turns say, and compares them with a bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 4000
PASS, FAIL, UNDECIDED = "pass", "fail", "undecided"


class Estimate(NamedTuple):
    """Holds a statistic of some turns and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def text(self, factor: float = 1, digits: int = 3) -> str:
        """Return the value and the interval, each times `factor`."""
        value, low, high = (f"{factor * number:.{digits}f}" for number in self)
        return f"{value} ({low}-{high})"

    def verdict(self, bound: float) -> str:
        """Return whether the interval is entirely below the bound, entirely above it, or across it."""
        if self.high <= bound:
            return PASS
        if self.low > bound:
            return FAIL
        return UNDECIDED

    def as_json(self) -> list[float | None]:
        """Return the three numbers, without those that JSON cannot hold."""
        numbers: list[float | None] = []
        for number in self:
            numbers.append(number if math.isfinite(number) else None)
        return numbers


def estimate(statistic: Callable[..., np.ndarray], *groups: np.ndarray, seed: int = 0) -> Estimate:
    """Return a statistic with its interval, the 2.5 % and 97.5 % quantiles over resampled turns.

    Args:
        statistic: takes each group as (resamples, turns, ...) and returns (resamples,).
        groups: what was measured, each (turns, ...). What was measured in the same turns stays together; different
            groups are resampled independently.
        seed: of the resampling.
    """
    generator = np.random.default_rng(seed)
    drawn = []
    for group in groups:
        turns = generator.integers(len(group), size=(RESAMPLES, len(group)))
        drawn.append(group[turns])
    value = statistic(*(group[None] for group in groups))
    tail = (1 - CONFIDENCE) / 2
    # Not interpolated, since a quantile may be infinite.
    low, high = np.quantile(statistic(*drawn), [tail, 1 - tail], method="nearest")
    return Estimate(float(value[0]), float(low), float(high))


def median(values: np.ndarray) -> Estimate:
    """Return the median of values (turns,) with its interval."""
    return estimate(_medians, values)


def ratio_of_medians(pairs: np.ndarray) -> Estimate:
    """Return the median of the first column of pairs (turns, 2) over that of the second, with its interval.

    Where the second is not positive, the ratio counts as infinite, so that noise cannot pass a bound.
    """
    return estimate(_ratios, pairs)


def one_plus_share(added: np.ndarray, whole: np.ndarray) -> Estimate:
    """Return 1 + median(added) / median(whole) with its interval, from turns that were measured apart."""
    return estimate(_shares, added, whole)


def _medians(values: np.ndarray) -> np.ndarray:
    medians: np.ndarray = np.median(values, axis=1)
    return medians


def _ratios(pairs: np.ndarray) -> np.ndarray:
    first, second = _medians(pairs).T
    ratios: np.ndarray = np.full(len(first), np.inf)
    np.divide(first, second, out=ratios, where=second > 0)
    return ratios


def _shares(added: np.ndarray, whole: np.ndarray) -> np.ndarray:
    shares: np.ndarray = 1 + _medians(added) / _medians(whole)
    return shares
