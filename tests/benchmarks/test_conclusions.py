"""What several experiments decide together is said by the plan's rules, and not before the last run."""

import numpy as np
import pytest
from scipy import stats

from benchmarks.common.records import RunRecord
from benchmarks.paper import conclusions
from benchmarks.paper.catalogue import ALL
from benchmarks.paper.choices import name_at
from benchmarks.paper.conclusions import (
    ADDS,
    NOT_SHOWN,
    UNDECIDED,
    faster_than,
    in_layers,
    in_time,
    lines,
    optimizer_gains,
    with_optimizers,
)
from benchmarks.paper.evidence_optimizers import OPTIMIZERS
from benchmarks.paper.evidence_time import AT_GOALS_RATE
from benchmarks.paper.experiment import Experiment
from benchmarks.paper.summary import Arm, holm
from benchmarks.paper.time_to_accuracy import NO_SPEED_UP

SEEDS = range(100, 108)
SHARES = (33, 47, 67, 100)
# In an epoch.
TEN_STEPS = {"train_samples": 320, "batch_size": 32}
NOISE = np.random.default_rng(0).normal(0, 0.002, len(SEEDS))


def arm_of_runs(top1, epochs=2, shares_of_noise=1.0, commit="abc"):
    """Runs whose epochs take a second each."""
    arm = Arm()
    seconds = list(map(float, range(1, epochs + 1)))
    for seed, draw in zip(SEEDS, NOISE, strict=True):
        curve = {"top1": [0.1] * (epochs - 1) + [top1 + shares_of_noise * draw]}
        arm.runs[seed] = RunRecord("key", "arm", TEN_STEPS, seed, curve, seconds, commit=commit)
    return arm


def timed(commit="abc", **gains):
    """Arms at four lengths, which gain a point with each length; `gains` are each arm's points above vanilla."""
    arms = {}
    for share in reversed(SHARES):
        for name, points in gains.items():
            top1 = 0.5 + 0.01 * SHARES.index(share) + points / 100
            arms[name_at(name.replace("_", " "), share)] = arm_of_runs(top1, share, commit=commit)
    return arms


def test_a_speed_up_is_said_for_both_data_sets_or_not_at_all():
    both = {
        "CIFAR-10": timed(vanilla=0, TrAct=1, matched_start=2),
        "flowers": timed(vanilla=0, TrAct=0, matched_start=1),
    }
    said = "\n".join(in_time(both, SHARES))
    assert f"| TrAct (primary) | 1.49 (1.49-1.49) | 1.00 (1.00-1.00) | {NO_SPEED_UP} |" in said
    assert "| matched start (secondary) | 2.13 (2.13-2.13) | 1.49 (1.49-1.49) | matched start: at least 1.49 " in said
    assert "| vanilla" not in said
    assert "several" not in said


def test_nothing_is_said_where_the_runs_of_a_data_set_are_of_several_commits():
    """Those of two data sets may be, whose times are not compared."""
    both = {"CIFAR-10": timed(vanilla=0, TrAct=1), "flowers": timed(commit="def", vanilla=0, TrAct=1)}
    assert "at least 1.49 times as fast" in "\n".join(in_time(both, SHARES))
    both["flowers"][name_at("TrAct", 33)] = arm_of_runs(0.5, 33, commit="abc")
    said = "\n".join(in_time(both, SHARES))
    assert "The runs of flowers are of several commits: abc, def." in said
    assert said.count(UNDECIDED) == 1
    assert "times as fast" not in said


def test_vanillas_runs_at_the_rate_of_its_longest_count_where_they_are_there_first():
    arms = timed(vanilla=0, TrAct=1)
    for share in SHARES[:-1]:
        # As accurate as the longest from the second length on.
        top1 = 0.5 if share == SHARES[0] else 0.53
        arms[name_at(AT_GOALS_RATE, share)] = arm_of_runs(top1, share)
    assert faster_than("vanilla", arms, "TrAct", SHARES).value == pytest.approx(47 / 67)
    said = "\n".join(in_time({"flowers": arms}, SHARES))
    assert "| TrAct (primary) | 0.70 " in said
    assert AT_GOALS_RATE not in said


def optimizers(**points):
    found = {}
    for number, name in enumerate(OPTIMIZERS):
        base = arm_of_runs(0.5)
        gained = arm_of_runs(0.5 + points.get(name, 0) / 100, shares_of_noise=1.5 + number / 10)
        found[name] = {"vanilla": base, "TrAct": gained, "matched start, TrAct": base}
    return found


def test_gains_are_corrected_over_the_optimizers():
    found = optimizers(adamw=3, muon_split=1, soap=-2)
    rows = optimizer_gains(found, "TrAct")
    plain = []
    for arms in found.values():
        plain.append(stats.ttest_rel(arms["TrAct"].final, arms["vanilla"].final).pvalue)
    assert [row.p for row in rows] == pytest.approx(holm(plain))
    assert {row.optimizer for row in rows if row.adds} == {"adamw", "muon_split"}


@pytest.mark.parametrize(("points", "said"), [(1, ADDS), (0, NOT_SHOWN), (-1, NOT_SHOWN)])
def test_the_primary_question_is_about_the_usual_muon(points, said):
    assert f"**Primary.** {said}" in "\n".join(with_optimizers(optimizers(adamw=3, muon_split=points, muon=3)))


@pytest.mark.parametrize(
    ("stage", "everything", "said"),
    [(0, 2, "All layers save time over"), (2, 0, "there is no such option"), (0, 1, "there is no such option")],
)
def test_all_layers_must_be_faster_than_the_first_alone_on_both_models(stage, everything, said):
    found = {
        "ViT": timed(vanilla=0, first_layer=1, and_first_block=0, all_layers=2),
        "ResNet-18": timed(vanilla=0, first_layer=1, and_first_stage=stage, all_layers=everything),
    }
    text = "\n".join(in_layers(found, SHARES))
    assert said in text
    assert "| ViT | all layers | 100.0 | 2.13 (2.13-2.13) |" in text
    assert "| ViT | first layer | 100.0 | 1.49 (1.49-1.49) |  |" in text
    assert "| ViT | vanilla | 100.0 |  |  |" in text


@pytest.mark.parametrize(
    ("everything", "resnet_done", "is_said"), [(0, False, True), (2, False, False), (2, True, True)]
)
def test_the_resnet_is_asked_only_where_all_layers_of_the_vit_save_time(monkeypatch, everything, resnet_done, is_said):
    whole = {"ViT": timed(vanilla=0, first_layer=1, all_layers=everything)}
    if resnet_done:
        whole["ResNet-18"] = whole["ViT"]
    monkeypatch.setattr(conclusions.evidence_layers, "SHARES", SHARES)

    def done(names, scale, have):
        return {name: whole[name] for name in names} if names.keys() <= whole.keys() else {}

    monkeypatch.setattr(conclusions, "_whole", done)
    said = list(lines("small", {}))
    assert bool(said) == is_said
    assert any("| ResNet-18 |" in line for line in said) == resnet_done


def test_nothing_is_said_before_the_last_run(monkeypatch):
    assert list(lines("small", {})) == []
    names = {f"evidence_{name}": name for name in OPTIMIZERS}
    have = {}
    for name in names:
        arms = {arm: {"optimizer": name, "arm": arm} for arm in ("vanilla", "TrAct", "matched start, TrAct")}
        made = Experiment("t", "cifar10_vit.yaml", {"": {}}, arms, {"epochs": 2}, {}, 8, 8, 100)
        monkeypatch.setitem(ALL, name, made)
        for job in made.jobs("small"):
            top1 = 0.5 + NOISE[job.seed - 100] * len(job.arm)
            have[job.key] = RunRecord(job.key, job.arm, {}, job.seed, {"top1": [top1]}, [1.0], command="x")
    last = have.pop(next(reversed(have)))
    assert list(lines("small", have)) == []
    have[last.key] = last
    said = list(conclusions.lines("small", have))
    assert said[0] == "## E3: what may be said"
    assert sum(line.startswith("| TrAct |") for line in said) == len(OPTIMIZERS)
