"""Recomputes figures from the runs in docs/results, as the documents print them."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import ROOT, overhead_results, robustness_results
from benchmarks.common.records import RunRecord, read_records
from benchmarks.common.statistics import Interval, epochs_to_reach, interval, p_text
from benchmarks.overhead_results import OURS, Result, Results
from benchmarks.paper.catalogue import ALL, PLANNED
from benchmarks.paper.choices import name_at
from benchmarks.paper.report import seeds_of
from benchmarks.paper.summary import Arm, Arms, collect, gain, speed_up, speed_up_in_time, time_ratio

RESULTS = ROOT / "docs" / "results"
RUNS = RESULTS / "small.jsonl"
PLANNED_RUNS = RESULTS / "evidence.jsonl"

# Arms and settings, as the stored runs name them.
TRACT = "TrAct 0.1"
START = "matched start, TrAct 0.1"
STEM = "whitening stem"
RELATIVE = "lam 0.1 tr(C) / n"
CROPS_ADAMW = "AdamW, lr 0.001"
CROPS_SGD = "SGD, lr 0.12"
STEP_SIZE = "evidence_step_size"
PLANNED_START = "matched start, TrAct"
# Of the quickstart's stored runs.
FIRST_SEED = 100


@functools.cache
def runs(experiment: str) -> dict[str, RunRecord]:
    """Return the stored runs that an experiment's are among."""
    return read_records(PLANNED_RUNS if experiment in PLANNED else RUNS)


@functools.cache
def arms(experiment: str, setting: str = "") -> Arms:
    """Return the stored arms of an experiment in one setting."""
    return collect(ALL[experiment], "small", seeds_of(experiment), runs(experiment))[setting]


def longest(arm: str) -> str:
    """Return the name of an arm's longest runs, where it has several lengths."""
    return name_at(arm, 100)


def arms_of(experiments: Mapping[str, str]) -> dict[str, Arms]:
    """Return the stored arms of several experiments, by what tells them apart."""
    found = {}
    for told, name in experiments.items():
        found[told] = arms(name)
    return found


def some(arm: Arm, seeds: Iterable[int]) -> Arm:
    """Return the runs of these seeds."""
    return Arm({seed: arm.runs[seed] for seed in seeds})


@dataclass(frozen=True)
class Pair:
    """Compares an arm with another, which has the same seeds."""

    arm: Arm
    base: Arm

    @property
    def gain(self) -> str:
        """Return the difference in points with its 95 % interval."""
        return gain(self.arm, self.base).text("+")

    @property
    def p(self) -> str:
        """Return the p of the paired t-test, uncorrected."""
        p = gain(self.arm, self.base).p
        assert p is not None
        return p_text(p)

    @property
    def speed_up(self) -> str:
        """Return how many times fewer epochs the arm takes to the base's end."""
        return f"{speed_up(self.arm, self.base):.2f}"

    @property
    def in_time(self) -> str:
        """Return the same in seconds, with its bootstrap interval."""
        found = speed_up_in_time(self.arm, self.base)
        assert found is not None
        return found.text(digits=2)

    @property
    def epoch(self) -> str:
        """Return the epoch in which the arm passes the base's end."""
        return str(epochs_to_reach(self.arm.curves.mean(0), float(self.base.final.mean())))

    def of(self, seeds: Iterable[int]) -> Pair:
        """Return the same over these seeds."""
        chosen = list(seeds)
        return Pair(some(self.arm, chosen), some(self.base, chosen))

    def gain_after(self, epoch: int) -> str:
        """Return the difference in points after that epoch."""
        return interval(self.arm.curves[:, epoch - 1] - self.base.curves[:, epoch - 1]).text("+")

    @property
    def seeds_below(self) -> str:
        """Count the seeds whose arm ends below the base."""
        return str(int((self.arm.final < self.base.final).sum()))


def pair(experiment: str, arm: str, base: str = "vanilla", setting: str = "") -> Pair:
    """Return two stored arms of one setting, over the seeds that both have."""
    found = arms(experiment, setting)
    return Pair(found[arm].with_seeds_of(found[base]), found[base].with_seeds_of(found[arm]))


def final(experiment: str, arm: str, setting: str = "") -> str:
    """Return an arm's mean final accuracy in per cent."""
    return f"{interval(arms(experiment, setting)[arm].final).mean:.1f}"


def final_interval(experiment: str, arm: str, setting: str = "") -> str:
    """Return an arm's mean final accuracy in per cent with its 95 % interval."""
    return interval(arms(experiment, setting)[arm].final).text()


@functools.cache
def costs(file: str) -> Results:
    """Return the measurements of what TrAct costs that a file of docs/results holds."""
    return overhead_results.read_results(RESULTS / file)


def cost(file: str, measurement: str) -> Result:
    """Return one measurement, such as "ViT-S/16 | step | cuda | bf16 | eager | 256"."""
    return costs(file)[measurement]


def times(result: Result, arm: str = OURS) -> str:
    """Return the time of an arm over vanilla's, with its bootstrap interval."""
    found = overhead_results.ratio(result, arm)
    return "fails" if found is None else f"x {found.text()}"


@functools.cache
def robustness() -> dict[str, robustness_results.Arm]:
    """Return the arms of E5, by name."""
    return robustness_results.read(RESULTS / "robustness.jsonl")


def colour_statistics(dataset: str) -> str:
    """Return the accuracy in per cent of a random forest on colour statistics, with its 95 % interval over seeds."""
    records = read_records(RESULTS / "colour_statistics.jsonl").values()
    found = [record.curve["top1"][0] for record in records if record.settings["dataset"].endswith(dataset)]
    return interval(100 * np.array(found)).text()


class Quickstart:
    """Compares an arm of examples/quickstart.py with another: test loss, less is better."""

    def __init__(self, arm: str, base: str = "vanilla", folder: str = "quickstart") -> None:
        self.loss, self.seconds = quickstart_runs(arm, folder)
        self.base, self.base_seconds = quickstart_runs(base, folder)

    @property
    def end(self) -> str:
        """Return the mean loss after the last epoch with its 95 % interval."""
        return interval(self.loss[:, -1]).text(digits=4)

    @property
    def difference(self) -> Interval:
        """Return the difference of the last losses from the base's, by seed."""
        return interval(self.loss[:, -1] - self.base[:, -1])

    @property
    def change(self) -> str:
        """Return the same in words."""
        return self.difference.text("+", digits=4)

    @property
    def epoch(self) -> str:
        """Return the epoch in which the mean loss passes the base's last."""
        return str(epochs_to_reach(-self.loss.mean(0), -float(self.base[:, -1].mean())) or "never")

    @property
    def ahead_until(self) -> str:
        """Return the last epoch of all before which, and in which, the mean loss is below the base's."""
        ahead = self.loss.mean(0) < self.base.mean(0)
        return str(int(ahead.cumprod().sum()))

    @property
    def seeds_above(self) -> str:
        """Count the seeds whose arm ends above the base."""
        return str(int((self.loss[:, -1] > self.base[:, -1]).sum()))

    @property
    def in_time(self) -> str:
        """Return the base's seconds over those until then, with their bootstrap interval."""
        found = time_ratio(-self.loss, self.seconds, -self.base, self.base_seconds)
        return "never" if found is None else found.text(digits=2)


def flower_rates() -> dict[str, str]:
    """Return vanilla's last loss at each learning rate in the choosing runs of E6's flowers."""
    losses: dict[float, list[float]] = {}
    for run in _quickstart_rows("vanilla", "flowers/rates.jsonl"):
        losses.setdefault(run["settings"]["learning_rate"], []).append(run["loss"][-1])
    return {f"{rate:g}": interval(np.array(losses[rate])).text(digits=4) for rate in sorted(losses)}


def quickstart_runs(arm: str, folder: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the losses and the seconds of an arm that a folder of docs/results stores, each (seeds, epochs)."""
    runs = _quickstart_rows(arm, f"{folder}/records.jsonl")
    runs.sort(key=lambda row: row["seed"])
    seeds = [run["seed"] for run in runs]
    assert seeds == list(range(FIRST_SEED, FIRST_SEED + len(runs))), f"{folder}: {arm} has the seeds {seeds}."
    return np.array([run["loss"] for run in runs]), np.array([run["seconds"] for run in runs])


def _quickstart_rows(arm: str, file: str) -> list[dict[str, Any]]:
    """Return what examples/quickstart.py has stored of an arm in a file of docs/results."""
    lines = (RESULTS / file).read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["arm"] == arm]
