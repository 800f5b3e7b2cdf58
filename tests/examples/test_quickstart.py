"""The main job, small: its arms, a table, a plot, and runs that are not run twice."""

import json
import sys

import datasets
import numpy as np
import pytest
from PIL import Image

import photo_crops
import quickstart
from comparison import epochs_to_reach

FAST = ["--epochs", "2", "--batch_size", "32", "--seeds", "1", "--model_config"]
TINY_VIT = json.dumps(
    {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "patch_size": 8}
)
TINY_CONVNEXT = json.dumps({"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2})


def run(monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *map(str, arguments)])
    quickstart.main()
    return " ".join(capsys.readouterr().out.split())


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def test_all_arms_run_once_and_leave_a_table_and_a_plot(tmp_path, monkeypatch, capsys):
    arguments = [*FAST, TINY_VIT, "--train_samples", "128", "--output_dir", tmp_path]
    out = run(monkeypatch, capsys, *arguments)
    assert "first layer vit.embeddings.patch_embeddings.projection" in out
    for phrase in (
        "vanilla's final test accuracy",
        "Final gain",
        "Time per training step",
        "TrAct, whitened start reaches",
        "Plot: ",
    ):
        assert phrase in out
    with Image.open(tmp_path / "comparison.png") as image:
        assert image.width > 400
    first = records(tmp_path)
    arms = ["vanilla", "TrAct", "TrAct, whitened start"]
    assert [(r["arm"], r["seed"], len(r["scores"])) for r in first] == [(arm, 0, 2) for arm in arms]
    assert ["whiten_init" in r["settings"] for r in first] == [False, False, True]
    assert out.count("tract/condition") == 4  # the logs of two epochs, in two arms of three
    assert set(first[0]["versions"]) >= {"torch", "transformers", "hf-tract"}
    again = run(monkeypatch, capsys, *arguments)
    assert records(tmp_path) == first
    assert "first layer" not in again


def test_another_model_trains_on_a_folder_of_images(tmp_path, monkeypatch, capsys):
    random = np.random.default_rng(0)
    for split, count in {"train": 24, "test": 8}.items():
        for name, brightness in {"dark": 80, "light": 255}.items():
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, brightness, (20, 28), dtype=np.uint8)  # grey, and not square
                Image.fromarray(pixels).save(folder / f"{index}.png")
    data = ["--dataset", tmp_path / "images", "--model", "convnext", "--image_size", "16"]
    run(monkeypatch, capsys, *FAST, TINY_CONVNEXT, *data, "--output_dir", tmp_path / "out")
    assert len(records(tmp_path / "out")) == 3


def test_other_models_have_their_own_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--model", "convnext", "--output_dir", str(tmp_path)])
    seen = []
    monkeypatch.setattr(quickstart, "compare", lambda *args: seen.append(args))
    monkeypatch.setattr(quickstart, "load_images", lambda args: quickstart.Data(None, None, []))
    quickstart.main()
    ((_, arms, *_),) = seen
    assert {arm["model_config"] for arm in arms.values()} == {"{}"}


def test_photo_crops_are_the_same_for_a_seed_and_apart_in_train_and_test():
    data = photo_crops.photo_crops(train_per_photo=4, test_per_photo=2)
    assert {name: len(split) for name, split in data.items()} == {"train": 80, "test": 40}
    assert data["train"].features["label"].names == photo_crops.PHOTOGRAPHS
    assert np.bincount(data["train"]["label"]).tolist() == [4] * 20
    made_again = photo_crops._split("train", 4, 0)
    for mine, theirs in zip(data["train"], made_again, strict=True):
        assert mine["label"] == theirs["label"]
        assert np.array_equal(mine["image"], theirs["image"])
    assert data["train"][0]["image"].size == (32, 32)
    assert isinstance(data, datasets.DatasetDict)


def test_a_quarter_of_the_cells_is_for_testing(monkeypatch):
    """Each crop lies in one cell of its split, and no cell is in both."""
    rows, columns = np.indices((480, 480)) // photo_crops.CELL
    numbered = np.repeat((rows * 10 + columns).astype(np.uint8)[:, :, None], 3, axis=2)
    monkeypatch.setattr(photo_crops, "_photograph", lambda name: numbered)
    cells = {}
    for split in ("train", "test"):
        crops = [np.asarray(crop["image"]) for crop in photo_crops._crops(0, split, 1000, 0)]
        assert all(crop.min() == crop.max() for crop in crops)
        cells[split] = {int(crop[0, 0, 0]) for crop in crops}
    assert len(cells["test"]) == 25
    assert len(cells["train"]) == 75
    assert not cells["train"] & cells["test"]


def test_help_names_every_option(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--help"])
    with pytest.raises(SystemExit):
        quickstart.main()
    out = capsys.readouterr().out
    assert all(f"--{name}" in out for name in quickstart.Arguments.__dataclass_fields__)


@pytest.mark.parametrize("target, epoch", [(0.5, 1), (0.65, 3), (0.9, None)])
def test_epochs_to_reach_counts_to_the_first_epoch_there(target, epoch):
    assert epochs_to_reach(np.array([0.5, 0.6, 0.7, 0.6]), target) == epoch
