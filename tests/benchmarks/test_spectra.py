"""Spectra are split by time, every arm trains, and a stored run is not made again."""

import sys

import numpy as np
import pytest

from benchmarks import spectra, spectra_results
from benchmarks.common.records import RunRecord, add_record, read_records
from benchmarks.common.statistics import interval
from benchmarks.paper.summary import holm


@pytest.fixture(scope="module")
def parts():
    return spectra.load_parts()


def test_blocks_of_time_are_for_one_part_each(parts):
    sizes = {name: len(part.spectra) for name, part in parts.items()}
    assert sum(sizes.values()) == 1629
    assert sizes["train"] == pytest.approx(3 / 5 * 1629, rel=0.02)
    assert {part.targets.shape[1] for part in parts.values()} == {5}
    rows = [set(map(bytes, part.spectra)) for part in parts.values()]
    assert not rows[0] & rows[1]
    assert not rows[0] & rows[2]
    assert not rows[1] & rows[2]


def test_what_is_standardised_is_so_on_the_training_blocks_alone(parts):
    train = parts["train"]
    assert train.spectra.mean() == pytest.approx(0, abs=1e-9)
    assert train.spectra.std() == pytest.approx(1)
    assert train.targets.std(0) == pytest.approx(np.ones(5))
    assert abs(parts["test"].targets.mean(0)).max() > 1e-3


def test_partial_least_squares_sees_more_than_the_mean(parts):
    curve, _ = spectra.fit_pls(parts)
    nothing = np.sqrt(np.mean(parts["test"].targets ** 2))
    assert curve["error"][0] < 0.7 * nothing


@pytest.fixture
def few(parts, monkeypatch):
    """A few spectra of each part."""
    small = {name: spectra.Part(part.spectra[::16], part.targets[::16]) for name, part in parts.items()}
    monkeypatch.setattr(spectra, "load_parts", lambda: small)
    monkeypatch.setattr(spectra, "MOST_COMPONENTS", 3)


def run(monkeypatch, folder, *options):
    arguments = ["--results", str(folder / "x.jsonl"), "--epochs", "2", *options]
    monkeypatch.setattr(sys, "argv", ["spectra", *arguments])
    monkeypatch.chdir(folder)
    spectra.main()
    return list(read_records(folder / "x.jsonl").values())


def test_no_final_run_is_made_before_the_rate_is_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(spectra, "CHOSEN_RATE", None)
    with pytest.raises(SystemExit, match="The rate is not chosen yet"):
        run(monkeypatch, tmp_path)


def test_every_arm_trains_and_no_run_is_made_twice(few, tmp_path, monkeypatch):
    monkeypatch.setattr(spectra, "CHOSEN_RATE", 1e-3)
    made = run(monkeypatch, tmp_path, "--seeds", "1")
    assert [record.arm for record in made] == [*spectra.ARMS, spectra.PLS]
    for record in made[:-1]:
        assert len(record.curve["error"]) == len(record.seconds) == 2
        assert record.seconds == sorted(record.seconds)
        assert record.seed == 100
    ends = {record.curve["error"][-1] for record in made}
    assert len(ends) == 5
    monkeypatch.setattr(spectra, "train", None)
    assert run(monkeypatch, tmp_path, "--seeds", "1") == made


def test_the_rate_is_chosen_on_other_blocks_by_other_seeds(few, tmp_path, monkeypatch):
    made = run(monkeypatch, tmp_path, "--tune")
    assert [record.settings["rate"] for record in made] == 3 * list(spectra.RATES)
    assert {(record.arm, record.settings["part"]) for record in made} == {("vanilla", "validation")}
    assert not {record.seed for record in made} & set(range(100, 108))


def record(arm, seed, error, part="test", rate=spectra.CHOSEN_RATE, epochs=spectra.EPOCHS):
    settings = spectra.settings_of(rate, epochs, part)
    key = f"{arm}{seed}{part}{rate}{epochs}"
    return RunRecord(key, arm, settings, seed, {"error": [1.0, error]}, [1.0, 2.0], command="x")


def test_the_table_compares_seed_by_seed(tmp_path):
    path = tmp_path / "x.jsonl"
    noise = np.random.default_rng(0).normal(0, 0.01, 8)
    better = dict(zip(spectra.ARMS, (0, 0.05, 0.0, 0.02), strict=True))
    for seed, draw in enumerate(noise, 100):
        for number, (arm, gained) in enumerate(better.items()):
            add_record(path, record(arm, seed, 0.5 + draw * (1 + number) - gained))
    add_record(path, record(spectra.PLS, 0, 0.4))
    add_record(path, record("vanilla", 50, 0.9, "validation", 2e-3))
    add_record(path, record("vanilla", 50, 0.8, "validation", 1e-3))
    # Not the plan's.
    add_record(path, record("TrAct", 100, 0.1, rate=1e-3))
    add_record(path, record("TrAct", 100, 0.1, epochs=2))
    add_record(path, record("TrAct", 108, 0.1))
    add_record(path, record("vanilla", 100, 0.1, "validation", 2e-3))
    runs = spectra_results.read(path, "test")
    found = {row[0]: dict(zip(spectra_results.HEAD, row, strict=True)) for row in spectra_results.rows(runs)}
    assert list(found) == [*spectra.ARMS, spectra.PLS]
    changes = [interval(noise * number - gained) for number, gained in enumerate(better.values())][1:]
    told = [found[arm]["from vanilla"] for arm in list(better)[1:]]
    assert told == [f"{each.mean:+.3f} ± {each.half_width:.3f}" for each in changes]
    first, *others = holm([each.p for each in changes])
    assert first < 0.001
    told = ["< 0.001", *(f"{p:.3f}" for p in others)]
    assert [found[arm]["p"] for arm in list(better)[1:]] == told
    assert found[spectra.PLS]["test error"] == "0.400"
    validation = spectra_results.read(path, "validation")
    assert spectra_results.rate_rows(validation) == [["vanilla's error", "0.800", "0.900"]]


def test_the_chosen_rate_is_the_best_of_the_stored_ones():
    validation = spectra_results.read(spectra.RESULTS, "validation")
    means = {}
    for rate in spectra.RATES:
        of_rate = [each for each in validation["vanilla"] if each.settings["rate"] == rate]
        assert [each.seed for each in of_rate] == list(spectra.TUNING_SEEDS)
        means[rate] = spectra_results.errors(of_rate).mean()
    assert min(means, key=means.get) == spectra.CHOSEN_RATE
