"""Says what several experiments of docs/results/plan.md decide together, after their last run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.common import markdown
from benchmarks.common.bootstrap import Estimate
from benchmarks.common.records import RunRecord
from benchmarks.common.statistics import LEVEL, Interval, p_text
from benchmarks.paper import evidence_layers, evidence_time
from benchmarks.paper.catalogue import ALL
from benchmarks.paper.choices import name_at, split_name
from benchmarks.paper.evidence_optimizers import OPTIMIZERS
from benchmarks.paper.evidence_time import AT_GOALS_RATE, VANILLA
from benchmarks.paper.experiment import Experiment
from benchmarks.paper.summary import Arms, collect, corrected, gain
from benchmarks.paper.time_to_accuracy import Horizons, horizons_of, in_words, is_above_at_once, sentence, speed_up

PRIMARY_ARM = "TrAct"
FIRST = "first layer"
# E1's experiments.
IN_TIME = {"CIFAR-10": "evidence_cifar10", "flowers": "evidence_flowers"}
# E3's.
BY_OPTIMIZER = {name: f"evidence_{name}" for name in OPTIMIZERS}
# E4's.
IN_LAYERS = {"ViT": "evidence_vit_layers", "ResNet-18": "evidence_resnet_layers"}
# The choice of layers by which E4 decides.
DEEPER = "all layers"
PRIMARY_OPTIMIZER = "muon_split"
ABOUT_TIME = """\
Vanilla's seconds to the accuracy of its longest run over those of the arm. Each end of the 95 % interval is the wider
of the jackknife's and that of resampled seeds. Vanilla's longest run has a rate of its own, and where its shorter ones
are there first at that rate, these count. *At least* in a cell: the arm's shortest run is above the goal already. *At
least* in a sentence: the lowest end of both intervals, rounded down."""
UNDECIDED = "Nothing is decided, since times of different origins are compared."
ABOUT_LAYERS = """\
*Times as fast*: the seconds in which vanilla, or TrAct in the first layer alone, reaches the accuracy of its longest
run over those of the arm, with intervals as in E1."""
ADDS = "TrAct adds to Muon as it is usually used, at this size and length."
NOT_SHOWN = "No gain under Muon as it is usually used was shown at this scale."


def lines(scale: str, have: Mapping[str, RunRecord]) -> Iterator[str]:
    """Yield, as Markdown, what follows from the experiments that are whole, at the small scale alone."""
    if scale != "small":
        return
    found = _whole(IN_TIME, scale, have)
    if found:
        yield from in_time(found, evidence_time.SHARES)
    found = _whole(BY_OPTIMIZER, scale, have)
    if found:
        yield from with_optimizers(found)
    found = _deeper_layers(scale, have)
    if found:
        yield from in_layers(found, evidence_layers.SHARES)


def _deeper_layers(scale: str, have: Mapping[str, RunRecord]) -> dict[str, Arms]:
    """Return E4's arms by model: the ResNet's too where the ViT's runs do not decide alone."""
    found = _whole({"ViT": IN_LAYERS["ViT"]}, scale, have)
    if found and _all_save_time(found["ViT"], evidence_layers.SHARES):
        return _whole(IN_LAYERS, scale, have)
    return found


def _whole(names: Mapping[str, str], scale: str, have: Mapping[str, RunRecord]) -> dict[str, Arms]:
    """Return the arms of experiments, by what is different between them; nothing before the last run of all."""
    found = {}
    for told, name in names.items():
        experiment = ALL.get(name)
        if not experiment or not _is_whole(experiment, scale, have):
            return {}
        (found[told],) = collect(experiment, scale, experiment.small_seeds, have).values()
    return found


def _is_whole(experiment: Experiment, scale: str, have: Mapping[str, RunRecord]) -> bool:
    return all(job.key in have for job in experiment.jobs(scale))


def faster_than(base: str, arms: Arms, arm: str, shares: Sequence[int]) -> Estimate:
    """Return how many times faster an arm is than a base."""
    return speed_up(horizons_of(arms, arm, shares), *_lines_of(base, arms, shares))


def _lines_of(base: str, arms: Arms, shares: Sequence[int]) -> list[Horizons]:
    """Return a base's runs, and those at the rate of its longest where vanilla has them."""
    lines = [horizons_of(arms, base, shares)]
    if base == VANILLA and name_at(AT_GOALS_RATE, shares[0]) in arms:
        longest = {name_at(AT_GOALS_RATE, shares[-1]): arms[name_at(VANILLA, shares[-1])]}
        lines.append(horizons_of(arms | longest, AT_GOALS_RATE, shares))
    return lines


def faster_text(base: str, arms: Arms, arm: str, shares: Sequence[int]) -> str:
    """Return how many times faster an arm is than a base, in words."""
    return _faster_in_words(faster_than(base, arms, arm, shares), base, arms, arm, shares)


def _faster_in_words(found: Estimate, base: str, arms: Arms, arm: str, shares: Sequence[int]) -> str:
    above_at_once = is_above_at_once(horizons_of(arms, arm, shares), horizons_of(arms, base, shares))
    return in_words(found, above_at_once)


def _arm_names(arms: Arms) -> list[str]:
    """Return the arms without the lengths of their runs, in their order."""
    found: dict[str, None] = {}
    for name in arms:
        found[split_name(name)[0]] = None
    return list(found)


def in_time(found: Mapping[str, Arms], shares: Sequence[int]) -> Iterator[str]:
    """Yield what E1 decides."""
    yield from ("## E1: what may be said", "")
    yield from (ABOUT_TIME, "")
    yield from (*in_time_table(found, shares), "", *_mixed_runs(found))


def in_time_table(found: Mapping[str, Arms], shares: Sequence[int]) -> list[str]:
    """Return each arm's speed-up on each data set, and what follows from both."""
    mixed = any(_mixed_runs(found))
    rows = []
    for arm in _arm_names(next(iter(found.values()))):
        if arm in (VANILLA, AT_GOALS_RATE):
            continue
        estimates, cells = {}, []
        for data, arms in found.items():
            estimates[data] = faster_than(VANILLA, arms, arm, shares)
            cells.append(_faster_in_words(estimates[data], VANILLA, arms, arm, shares))
        said = UNDECIDED if mixed else sentence(arm, estimates)
        rank = "primary" if arm == PRIMARY_ARM else "secondary"
        rows.append([f"{arm} ({rank})", *cells, said])
    return markdown.table(["arm", *found, "so"], rows)


class OptimizerGain(NamedTuple):
    """Holds what an arm gains over vanilla under one optimizer."""

    arm: str
    optimizer: str
    gain: Interval
    # Corrected by Holm over the optimizers.
    p: float

    @property
    def adds(self) -> bool:
        """Return whether the arm is above vanilla."""
        return self.p < LEVEL and self.gain.mean > 0


def optimizer_gains(found: Mapping[str, Arms], arm: str) -> list[OptimizerGain]:
    """Return the gains of an arm under each optimizer."""
    gains = [gain(arms[arm], arms[VANILLA]) for arms in found.values()]
    return list(map(OptimizerGain, [arm] * len(found), found, gains, corrected(gains)))


def with_optimizers(found: Mapping[str, Arms]) -> Iterator[str]:
    """Yield what E3 decides."""
    yield from ("## E3: what may be said", "")
    primary = ""
    rows = []
    for arm in ("TrAct", "matched start, TrAct"):
        for each in optimizer_gains(found, arm):
            rows.append([arm, each.optimizer, each.gain.text("+"), p_text(each.p)])
            if (arm, each.optimizer) == ("TrAct", PRIMARY_OPTIMIZER):
                primary = ADDS if each.adds else NOT_SHOWN
    yield from markdown.table(["arm", "under", "points above vanilla", "p, over the optimizers"], rows)
    yield from ("", f"**Primary.** {primary}", "")


def _all_save_time(arms: Arms, shares: Sequence[int]) -> bool:
    """Return whether all layers are faster than the first alone, by the whole interval."""
    return faster_than(FIRST, arms, DEEPER, shares).low > 1


def in_layers(found: Mapping[str, Arms], shares: Sequence[int]) -> Iterator[str]:
    """Yield what E4 decides, by the ViT alone where it says no."""
    yield from ("## E4: what may be said", "")
    yield from (ABOUT_LAYERS, "")
    yield from layers_table(found, shares)
    mixed = list(_mixed_runs(found))
    verdict = "That all layers save time over the first alone is not shown: there is no such option."
    if mixed:
        verdict = UNDECIDED
    elif all(_all_save_time(arms, shares) for arms in found.values()):
        verdict = "All layers save time over the first alone on both models."
    yield from ("", f"**Primary.** {verdict}", "", *mixed)


def layers_table(found: Mapping[str, Arms], shares: Sequence[int]) -> list[str]:
    """Return what a step takes with each choice of layers, and how much faster that is than vanilla and the first."""
    rows = []
    for model, arms in found.items():
        for arm in _arm_names(arms):
            steps = [arms[name_at(arm, share)].milliseconds for share in shares]
            row = [model, arm, f"{np.mean(steps):.1f}"]
            for base in (VANILLA, FIRST):
                row.append("" if arm in (VANILLA, base) else faster_text(base, arms, arm, shares))
            rows.append(row)
    head = ["model", "layers", "milliseconds a step", "times as fast as vanilla", "as the first layer alone"]
    return markdown.table(head, rows)


def _mixed_runs(found: Mapping[str, Arms]) -> Iterator[str]:
    """Say where runs whose times are compared are not of one commit, machine and set of versions."""
    for name, arms in found.items():
        origins: dict[str, set[str]] = {}
        for arm in arms.values():
            for run in arm.runs.values():
                for what, value in _origin_of(run).items():
                    origins.setdefault(what, set()).add(value)
        for what, values in origins.items():
            if len(values) > 1:
                yield from (f"The runs of {name} are of several {what}: {', '.join(sorted(values))}.", "")


def _origin_of(run: RunRecord) -> dict[str, str]:
    return {
        "commits": run.commit,
        "machines": run.hardware,
        "versions": json.dumps(run.versions, sort_keys=True),
        "copies of the data": run.data,
    }
