"""The script that people copy: own images in each of their usual forms, and a model that loads without hf-tract."""

import csv
import io
import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import pipeline

import trainer_minimal
from hf_tract.cli.scale import Normalization
from hf_tract.integrations import TrainingRecord

WORDS = ("dark", "light")


def draw(number: int) -> Image.Image:
    """Return a grey image of a shape of its own, dark for even numbers and light for odd ones."""
    brightness = (60, 250)[number % 2]
    shape = (20 + number % 3, 24)
    return Image.fromarray(np.random.default_rng(number).integers(0, brightness, shape, dtype=np.uint8))


def class_folders(folder):
    for number in range(20):
        file = folder / WORDS[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        draw(number).save(file)


def split_folders(folder):
    for part in ("train", "validation"):
        class_folders(folder / part)


def metadata(folder):
    folder.mkdir()
    with (folder / "metadata.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "label"])
        for number in range(20):
            draw(number).save(folder / f"{number}.png")
            rows.writerow([f"{number}.png", WORDS[number % 2]])


def parquet_with_distant_numbers(folder):
    folder.mkdir()
    columns = {
        "image": [draw(number) for number in range(20)],
        "label": [7 + 2 * (number % 2) for number in range(20)],
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for part in ("train", "test"):
        rows = datasets.Dataset.from_dict(columns, features=features)
        rows.to_parquet(folder / f"{part}-00000-of-00001.parquet")


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["trainer_minimal.py", *map(str, arguments)])
    trainer_minimal.main()


# datasets leaves metadata.csv open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("write", [class_folders, split_folders, metadata, parquet_with_distant_numbers])
def test_each_form_of_images_is_split_and_has_its_classes(write, tmp_path, capsys):
    write(tmp_path / "images")
    args = trainer_minimal.parser.parse_args(["--dataset", str(tmp_path / "images")])
    splits = trainer_minimal.load_splits(args)
    names = splits["train"].features["label"].names
    is_parquet = write is parquet_with_distant_numbers
    assert names == (["7", "9"] if is_parquet else list(WORDS))
    held_out = write in (class_folders, metadata)
    assert (len(splits["train"]), len(splits["test"])) == ((16, 4) if held_out else (20, 20))
    assert ("set aside" in capsys.readouterr().out) == held_out
    for row in splits["test"]:
        is_light = np.asarray(row["image"]).mean() > 60
        assert row["label"] == is_light


def test_it_trains_a_model_that_loads_elsewhere_and_that_is_trained_on(tmp_path, monkeypatch, capsys):
    class_folders(tmp_path / "images")
    first = ["--dataset", tmp_path / "images", "--epochs", "2", "--output_dir", tmp_path / "model"]
    run(monkeypatch, *first)
    out = capsys.readouterr().out
    assert f"The model is in {tmp_path / 'model'}" in out
    assert "tract/grad_norm" in out
    assert TrainingRecord.from_json_file(next((tmp_path / "model").glob("*record*.json"))).tract.lam == 0.1
    classify = pipeline("image-classification", str(tmp_path / "model"))
    assert {answer["label"] for answer in classify(draw(0).convert("RGB"))} == set(WORDS)
    second = ["--dataset", tmp_path / "images", "--epochs", "1", "--output_dir", tmp_path / "tuned"]
    run(monkeypatch, *second, "--model", tmp_path / "model")
    assert (tmp_path / "tuned" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "the following arguments are required: --dataset"),
        (["--dataset", "IMAGES", "--lam", "-1"], "`lam` (=-1.0) must be"),
        (["--dataset", "IMAGES", "--label_column", "kind"], "kind"),
        (["--dataset", "IMAGES", "--model", "./nowhere"], "nowhere"),
        (["--dataset", "./nowhere"], "nowhere"),
        (["--dataset", "IMAGES", "--resume_from_checkpoint", "./nowhere"], "nowhere"),
        (["--dataset", "IMAGES", "--epochs", "0"], "--epochs 0: give a number above 0"),
        (["--dataset", "IMAGES", "--report_to", "nothing"], "nothing is not supported"),
        (["--dataset", "IMAGES", "--output_dir", "IMAGES/dark/0.png"], "0.png"),
    ],
    ids=str,
)
def test_wrong_options_are_told_in_one_line(arguments, says, tmp_path, monkeypatch, capsys):
    class_folders(tmp_path / "images")
    given = [each.replace("IMAGES", str(tmp_path / "images")) for each in arguments]
    with pytest.raises(SystemExit):
        run(monkeypatch, *given)
    assert says in capsys.readouterr().err.splitlines()[-1]


def test_a_data_set_without_training_images_is_told(tmp_path, monkeypatch, capsys):
    class_folders(tmp_path / "images" / "test")
    with pytest.raises(SystemExit):
        run(monkeypatch, "--dataset", tmp_path / "images")
    assert "has the splits test, and needs one named train" in capsys.readouterr().err


def test_images_that_two_splits_would_read_are_refused(tmp_path, monkeypatch, capsys):
    for part in ("train", "test"):
        class_folders(tmp_path / part)
        (tmp_path / part / WORDS[0]).rename(tmp_path / part / "train")
    with pytest.raises(SystemExit):
        run(monkeypatch, "--dataset", tmp_path)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "train/0.png would be read twice. A folder is a split if" in error


def test_pixels_of_a_new_model_are_standardised():
    processor, _ = trainer_minimal.load_model(None, list(WORDS))
    normalization = Normalization(tuple(processor.image_mean), tuple(processor.image_std))
    assert normalization.expected_mean_eigenvalue() == pytest.approx(1)


def test_a_run_begins_with_the_same_weights_each_time(tmp_path):
    class_folders(tmp_path / "images")
    options = ["--dataset", str(tmp_path / "images"), "--output_dir", str(tmp_path / "model")]
    args = trainer_minimal.parser.parse_args(options)
    first, second = (trainer_minimal.make_trainer(args) for _ in range(2))
    assert first.args.seed == 42
    assert torch.equal(first.model.classifier.weight, second.model.classifier.weight)


def test_sixteen_bits_are_refused_and_not_cut_off(tmp_path, monkeypatch, capsys):
    class_folders(tmp_path / "images")
    Image.fromarray(np.full((20, 20), 25700, np.uint16)).save(tmp_path / "images" / "dark" / "0.png")
    with pytest.raises(SystemExit):
        run(monkeypatch, "--dataset", tmp_path / "images", "--epochs", "1", "--output_dir", tmp_path / "model")
    says = capsys.readouterr().err
    assert "dark/0.png has 16 bits" in says
    assert "scale it to 8" in says


def cut_off(data: bytes) -> bytes:
    return data[:100]


def broken_inside(data: bytes) -> bytes:
    """Return a PNG whose pixels end in a chunk without a name, of which Pillow tells by a SyntaxError."""
    start, pixels = data[:33], data[41:45]
    return start + b"\0\0\0\4IDAT" + pixels + bytes(30)


def enormous(data: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    return buffer.getvalue()


# Pillow leaves it open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("corrupt", [cut_off, broken_inside, enormous])
def test_a_corrupt_file_is_named(tmp_path, monkeypatch, capsys, corrupt):
    class_folders(tmp_path / "images")
    file = tmp_path / "images" / "light" / "1.png"
    file.write_bytes(corrupt(file.read_bytes()))
    with pytest.raises(SystemExit):
        run(monkeypatch, "--dataset", tmp_path / "images", "--epochs", "1", "--output_dir", tmp_path / "model")
    assert "light/1.png cannot be read" in capsys.readouterr().err


def test_an_empty_cell_is_told(capsys):
    with pytest.raises(SystemExit):
        trainer_minimal.prepare({"image": [None], "label": [0]}, processor=None)
    assert "an image cannot be read" in capsys.readouterr().err


def test_one_class_is_none_to_tell_apart(tmp_path, monkeypatch, capsys):
    metadata(tmp_path / "images")
    table = tmp_path / "images" / "metadata.csv"
    table.write_text(table.read_text().replace(WORDS[1], WORDS[0]))
    with pytest.raises(SystemExit):
        run(monkeypatch, "--dataset", tmp_path / "images")
    assert "images has one class, dark: a classifier needs two or more" in capsys.readouterr().err


@pytest.mark.parametrize("labelled", [True, False])
def test_a_split_to_test_on_has_labels_and_any_usual_name(tmp_path, capsys, labelled):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(WORDS))})
    parts = {"train": [0, 1] * 10, "test": [-1] * 4}
    if labelled:
        parts["valid"] = [0, 1, 1]
    for name, labels in parts.items():
        images = [draw(number) for number in range(len(labels))]
        rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        (tmp_path / "data").mkdir(exist_ok=True)
        rows.to_parquet(tmp_path / "data" / f"{name}.parquet")
    lines = ["---", "configs:", "- config_name: default", "  data_files:"]
    for name in parts:
        lines += [f"  - split: {name}", f"    path: {name}.parquet"]
    (tmp_path / "data" / "README.md").write_text("\n".join([*lines, "---", ""]))
    splits = trainer_minimal.load_splits(trainer_minimal.parser.parse_args(["--dataset", str(tmp_path / "data")]))
    assert splits["test"]["label"][:] == [0, 1, 1] if labelled else len(splits["test"]) == 4
    assert ("set aside" in capsys.readouterr().out) is not labelled


def test_an_interrupted_run_goes_on_and_ends_in_the_weights_of_a_whole_one(tmp_path, monkeypatch):
    class_folders(tmp_path / "images")
    options = ["--dataset", tmp_path / "images", "--epochs", "2"]
    run(monkeypatch, *options, "--output_dir", tmp_path / "whole")

    class Cut(trainer_minimal.Trainer):
        def evaluate(self, *args, **kwargs):
            if self.state.epoch == 2:
                raise KeyboardInterrupt
            return super().evaluate(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(trainer_minimal, "Trainer", Cut)
        with pytest.raises(KeyboardInterrupt):
            run(monkeypatch, *options, "--output_dir", tmp_path / "cut")
    (checkpoint,) = (tmp_path / "cut").glob("checkpoint-*")
    run(monkeypatch, *options, "--output_dir", tmp_path / "cut", "--resume_from_checkpoint", checkpoint)
    ends = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
