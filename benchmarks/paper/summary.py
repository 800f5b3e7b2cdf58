"""What the runs of an experiment say: mean and spread, a paired test over seeds, and the epochs that are saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from scipy import stats

from benchmarks.common.records import Result
from benchmarks.common.statistics import epochs_to_reach
from benchmarks.paper.experiments import Experiment


@dataclass
class Arm:
    """The runs of an arm in one setting, by seed."""

    runs: dict[int, Result] = field(default_factory=dict)

    @property
    def curves(self) -> np.ndarray:
        """Top-1 in per cent, (seeds, epochs)."""
        return 100 * np.array([run.top1 for _, run in sorted(self.runs.items())])

    @property
    def seconds(self) -> np.ndarray:
        """Of training until the end of each epoch, (seeds, epochs)."""
        return np.array([run.seconds for _, run in sorted(self.runs.items())])

    @property
    def final(self) -> np.ndarray:
        """Top-1 after the last epoch, (seeds,)."""
        last: np.ndarray = self.curves[:, -1]
        return last


@dataclass(frozen=True)
class Gain:
    """Difference of two arms over the seeds that both have, in points."""

    mean: float
    half_width: float | None  # of the 95 % confidence interval by Student's t; None for one seed
    p: float | None  # of the paired t-test, two-sided


def collect(
    experiment: Experiment, scale: str, seeds: int, results: Mapping[str, Result]
) -> dict[str, dict[str, Arm]]:
    """Arms by setting, as far as they have been run."""
    found: dict[str, dict[str, Arm]] = {}
    for job in experiment.jobs(scale, seeds):
        if job.key in results:
            found.setdefault(job.setting, {}).setdefault(job.arm, Arm()).runs[job.seed] = results[job.key]
    return found


def gain(arm: Arm, base: Arm) -> Gain:
    """What an arm's final accuracy is above the baseline's, seed by seed."""
    both = sorted(arm.runs.keys() & base.runs.keys())
    points = np.array([100 * (arm.runs[seed].top1[-1] - base.runs[seed].top1[-1]) for seed in both])
    if len(points) < 2 or not points.std():
        return Gain(float(points.mean()), None, None)
    test = stats.ttest_1samp(points, 0)
    interval = test.confidence_interval(0.95)
    return Gain(float(points.mean()), float(interval.high - interval.low) / 2, float(test.pvalue))


def speed_up(arm: Arm, base: Arm) -> float | None:
    """Returns the baseline's epochs over the epoch in which the arm first reaches the baseline's final accuracy.

    Compares means over the seeds that both have. None: the arm never gets there.
    """
    mine, theirs = (
        Arm({seed: each.runs[seed] for seed in arm.runs.keys() & base.runs.keys()}) for each in (arm, base)
    )
    reached = epochs_to_reach(mine.curves.mean(0), float(theirs.final.mean()))
    return theirs.curves.shape[1] / reached if reached else None
