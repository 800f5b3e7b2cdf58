"""Intervals of measured turns cover what they should, and are compared with a bound."""

import math

import numpy as np
import pytest

from benchmarks.common import bootstrap
from benchmarks.common.bootstrap import Estimate, median, one_plus_share, ratio_of_medians


def covered(estimate: Estimate, truth: float) -> bool:
    return estimate.low <= truth <= estimate.high


@pytest.fixture
def few_resamples(monkeypatch):
    monkeypatch.setattr(bootstrap, "RESAMPLES", 500)


def test_the_interval_covers_a_known_ratio_as_often_as_it_says(few_resamples):
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        noise = np.exp(0.03 * generator.standard_normal((15, 2)))
        hits += covered(median(1.01 * noise[:, 0] / noise[:, 1]), 1.01)
    assert 0.90 <= hits / 300 <= 0.99


def test_differences_are_compared_within_their_turns(few_resamples):
    """A disturbance that all arms of a turn share does not widen the interval of their ratio."""
    generator = np.random.default_rng(0)
    shared = 1 + generator.random((15, 1))
    pairs = np.array([[0.3, 1.0]]) * shared
    found = ratio_of_medians(pairs)
    assert found.low == pytest.approx(0.3)
    assert found.high == pytest.approx(0.3)


def test_noise_around_nothing_cannot_pass_a_bound(few_resamples):
    """Where torch_tract adds less than the noise, hf-tract's share of it is not known."""
    found = ratio_of_medians(np.array([[0.1, 1.0], [0.1, -1.0]] * 8))
    assert found.high == math.inf
    assert found.verdict(0.5) == "undecided"
    assert found.as_json()[2] is None


def test_a_step_is_judged_by_what_the_layer_adds(few_resamples):
    pattern = np.array([-1.0, 0.0, 1.0] * 4)
    whole = 2 + 0.1 * pattern
    added = 0.01 + 0.001 * pattern[::-1]
    found = one_plus_share(added, whole)
    assert covered(found, 1.005)
    assert found.verdict(1.01) == "pass"
    assert found.high - found.low < 0.002  # where the step's own noise is 0.05


@pytest.mark.parametrize(
    "low, high, verdict",
    [(0.9, 1.01, "pass"), (0.9, 1.011, "undecided"), (1.01, 1.1, "undecided"), (1.02, 1.1, "fail")],
)
def test_an_interval_passes_fails_or_does_not_decide(low, high, verdict):
    assert Estimate(1.0, low, high).verdict(1.01) == verdict


def test_the_same_turns_give_the_same_interval():
    turns = np.random.default_rng(0).random(9)
    assert median(turns) == median(turns)
