"""The plan's questions are decided by its rules, and not before the last run."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from benchmarks.common.records import RunRecord, add_record
from benchmarks.common.statistics import Interval
from benchmarks.paper import report
from benchmarks.paper.evidence import EVIDENCE, STEP_SIZE_ARMS
from benchmarks.paper.summary import Arm, corrected
from benchmarks.paper.verdicts import LENT, MORE, NOT_MORE, RATE_CONTROLS, challengers, step_size

SEEDS = range(100, 110)
JOBS = list(EVIDENCE["evidence_step_size"].jobs("small"))


def record(job, top1):
    """A run whose last accuracy is `top1`."""
    epochs = job.config["epochs"]
    curve = {"top1": list(np.linspace(0.1, top1, epochs))}
    seconds = list(np.linspace(10.0, 150.0, epochs))
    made = RunRecord(job.key, job.arm, job.config, job.seed, curve, seconds, command="x")
    return dataclasses.replace(made, versions={"torch": "2"}, hardware="a CPU")


def made_up(**means):
    """The arms of E0, 0.5 and a little noise by seed; `means` are others by arm."""
    noise = np.random.default_rng(0).normal(0, 0.003, (len(STEP_SIZE_ARMS), len(SEEDS)))
    arms = {}
    for row, arm in zip(noise, STEP_SIZE_ARMS, strict=True):
        arms[arm] = Arm()
        for value, job in zip(row, (job for job in JOBS if job.arm == arm), strict=True):
            arms[arm].runs[job.seed] = record(job, means.get(arm, 0.5) + value)
    return arms


def test_the_controls_and_the_lent_layers_are_arms_of_the_plan():
    assert set(RATE_CONTROLS) | set(LENT) < set(STEP_SIZE_ARMS)
    assert all(STEP_SIZE_ARMS[name].get("no_tract") for name in (*RATE_CONTROLS, *LENT))


def test_tract_is_compared_with_the_best_control_on_the_test_images():
    arms = made_up(**{"TrAct": 0.52, "first rate x 0.2": 0.51, "first layer of TrAct": 0.54})
    verdict = step_size(arms)
    assert verdict.best_control == "first rate x 0.2"
    differences = arms["TrAct"].final - arms["first rate x 0.2"].final
    assert verdict.p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue / 2)
    assert verdict.sentence == MORE
    assert verdict.best_lent == "first layer of TrAct"
    gained = arms["TrAct"].final - arms["vanilla"].final
    room = arms["first layer of TrAct"].final - arms["vanilla"].final
    assert verdict.share.value == pytest.approx(gained.mean() / room.mean())
    assert verdict.share.low < verdict.share.value < verdict.share.high


def test_a_control_that_does_as_well_decides_against_tract():
    verdict = step_size(made_up(**{"TrAct": 0.52, "frozen first layer": 0.52, "first layer of TrAct": 0.54}))
    assert verdict.best_control == "frozen first layer"
    assert verdict.sentence == NOT_MORE
    below = step_size(made_up(**{"TrAct": 0.48}))
    assert below.p > 0.5
    assert below.sentence == NOT_MORE


def test_a_share_of_no_room_is_not_told():
    verdict = step_size(made_up(**dict.fromkeys(LENT, 0.5), TrAct=0.52))
    assert verdict.share is None
    assert "has no meaning" in "\n".join(verdict.lines())


def test_an_option_must_be_above_tract_with_and_without_the_start():
    none = "\n".join(challengers(made_up(**{"TrAct, grafted": 0.53, "matched start, TrAct": 0.53})))
    assert "None of them becomes an option." in none
    assert "| TrAct, grafted | +2.9 ± 0.3 | < 0.001 | " in none
    won = challengers(made_up(**{"TrAct, grafted": 0.53, "eigenvectors, lam 0.01": 0.45, "TrAct": 0.51}))
    assert won[-2] == "To be run on the flowers too: TrAct, grafted."
    assert len(won) == 2 + 4 + 3


def test_a_p_that_is_too_small_for_a_float_stays_0():
    differences = [Interval(5.0, 1e-9, 0.0), Interval(0.0, 0.0, None), Interval(1.0, 2.0, 0.3)]
    assert corrected(differences) == [0.0, 1.0, 0.6]


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setattr(report.plots, "curves", lambda title, settings, reference, path, timed: path)


def test_nothing_is_shown_before_the_last_run(tmp_path, no_plots):
    *first, last = JOBS
    path = tmp_path / "evidence.jsonl"
    for job in first:
        add_record(path, record(job, 0.5))
    text = report.write("small", path, tmp_path).read_text()
    assert f"{len(first)} of {len(JOBS)} runs are done. Nothing is decided" in text
    assert "| TrAct |" not in text
    add_record(path, record(last, 0.5))
    text = report.write("small", path, tmp_path).read_text()
    assert (tmp_path / "evidence.md").read_text() == text
    assert "| TrAct | 15 | 10 |" in text
    assert "| vanilla in 2/3 | 10 | 10 |" in text
    assert "**Primary.** The best rate control is" in text
