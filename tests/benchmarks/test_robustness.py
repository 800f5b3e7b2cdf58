"""Corruptions are what they are called, kept runs are tested once, and the table says what an arm loses."""

import argparse
import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchmetrics.classification import MulticlassCalibrationError

from benchmarks import robustness, robustness_results
from benchmarks.common.records import RunRecord, add_record, read_records
from benchmarks.common.statistics import interval
from benchmarks.paper.evidence import EVIDENCE
from benchmarks.paper.runner import write_recipe
from benchmarks.robustness import ARMS, CORRUPTIONS, SEEDS
from benchmarks.training.models import make_model

JOBS = [job for job in EVIDENCE["evidence_step_size"].jobs("smoke") if job.arm in ("vanilla", "TrAct")]
# So bright that brightness and contrast clip nothing.
PIXELS = 0.2 + 0.2 * torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def corrupted(pixels, name, strength):
    return robustness.corrupted(pixels, name, strength, torch.Generator().manual_seed(0))


def test_the_plans_runs_are_those_of_four_arms_and_five_seeds():
    jobs = list(robustness.jobs_of_the_plan())
    assert {(job.arm, job.seed) for job in jobs} == {(arm, seed) for arm in ARMS for seed in SEEDS}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption_grows_with_its_strength_and_is_the_same_each_time(name):
    distances = []
    for strength in CORRUPTIONS[name]:
        changed = corrupted(PIXELS, name, strength)
        assert changed.shape == PIXELS.shape
        assert 0 <= changed.min() <= changed.max() <= 1
        assert torch.equal(changed, corrupted(PIXELS, name, strength))
        distances.append(float((changed - PIXELS).square().mean()))
    assert distances == sorted(distances)
    assert distances[0] > 0


def test_corruptions_are_what_they_are_called():
    noise = corrupted(torch.full((50, 3, 32, 32), 0.5), "gaussian noise", 0.1) - 0.5
    assert float(noise.std()) == pytest.approx(0.1, rel=0.01)
    assert torch.allclose(corrupted(PIXELS, "brightness", 1.5), 1.5 * PIXELS)
    assert float(corrupted(PIXELS, "contrast", 0.5).std()) < 0.6 * float(PIXELS.std())
    blurred = corrupted(PIXELS, "gaussian blur", 1.0)
    assert torch.allclose(blurred.mean((2, 3)), PIXELS.mean((2, 3)), atol=0.01)
    assert float(blurred.std()) < 0.5 * float(PIXELS.std())


def test_no_two_images_have_the_same_noise():
    seen = []
    for name, corrupt in robustness.corruptions():
        if name == "gaussian noise":
            grey = torch.full((2, 3, 8, 8), 0.5)
            seen.append([*(corrupt(grey) - 0.5), *(corrupt(grey) - 0.5)])
    assert len(seen) == 5
    for images in seen:
        assert not any(torch.equal(images[0], other) for other in images[1:])


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The folders of two runs, as the runner keeps them, and the command that tests them."""
    for job in JOBS:
        folder = tmp_path / "runs" / job.key / "0"
        write_recipe(folder, dict(job.stages()[0]))
        torch.manual_seed(job.seed + len(job.arm))
        model = make_model(robustness.recipe_of(job, tmp_path / "runs"), [str(label) for label in range(20)])
        weights = folder / "checkpoints" / str(job.config["epochs"])
        weights.mkdir(parents=True)
        save_file(model.state_dict(), weights / "model.safetensors")
        images = robustness.read_images(job, argparse.Namespace(runs=tmp_path / "runs", dataset="photo_crops"))
        top1, _ = robustness.score(model.eval(), images, lambda pixels: pixels)
        (folder / "run.json").write_text(json.dumps({"curve": {"top1": [0.0, top1]}, **ORIGIN}))
    monkeypatch.setattr(robustness, "jobs_of_the_plan", lambda: iter(JOBS))
    arguments = ["--dataset", "photo_crops", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "x.jsonl")]
    monkeypatch.setattr(sys, "argv", ["robustness", *arguments])
    return tmp_path


def test_kept_runs_are_tested_once(kept, capsys):
    robustness.main()
    stored = read_records(kept / "x.jsonl")
    assert [record.arm for record in stored.values()] == [job.arm for job in JOBS]
    for record in stored.values():
        assert len(record.curve["clean"]) == len(record.curve["clean ECE"]) == 1
        assert all(len(record.curve[name]) == len(record.curve[f"{name} ECE"]) == 5 for name in CORRUPTIONS)
        assert all(0 <= value <= 1 for values in record.curve.values() for value in values)
        assert record.settings["trained"] == ORIGIN
    robustness.main()
    assert "All runs are tested already." in capsys.readouterr().out
    assert read_records(kept / "x.jsonl") == stored


def test_top1_and_calibration_are_those_of_the_whole_set(kept):
    images = robustness.read_images(JOBS[0], robustness.parse())
    model = make_model(robustness.recipe_of(JOBS[0], kept / "runs"), images.splits.names).eval()
    top1, error = robustness.score(model, images, lambda pixels: pixels)
    mean, std = (torch.tensor(values)[:, None, None] for values in (images.look.mean, images.look.std))
    with torch.no_grad():
        likely = model((images.pixels / 255 - mean) / std).logits.softmax(-1)
    assert top1 == pytest.approx(float((likely.argmax(-1) == images.labels).float().mean()))
    metric = MulticlassCalibrationError(len(images.splits.names), n_bins=15, norm="l1")
    assert error == pytest.approx(float(metric(likely, images.labels)), abs=1e-5)


def test_runs_without_weights_are_named(kept, monkeypatch):
    weights = robustness.weights_of(JOBS[1], kept / "runs")
    weights.unlink()
    with pytest.raises(SystemExit, match="lacks the weights of 1 of 2 runs, such as TrAct of seed 100"):
        robustness.main()


def test_weights_that_are_not_those_of_the_stored_run_are_refused(kept):
    file = kept / "runs" / JOBS[0].key / "0" / "run.json"
    file.write_text(json.dumps({"curve": {"top1": [0.9]}}))
    with pytest.raises(SystemExit, match=r"vanilla, seed 100: top-1 is 0\.\d+ here, and the run's own test says 0\.9"):
        robustness.main()


ORIGIN = {"commit": "abc", "hardware": "a CPU", "versions": {"torch": "2"}}
OLD = {"corruptions": {"jpeg": [80]}}


def record(arm, seed, clean, corrupted):
    curve = {"clean": [clean], "clean ECE": [clean / 10]}
    for name in CORRUPTIONS:
        curve[name] = [corrupted] * 5
        curve[f"{name} ECE"] = [0.05] * 5
    settings = {"corruptions": CORRUPTIONS}
    return RunRecord(f"{arm}{seed}", arm, settings, seed, curve, [1.0], command="x")


def test_an_arm_that_is_better_on_both_loses_no_less(tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.002, len(SEEDS))
    records = []
    for arm, shift in zip(ARMS, (0, 0.03, 0.01, 0.02), strict=True):
        for seed, draw in zip(SEEDS, noise, strict=True):
            corrupted = 0.4 + shift if arm != "matched start" else 0.37
            records.append(record(arm, seed, 0.5 + shift + draw * (1 + 10 * shift), corrupted))
    for each in records[1:]:
        add_record(tmp_path / "x.jsonl", each)
    assert robustness_results.read(tmp_path / "x.jsonl") == {}
    add_record(tmp_path / "x.jsonl", dataclasses.replace(records[0], key="a", seed=100))
    add_record(tmp_path / "x.jsonl", dataclasses.replace(records[0], key="b", settings=OLD))
    assert robustness_results.read(tmp_path / "x.jsonl") == {}
    add_record(tmp_path / "x.jsonl", records[0])
    arms = robustness_results.read(tmp_path / "x.jsonl")
    assert arms["vanilla"].seeds == list(SEEDS)
    found = {row[0]: row[1:] for row in robustness_results.rows(arms)}
    _, corrupted, gained, _, points, more_points, _, share, more_share, _ = found["TrAct"]
    assert gained == "+3.0 ± 0.0"
    lost = 10 + 100 * noise * 1.3
    assert (corrupted, points) == ("43.0 ± 0.0", interval(lost).text())
    assert more_points == interval(100 * noise * 0.3).text("+")
    vanilla_share = (10 + 100 * noise) / (40 + 100 * noise)
    assert share == interval(100 * lost / (43 + 100 * noise * 1.3)).text()
    assert more_share == interval(100 * (lost / (43 + 100 * noise * 1.3) - vanilla_share)).text("+")
    assert found["matched start"][5].startswith("+4.")
    assert found["matched start"][6] == "< 0.001"
    assert found["vanilla"][2:4] == found["vanilla"][5:7] == ["", ""]
    assert (
        robustness_results.sentence(arms, "matched start") == "Matched start loses more than vanilla to corruptions."
    )
    assert robustness_results.sentence(arms, "TrAct") == "That TrAct is more or less robust than vanilla is not shown."
    errors = robustness_results.error_rows(arms)
    assert errors[0] == ["vanilla", interval(5 + 10 * noise).text(), "", "", "5.0 ± 0.0", "", ""]
    assert errors[1][2] == interval(0.3 + 3 * noise).text("+")
    assert {len(row) for row in errors} == {len(robustness_results.ERROR_HEAD)}
    assert {len(row) for row in robustness_results.rows(arms)} == {len(robustness_results.HEAD)}
    by_corruption = robustness_results.rows_by_corruption(arms)
    assert {len(row) for row in by_corruption} == {len(robustness_results.CORRUPTION_HEAD)}
    assert by_corruption[0] == ["vanilla", *["40.0 ± 0.0"] * len(CORRUPTIONS)]
    assert by_corruption[2] == ["matched start, from vanilla", *["-3.0 ± 0.0"] * len(CORRUPTIONS)]
