"""Computes means over seeds with their 95 % confidence intervals, by Student's t."""

from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
# Of a corrected p, below which a difference is shown.
LEVEL = 0.05
# Smaller probabilities are printed as below it.
SMALLEST_P = 0.001


class Interval(NamedTuple):
    """Holds the mean of some runs, and what their number says about it."""

    mean: float
    # That of the 95 % confidence interval; None for one run.
    half_width: float | None
    # That of the two-sided t-test of a mean of 0; None where all runs are equal.
    p: float | None

    def text(self, sign: str = "", digits: int = 1) -> str:
        """Return the mean and the half width of the interval, with so many digits behind the point."""
        mean = f"{self.mean:{sign}z.{digits}f}"
        if self.half_width is None:
            return mean
        return f"{mean} ± {self.half_width:.{digits}f}"


def p_text(p: float) -> str:
    """Return a probability with three digits, or that it is below the smallest of these."""
    if p < SMALLEST_P:
        return f"< {SMALLEST_P}"
    return f"{p:.3f}"


def interval(values: np.ndarray) -> Interval:
    """Return the mean of values (runs,) and its interval."""
    mean = float(values.mean())
    if len(values) < 2:
        return Interval(mean, None, None)
    half_width = float(half_widths(values))
    if not half_width:
        return Interval(mean, half_width, None)
    return Interval(mean, half_width, float(stats.ttest_1samp(values, 0).pvalue))


def half_widths(values: np.ndarray) -> np.ndarray:
    """Return the half widths of the intervals of the means of values (runs, ...) over runs; zeros for one run."""
    runs = len(values)
    if runs < 2:
        return np.zeros(values.shape[1:])
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, runs - 1)
    widths: np.ndarray = quantile * values.std(0, ddof=1) / np.sqrt(runs)
    return widths


def epochs_to_reach(curve: np.ndarray, target: float) -> int | None:
    """Return the first epoch, counted from 1, whose accuracy is at least `target`."""
    reached = np.flatnonzero(curve >= target)
    if not len(reached):
        return None
    return int(reached[0]) + 1
