"""The fine-tuning example: any checkpoint on any images, and what it says of those that do not fit."""

import dataclasses
import json
import sys

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTImageProcessor

import pretrain_vit
import transfer
import transfer_matrix
from digits import digits
from hf_tract import TrActError
from hf_tract.integrations import TrainingRecord
from hf_tract.integrations.training_record import RECORD_FILE

STEM = "vit.embeddings.patch_embeddings.projection.weight"
FAST = ["--use_cpu", "--num_train_epochs", "1", "--per_device_train_batch_size", "16", "--disable_tqdm", "True"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny ViT of three classes that sees 16x16 pixels by its own mean and std."""
    folder = tmp_path_factory.mktemp("checkpoint")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=3, **shape)).save_pretrained(folder)
    processor = ViTImageProcessor(
        size={"height": 16, "width": 16}, image_mean=[0.2, 0.3, 0.4], image_std=[0.5, 0.6, 0.7]
    )
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path):
    """A folder of images by class, among them a grey one and one with transparency."""
    random = np.random.default_rng(0)
    for split, count in {"train": 16, "test": 8}.items():
        for label in ("a", "b"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                image = Image.fromarray(random.integers(0, 256, (20, 28, 3), dtype=np.uint8))
                image.convert({0: "L", 1: "RGBA"}.get(index, "RGB")).save(folder / f"{index}.png")
    return tmp_path / "images"


def run(monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["transfer.py", *FAST, *map(str, arguments)])
    transfer.main()
    return capsys.readouterr().out


def test_digits_are_fine_tuned_from_several_seeds(checkpoint, tmp_path, monkeypatch, capsys):
    options = ["--checkpoint", checkpoint, "--train_samples", "64", "--seeds", "2", "--output_dir", tmp_path / "out"]
    out = run(monkeypatch, capsys, *options)
    assert f"The head is made anew: {checkpoint} knows 3 classes, the data set has 10." in out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [result["seed"] for result in results] == [0, 1]
    assert "by seed" in out
    record = TrainingRecord.from_json_file(tmp_path / "out" / "seed-1" / RECORD_FILE)
    assert (record.seed, record.dataset, record.tract.lam) == (1, "digits", 0.1)
    assert record.metrics["accuracy"] == results[1]["eval_top1"]
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "seed-1")
    assert model.config.id2label[7] == "7"


def test_any_folder_of_images_trains_with_tract_or_without(checkpoint, images, tmp_path, monkeypatch, capsys):
    options = ["--checkpoint", checkpoint, "--dataset", images, "--output_dir"]
    run(monkeypatch, capsys, *options, tmp_path / "tract")
    run(monkeypatch, capsys, *options, tmp_path / "vanilla", "--no_tract")
    stems = [
        AutoModelForImageClassification.from_pretrained(tmp_path / arm).state_dict()[STEM]
        for arm in ("tract", "vanilla")
    ]
    assert (stems[0] - stems[1]).norm() > 0
    assert TrainingRecord.from_json_file(tmp_path / "vanilla" / RECORD_FILE).tract is None
    card = (tmp_path / "tract" / "README.md").read_text()
    assert str(tmp_path) not in card


def test_a_resumed_run_ends_in_the_same_weights(checkpoint, images, tmp_path, monkeypatch, capsys):
    options = ["--checkpoint", checkpoint, "--dataset", images, "--num_train_epochs", "2", "--save_strategy", "epoch"]
    run(monkeypatch, capsys, *options, "--output_dir", tmp_path / "whole")
    resume = ["--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-2"]
    run(monkeypatch, capsys, *options, "--output_dir", tmp_path / "resumed", *resume)
    states = [
        AutoModelForImageClassification.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "resumed")
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(
        states[0][STEM], AutoModelForImageClassification.from_pretrained(resume[1]).state_dict()[STEM]
    )


def test_images_are_normalised_as_the_checkpoint_says(checkpoint):
    look = transfer.preprocessing_of(transfer.load_processor(str(checkpoint)))
    assert look == (16, [0.2, 0.3, 0.4], [0.5, 0.6, 0.7])
    splits = transfer.Arguments().load()
    _, test = transfer.make_images(transfer.Arguments(), look, splits, 0)
    pixels, label = test[0]
    assert label == splits.test[0]["label"]
    back = pixels * torch.tensor(look.std)[:, None, None] + torch.tensor(look.mean)[:, None, None]
    assert back.min() >= -1e-6
    assert back.max() <= 1 + 1e-6
    assert (back[0] - back[1]).abs().max() < 1e-6  # grey


def test_a_frozen_first_layer_is_refused_with_tract_on_and_allowed_without(
    checkpoint, images, tmp_path, monkeypatch, capsys
):
    options = [
        "--checkpoint",
        checkpoint,
        "--dataset",
        images,
        "--output_dir",
        tmp_path / "out",
        "--freeze",
        "vit.embeddings.*",
    ]
    with pytest.raises(TrActError, match="which is frozen"):
        run(monkeypatch, capsys, *options)
    run(monkeypatch, capsys, *options, "--no_tract")
    before, after = (
        AutoModelForImageClassification.from_pretrained(f).state_dict()[STEM] for f in (checkpoint, tmp_path / "out")
    )
    assert (before == after).all()


# datasets leaves a file open that pillow cannot read
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_corrupt_image_is_named_and_refused_or_left_out(checkpoint, images, tmp_path, monkeypatch, capsys):
    broken = images / "train" / "a" / "3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    options = ["--checkpoint", checkpoint, "--dataset", images, "--output_dir", tmp_path / "out"]
    with pytest.raises(ValueError, match=r"image \d+ \(.*3\.png\) cannot be read"):
        run(monkeypatch, capsys, *options)
    out = run(monkeypatch, capsys, *options, "--corrupt_images", "skip")
    assert "Left out of the images for train, since they cannot be read:" in out
    assert "3.png" in out
    with pytest.raises(SystemExit, match="--corrupt_images ignore: it must be refuse or skip"):
        run(monkeypatch, capsys, *options, "--corrupt_images", "ignore")


def test_a_data_set_without_labels_is_refused(checkpoint, tmp_path, monkeypatch, capsys):
    data = digits()
    features = data["train"].features
    data["test"].select(range(4)).map(lambda row: {"label": -1}, features=features).to_parquet(
        tmp_path / "test.parquet"
    )
    data["train"].select(range(4)).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="has rows without a label in split 'test'"):
        run(monkeypatch, capsys, "--checkpoint", checkpoint, "--dataset", tmp_path, "--output_dir", tmp_path / "out")
    for split in ("train", "test"):
        data[split].select(range(4)).remove_columns("label").to_parquet(tmp_path / f"{split}.parquet")
    datasets.disable_caching()
    with pytest.raises(ValueError, match="has no column of type ClassLabel; name one of"):
        run(monkeypatch, capsys, "--checkpoint", checkpoint, "--dataset", tmp_path, "--output_dir", tmp_path / "out")
    datasets.enable_caching()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint", "no/such-model"], "--checkpoint no/such-model is no folder and no model that the Hub gives"),
        (["--hub_token", "hf_AbCdEfGh1234"], "--hub_token would stand in your shell's history: set HF_TOKEN"),
        (["--seeds", "2", "--resume_from_checkpoint", "x"], "are for one run: leave --seeds at 1"),
    ],
)
def test_what_cannot_be_is_refused_at_once(options, message, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match=message.replace("(", r"\(")) as error:
        run(monkeypatch, capsys, *options, "--output_dir", tmp_path / "out")
    assert "hf_AbCdEfGh1234" not in str(error.value)


def test_without_a_token_a_push_is_refused_before_the_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(TrActError, match=r"`repo_id` \(='me/x'\) cannot be pushed to without a token"):
        run(monkeypatch, capsys, "--push_to_hub", "--hub_model_id", "me/x", "--output_dir", tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["pretrain_vit.py", "--push_to_hub", "--hub_model_id", "me/x"])
    with pytest.raises(TrActError, match="without a token"):
        pretrain_vit.main()


def test_a_head_for_the_same_classes_stays(checkpoint):
    names = ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert transfer.head_of(str(checkpoint), names) == "The head is kept: 3 classes."
    assert transfer.head_of(str(checkpoint), ["a", "b", "c"]) == "The head is kept: 3 classes, though of other names."


def test_the_matrix_runs_each_cell_once_and_writes_table_and_plot(tmp_path, monkeypatch, capsys):
    """The runs are pretrain_vit.py's and transfer.py's, and tested with these; here they only leave a record."""
    done, record = [], TrainingRecord("x", "transformers", "y")

    def finish(what, todo, at_once):
        for work in todo:
            finish_one(*work.commands)
        return []

    def finish_one(command):
        done.append(command)
        folder = command[command.index("--output_dir") + 1]
        pretraining = "pretrain_vit.py" in command[1]
        folder = tmp_path / folder / "model" if pretraining else tmp_path / folder
        folder.mkdir(parents=True)
        gain = 0.1 * ("--no_tract" not in command) + 0.2 * ("pretrain-TrAct" in str(command))
        accuracy = 0.5 + gain + (0 if pretraining else 0.01 * int(command[command.index("--seed") + 1]))
        dataclasses.replace(record, metrics={"accuracy": accuracy}).to_json_file(folder / RECORD_FILE)

    monkeypatch.setattr(transfer_matrix, "run_all", finish)
    arguments = [
        "--pretrain_dataset",
        "photo_crops",
        "--datasets",
        "digits",
        "--seeds",
        "2",
        "--output_dir",
        str(tmp_path / "m"),
    ]
    monkeypatch.setattr(sys, "argv", ["transfer_matrix.py", *arguments, "--transfer_options", "--train_samples 9"])
    transfer_matrix.main()
    assert len(done) == 2 + 4 * 2
    assert all("--train_samples" in command for command in done[2:])
    lines = (tmp_path / "m" / "matrix.md").read_text().splitlines()
    assert lines[2] == "| digits | 50.5 ± 0.7 | 60.5 ± 0.7 | 70.5 ± 0.7 | 80.5 ± 0.7 |"
    assert lines[6] == "| digits | +20.0 ± 0.0 | +10.0 ± 0.0 | +30.0 ± 0.0 |"
    assert "50.0 % on photo_crops without TrAct and 80.0 % with it" in lines[-1]
    with Image.open(tmp_path / "m" / "matrix.png") as image:
        assert image.width > 400
    transfer_matrix.main()
    assert len(done) == 2 + 4 * 2


def test_the_matrix_ends_where_a_run_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["transfer_matrix.py", "--output_dir", str(tmp_path / "m")])
    monkeypatch.setattr(transfer_matrix, "run_all", lambda what, todo, at_once: ["why"])
    with pytest.raises(SystemExit, match="1 of 2 runs failed"):
        transfer_matrix.main()
