"""Seconds to an accuracy are read off the line through whole runs of several lengths, as the plan says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from benchmarks.common.bootstrap import Estimate
from benchmarks.common.records import RunRecord
from benchmarks.paper.choices import name_at
from benchmarks.paper.summary import Arm
from benchmarks.paper.time_to_accuracy import (
    NO_SPEED_UP,
    Horizons,
    horizons_of,
    in_words,
    is_above_at_once,
    seconds_to_reach,
    sentence,
    speed_up,
)

EPOCHS = (5, 7, 10, 15)
SEEDS = range(100, 108)


def runs(accuracies, seconds_an_epoch):
    """Eight seeds of each horizon, with a little noise by seed."""
    noise = np.random.default_rng(0).normal(0, 0.2, len(SEEDS))
    accuracy = np.array(accuracies)[None] + noise[:, None]
    seconds = seconds_an_epoch * np.tile(np.array(EPOCHS, float), (len(SEEDS), 1))
    return Horizons(seconds, accuracy)


def test_an_arm_that_is_as_accurate_in_fewer_epochs_is_as_much_faster_as_its_seconds_say():
    base = runs([50, 52, 54, 56], 1.0)
    arm = runs([52, 54, 56, 58], 1.2)
    found = speed_up(arm, base)
    assert found.value == pytest.approx(15 / 12)
    assert found.low == pytest.approx(found.value)


@pytest.mark.parametrize("accuracies", [[50, 52, 54, 56], [50, 56, 56, 56], [50, 52, 54.1, 54]])
def test_the_baseline_is_as_fast_as_itself_even_where_it_no_longer_rises(accuracies):
    base = runs(accuracies, 1.0)
    assert speed_up(base, base) == pytest.approx((1, 1, 1))


def test_the_interval_is_students_over_seeds():
    """For one straight line, whose ratio is that of seconds alone, it is the interval of their mean's logarithm."""
    base = runs([50, 52, 54, 56], 1.0)
    spread = np.random.default_rng(1).normal(1, 0.02, len(SEEDS))
    arm = Horizons(base.seconds * spread[:, None] / 1.5, base.accuracy)
    found = speed_up(arm, base)
    logs = np.log(spread)
    width = stats.t.ppf(0.975, len(SEEDS) - 1) * logs.std(ddof=1) / np.sqrt(len(SEEDS))
    assert found.value == pytest.approx(1.5 / spread.mean())
    assert np.log(found.high / found.value) == pytest.approx(width, rel=0.05)
    assert np.log(found.value / found.low) == pytest.approx(width, rel=0.05)


def test_a_speed_up_that_one_seed_decides_begins_at_nothing():
    base = runs([50, 52, 54, 56], 1.0)
    accuracy = base.accuracy - 1
    accuracy[0] += 9
    found = speed_up(Horizons(base.seconds, accuracy), base)
    assert found.value >= 1
    assert found[1:] == (0, np.inf)
    assert in_words(found) == f"{found.value:.2f}, and not reached without some of the seeds"


def test_where_a_line_jumps_the_interval_is_that_of_resampled_seeds():
    """No left-out seed shows that the base may reach its end a horizon before, but every sixth sample does."""
    base = runs([50, 52, 54, 54.5], 1.0)
    accuracy = base.accuracy.copy()
    accuracy[:, 2] += np.random.default_rng(2).permutation(np.linspace(-1.4, 1.4, len(SEEDS)))
    base = Horizons(base.seconds, accuracy)
    arm = runs([52, 54, 56, 58], 1.0)
    found = speed_up(arm, base)
    assert found.value > 15 / 8
    assert found.low < 10.5 / 7


def test_other_runs_of_the_base_count_where_they_are_there_first():
    base = runs([50, 52, 54, 56], 1.0)
    arm = runs([52, 54, 56, 58], 1.0)
    sooner = runs([50, 55.9, 55.9, 56], 1.0)
    later = runs([40, 42, 44, 46], 1.0)
    alone = speed_up(arm, base)
    assert alone.value == pytest.approx(15 / 10)
    assert speed_up(arm, base, later) == pytest.approx(alone)
    assert speed_up(arm, base, sooner) == pytest.approx(alone)
    there_first = runs([50, 56, 56, 56], 1.0)
    assert speed_up(arm, base, there_first).value == pytest.approx(7 / 10)


def test_an_arm_whose_shortest_run_is_above_the_goal_has_a_lower_bound():
    base, arm = runs([50, 52, 54, 56], 1.0), runs([57, 58, 59, 60], 1.0)
    assert is_above_at_once(arm, base)
    assert not is_above_at_once(runs([55, 58, 59, 60], 1.0), base)
    assert in_words(speed_up(arm, base), above_at_once=True) == "at least 3.00 (3.00-3.00)"


def test_what_is_never_reached_counts_as_nothing():
    base = runs([50, 52, 54, 56], 1.0)
    found = speed_up(runs([40, 42, 44, 46], 1.0), base)
    assert found == (0, 0, np.inf)
    assert in_words(found) == "not reached"


def test_between_two_horizons_the_line_is_taken_and_before_the_first_nothing_is_guessed():
    seconds = np.array([5.0, 7, 10, 15])
    accuracy = np.array([50.0, 52, 54, 56])
    for goal, expected in ((53.0, 8.5), (49.0, 5.0), (50.0, 5.0), (56.0, 15.0), (56.1, np.inf)):
        assert seconds_to_reach(goal, seconds, accuracy) == pytest.approx(expected)


@given(st.lists(st.floats(0, 100), min_size=4, max_size=4), st.floats(0, 100))
def test_seconds_are_those_of_a_plain_search(accuracies, goal):
    """The line need not rise everywhere: its first crossing counts."""
    seconds = [5.0, 7.0, 10.0, 15.0]
    expected = np.inf
    for second in np.linspace(5, 15, 10 * 1024 + 1):
        if np.interp(second, seconds, accuracies) >= goal:
            expected = second
            break
    share = 1 / 1024  # of the way, by which the line is searched
    found = seconds_to_reach(goal, np.array(seconds), np.array(accuracies))
    assert found == pytest.approx(expected, abs=10 * share)


def test_horizons_are_read_from_the_arms_by_their_names():
    arms = {}
    for epochs in EPOCHS:
        arm = arms[name_at("TrAct", epochs)] = Arm()
        for seed in SEEDS:
            curve = {"top1": [0.1] * (epochs - 1) + [epochs / 100]}
            arm.runs[seed] = RunRecord("key", "TrAct", {}, seed, curve, list(range(1, epochs + 1)), command="x")
    found = horizons_of(arms, "TrAct", EPOCHS)
    assert found.accuracy == pytest.approx(np.tile(EPOCHS, (len(SEEDS), 1)))
    assert found.seconds == pytest.approx(np.tile(EPOCHS, (len(SEEDS), 1)))


@given(st.integers(0, 1000))
def test_an_epoch_has_the_mean_seconds_of_all_lengths_and_a_start_stays_with_its_run(draw):
    """Of a seed and an arm; so noise of single runs is averaged, and nothing is lost."""
    noise = np.random.default_rng(draw)
    arms, spent, starts = {}, 0.0, []
    for epochs in EPOCHS:
        seconds = np.cumsum(noise.uniform(1, 2, epochs))
        seconds += noise.uniform(0, 9)
        starts.append(seconds[0])
        spent += seconds[-1]
        curve = {"top1": [0.1] * epochs}
        record = RunRecord("key", "TrAct", {}, 1, curve, list(seconds), command="x")
        arms[name_at("TrAct", epochs)] = Arm({1: record})
    (found,) = horizons_of(arms, "TrAct", EPOCHS).seconds
    an_epoch = (found - starts) / (np.array(EPOCHS) - 1)
    assert an_epoch == pytest.approx(an_epoch[0])
    assert found.sum() == pytest.approx(spent)


def test_a_speed_up_is_claimed_by_the_smaller_lower_end_and_only_if_both_are_above():
    both = {"CIFAR-10": Estimate(1.4, 1.3, 1.5), "flowers": Estimate(1.5, 1.2, 1.7)}
    assert sentence("TrAct", both) == "TrAct: at least 1.20 times as fast in time, on CIFAR-10 and flowers."
    assert "at least 1.15 times" in sentence("TrAct", both | {"flowers": Estimate(1.5, 1.1599, 1.7)})
    assert sentence("TrAct", both | {"flowers": Estimate(1.5, 1.1, 1.7)}) == NO_SPEED_UP
