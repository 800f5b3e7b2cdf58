"""The first script that users run: its arms, table and plot, runs that are not run twice, and wrong options."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import quickstart

FAST = ["--epochs", "2", "--batch_size", "32"]
TINY_VIT = json.dumps(
    {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "patch_size": 8}
)
TINY_CONVNEXT = json.dumps({"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2})
ARMS = ["vanilla", "TrAct", "TrAct, whitened start"]


@pytest.fixture(autouse=True)
def few_timed_steps(monkeypatch):
    monkeypatch.setattr(quickstart, "TIMED_ROUNDS", 5)
    monkeypatch.setattr(quickstart, "WARM_UP_ROUNDS", 1)


@pytest.fixture(scope="module")
def few_crops():
    """Keep the module's tests from decoding all 8000 crops each time."""
    crops = quickstart.photo_crops()
    assert {split: len(rows) for split, rows in crops.items()} == {"train": 6000, "test": 2000}
    for split, rows in crops.items():
        crops[split] = rows.shuffle(seed=0).select(range(96))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "photo_crops", lambda: crops)
        patch.setitem(quickstart.BUILT_IN, "photo_crops", lambda: crops)
        yield crops


def run(monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *map(str, arguments)])
    quickstart.main()
    return " ".join(capsys.readouterr().out.split())


def error_of(monkeypatch, capsys, *arguments) -> str:
    """Return the last line that a wrong command prints; there must be no traceback."""
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, capsys, *arguments)
    return str(stopped.value.code) if isinstance(stopped.value.code, str) else capsys.readouterr().err.splitlines()[-1]


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def test_all_arms_run_once_and_leave_a_table_and_a_plot(tmp_path, monkeypatch, capsys, few_crops):
    arguments = [*FAST, "--model_config", TINY_VIT, "--output_dir", tmp_path]
    out = run(monkeypatch, capsys, *arguments)
    for phrase in (
        "photo_crops: 96 training images, 96 test images, 20 classes",
        "Test accuracy on photo_crops in per cent",
        "TrAct: ",
        " points at the end; reaches vanilla's ",
        "median of 5 pairs of steps taken in turn, 95 % bootstrap interval",
        "Plot: ",
    ):
        assert phrase in out
    assert "±" not in out  # which one seed cannot give
    with Image.open(tmp_path / "comparison.png") as image:
        assert image.width > 400
    first = records(tmp_path)
    assert [(record["arm"], record["seed"], len(record["accuracy"])) for record in first] == [
        (arm, 0, 2) for arm in ARMS
    ]
    assert [record["settings"].get("whiten_init") for record in first] == [None, None, True]
    assert [record["settings"].get("lam") for record in first] == [None, 0.1, 0.1]
    assert out.count("tract/condition") == 4  # the logs of two epochs, in two arms of three
    assert set(first[0]["versions"]) >= {"torch", "transformers", "hf-tract"}
    again = run(monkeypatch, capsys, *arguments, "--seeds", "2")
    assert records(tmp_path)[:3] == first
    assert "seed 0:" not in again
    assert again.count("seed 1:") == 3
    assert "mean ± 95 % interval (t distribution) over 2 seeds" in again
    other_lam = run(monkeypatch, capsys, *arguments, "--lam", "0.2")
    assert [arm for arm in ARMS if f"{arm}, seed 0:" in other_lam] == ARMS[1:]


def test_another_model_trains_on_a_folder_of_images(tmp_path, monkeypatch, capsys):
    random = np.random.default_rng(0)
    for name, brightness in {"dark": 80, "light": 255}.items():
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for index in range(20):
            pixels = random.integers(0, brightness, (20, 28), dtype=np.uint8)  # grey, and not square
            Image.fromarray(pixels).save(folder / f"{index}.png")
    data = ["--dataset", tmp_path / "images", "--image_size", "16"]
    model = ["--model", "convnext", "--model_config", TINY_CONVNEXT]
    out = run(monkeypatch, capsys, *FAST, *model, *data, "--output_dir", tmp_path / "out")
    assert "32 training images, 8 test images, 2 classes" in out
    assert len(records(tmp_path / "out")) == 3


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--epochs", "0"], "--epochs 0: give a number above 0."),
        (["--lam", "-1"], "--lam -1.0: give a number above 0."),
        (["--learning_rate", "nan"], "--learning_rate nan: give a number above 0."),
        (["--train_samples", "-2"], "--train_samples -2: give 0 or more."),
        (["--epochs", "two"], "--epochs: invalid int value: 'two'"),
        (["--epoch_count", "2"], "there is no option --epoch_count"),
        (["--report_to", "paper"], "--report_to paper: give one of none, all, "),
        (["--model", "no/such-model"], "--model no/such-model must be a model type (vit, ...) or a checkpoint"),
        (["--model_config", "{"], '--model_config {: give JSON, such as \'{"hidden_size": 96'),
        (["--model_config", '{"hiden_size": 9}'], "--model_config: vit has no setting 'hiden_size'."),
        (["--model_config", '{"hidden_size": "big"}'], "--model vit cannot be made for images of --image_size 32: "),
        (["--image_size", "4"], "--model vit cannot be made for images of --image_size 4: "),
        (["--image_size", "100000"], "--image_size 100000: 96 images of that size do not fit into memory"),
        (["--dataset", "./nowhere"], "--dataset ./nowhere: there is no such folder."),
        (["--save_dataset", "x", "--dataset", "y"], "--save_dataset writes photo_crops alone"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_are_told_in_one_line(arguments, says, tmp_path, monkeypatch, capsys, few_crops):
    told = error_of(monkeypatch, capsys, *arguments, "--output_dir", tmp_path)
    assert says in told
    assert "\n" not in told


def test_the_crops_are_written_as_a_folder_that_is_read_as_the_same_images(tmp_path, monkeypatch, capsys, few_crops):
    folder = tmp_path / "crops"
    assert f"by --dataset {folder}" in run(monkeypatch, capsys, "--save_dataset", folder)
    read = quickstart.load_images(quickstart.Options(dataset=str(folder)))
    assert (len(read.train), len(read.test)) == (96, 96)
    assert sorted(quickstart.PHOTOGRAPHS) == read.names
    for number, row in enumerate(read.test):
        written = few_crops["test"][int(Path(row["image"]["path"]).stem)]
        assert read.names[row["label"]] == quickstart.PHOTOGRAPHS[written["label"]]
        assert np.array_equal(quickstart.read_image(read.test, number), written["image"])
    assert "is there already" in error_of(monkeypatch, capsys, "--save_dataset", folder)


def test_a_quarter_of_the_cells_is_for_testing():
    """Each crop lies in one cell of its split, and no cell is in both."""
    rows, columns = np.indices((480, 480)) // quickstart.CELL
    numbered = np.repeat((rows * 10 + columns).astype(np.uint8)[:, :, None], 3, axis=2)
    cells = {}
    for split in ("train", "test"):
        crops = [np.asarray(crop) for crop in quickstart.draw_crops(numbered, 0, split, 1000)]
        assert all(crop.min() == crop.max() for crop in crops)
        cells[split] = {int(crop[0, 0, 0]) for crop in crops}
    assert len(cells["test"]) == 25
    assert len(cells["train"]) == 75
    assert not cells["train"] & cells["test"]


def test_a_batch_is_augmented_image_by_image():
    torch.manual_seed(0)
    gradient = torch.arange(32).expand(3, 32, 32).to(torch.uint8) * 4 + 60
    batch = quickstart.augment(gradient.repeat(64, 1, 1, 1))
    assert batch.shape == (64, 3, 32, 32)
    assert batch.min() >= 0
    assert batch.max() <= 255
    centre = batch[:, 0, 16, 8:24]
    rising = (centre.diff() > 0).all(1)
    falling = (centre.diff() < 0).all(1)
    assert rising.sum() + falling.sum() == 64  # a flip turns the gradient around
    assert 16 < rising.sum() < 48
    steps = centre.diff().abs().mean(1)  # contrast and brightness scale it, each image's by its own numbers
    assert len(steps.unique()) == 64
    assert 4 * 0.7**2 <= steps.min() < 3 < 5 < steps.max() <= 4 * 1.3**2


def test_help_tells_each_option_and_what_it_is(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, "--help")
    out = " ".join(capsys.readouterr().out.split())
    for name in quickstart.Options.__dataclass_fields__:
        assert f"--{name}" in out
    assert "TrAct's damping. (default: 0.1)" in out


def test_the_interval_is_students():
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    assert quickstart.half_width(values) == pytest.approx(1.9632, abs=1e-4)  # 2.7764 * sqrt(2.5 / 5)
    assert quickstart.with_interval(values) == "3.0 ± 2.0"
    assert quickstart.with_interval(values[:1]) == "1.0"


def test_the_ratio_of_step_times_is_of_pairs():
    fast = np.linspace(0.01, 0.1, 60)
    sentence = quickstart.compare_step_times({"vanilla": fast, "TrAct": 1.5 * fast})
    assert "1.50 times" in sentence
    assert "interval 1.50 to 1.50" in sentence


@pytest.mark.parametrize("goal, epoch", [(0.5, 1), (0.65, 3), (0.9, None)])
def test_the_first_epoch_at_a_goal(goal, epoch):
    assert quickstart.first_epoch_at(np.array([0.5, 0.6, 0.7, 0.6]), goal) == epoch
