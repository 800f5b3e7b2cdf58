"""Summarises the runs of an experiment: means, gains by a paired test over seeds, and the epochs that are saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.common.bootstrap import Estimate, estimate
from benchmarks.common.records import RunRecord
from benchmarks.common.statistics import Interval, epochs_to_reach, interval
from benchmarks.paper.experiment import Experiment


@dataclass
class Arm:
    """Holds the runs of an arm in one setting, by seed."""

    runs: dict[int, RunRecord] = field(default_factory=dict)

    @property
    def top1(self) -> np.ndarray:
        """Return top-1 from 0 to 1, (seeds, epochs)."""
        return np.array([run.curve["top1"] for _, run in sorted(self.runs.items())])

    @property
    def curves(self) -> np.ndarray:
        """Return top-1 in per cent, (seeds, epochs)."""
        return 100 * self.top1

    @property
    def seconds(self) -> np.ndarray:
        """Return the time of training until the end of each epoch, (seeds, epochs)."""
        return np.array([run.seconds for _, run in sorted(self.runs.items())])

    @property
    def final(self) -> np.ndarray:
        """Return top-1 after the last epoch, (seeds,)."""
        last: np.ndarray = self.curves[:, -1]
        return last

    @property
    def milliseconds(self) -> float:
        """Return those of a step, the mean over runs; behind the first epoch, before which a start may stand."""
        found = []
        for run in self.runs.values():
            settings = run.settings
            seconds = np.diff(run.seconds, prepend=0)
            # Smoke runs may have one epoch.
            an_epoch = seconds[min(1, len(seconds) - 1) :].mean()
            found.append(1000 * an_epoch / (settings["train_samples"] // settings["batch_size"]))
        return float(np.mean(found))

    def with_seeds_of(self, other: Arm) -> Arm:
        """Return the runs whose seeds the other arm has too."""
        shared = self.runs.keys() & other.runs.keys()
        return Arm({seed: self.runs[seed] for seed in shared})


Arms = dict[str, Arm]


def collect(
    experiment: Experiment, scale: str, seeds: int | None, results: Mapping[str, RunRecord]
) -> dict[str, Arms]:
    """Return the arms of each setting, as far as they have been run; the usual seeds where `seeds` is None."""
    found: dict[str, Arms] = {}
    for job in experiment.jobs(scale, seeds):
        if job.key in results:
            arms = found.setdefault(job.setting, {})
            arms.setdefault(job.arm, Arm()).runs[job.seed] = results[job.key]
    return found


def gain(arm: Arm, base: Arm) -> Interval:
    """Return the points that an arm's final accuracy is above the baseline's, seed by seed."""
    differences = arm.with_seeds_of(base).top1[:, -1] - base.with_seeds_of(arm).top1[:, -1]
    return interval(100 * differences)


def speed_up(arm: Arm, base: Arm) -> float | None:
    """Return the baseline's epochs over the epoch in which the arm first reaches the baseline's final accuracy.

    Compares means over the seeds that both have; returns None where the arm never gets there.
    """
    mine = arm.with_seeds_of(base).curves
    theirs = base.with_seeds_of(arm).curves
    reached = epochs_to_reach(mine.mean(0), float(theirs[:, -1].mean()))
    if not reached:
        return None
    return len(theirs[0]) / reached


def speed_up_in_time(arm: Arm, base: Arm) -> Estimate | None:
    """Return the baseline's seconds over those in which the arm first reaches the baseline's final accuracy.

    Compares the seeds that both have; returns None where the arm never gets there, or with less than two seeds.
    """
    mine = arm.with_seeds_of(base)
    theirs = base.with_seeds_of(arm)
    if len(mine.runs) < 2:
        return None
    return time_ratio(mine.curves, mine.seconds, theirs.curves, theirs.seconds)


def time_ratio(
    curves: np.ndarray, seconds: np.ndarray, base_curves: np.ndarray, base_seconds: np.ndarray
) -> Estimate | None:
    """Return the seconds of a whole base run over those in which the mean curve first reaches the base's mean end.

    The interval is over resampled seeds, of both together; a sample that never gets there counts as 0. Returns None
    where the mean over all seeds never gets there.

    Args:
        curves: what is measured, more is better, (seeds, epochs).
        seconds: of training until then, (seeds, epochs).
        base_curves: the same of the base, (seeds, base epochs).
        base_seconds: the same of the base, (seeds, base epochs).
    """

    def ratios(chosen: np.ndarray) -> np.ndarray:
        """Take numbers of seeds, (samples, seeds)."""
        goals = base_curves[:, -1][chosen].mean(1)
        reached = curves[chosen].mean(1) >= goals[:, None]
        spent = seconds[chosen].mean(1)
        at_goal = spent[np.arange(len(chosen)), reached.argmax(1)]
        whole = base_seconds[:, -1][chosen].mean(1)
        result: np.ndarray = np.where(reached.any(1), whole / at_goal, 0.0)
        return result

    found = estimate(ratios, np.arange(len(curves)))
    if not found.value:
        return None
    return found


def corrected(differences: Iterable[Interval]) -> list[float]:
    """Return the p of differences, corrected by Holm for their number; 1 where all seeds have the same difference."""
    plain = []
    for difference in differences:
        plain.append(1.0 if difference.p is None else difference.p)
    return holm(plain)


def corrected_by_name(differences: Mapping[str, Interval]) -> dict[str, float]:
    """Return the same by the names of the differences."""
    return dict(zip(differences, corrected(differences.values()), strict=True))


def holm(probabilities: Sequence[float]) -> list[float]:
    """Return p-values corrected for the number of comparisons (Holm, 1979)."""
    corrected = [0.0] * len(probabilities)
    largest = 0.0
    order = sorted(range(len(probabilities)), key=probabilities.__getitem__)
    for rank, place in enumerate(order):
        largest = max(largest, (len(probabilities) - rank) * probabilities[place])
        corrected[place] = min(1.0, largest)
    return corrected
