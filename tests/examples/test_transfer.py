"""The fine-tuning example: any checkpoint on any images, and what it says of those that do not fit."""

import json
import re
import shutil
import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForImageClassification,
    CLIPImageProcessor,
    TimmWrapperImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    YolosConfig,
)

import detect_voc
import pretrain_vit
import quickstart
import transfer
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
    assert f"The head is new: {checkpoint} knows 3 classes, the data set has 10." in out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [result["seed"] for result in results] == [0, 1]
    first, second = (100 * result["eval_top1"] for result in results)
    half = 12.706 * abs(first - second) / 2  # Student's t for one degree of freedom, times the mean's error
    assert f"top-1 {(first + second) / 2:.1f} % ± {half:.1f} (95 % interval of the mean), by seed" in out
    assert f"python push_to_hub.py {tmp_path / 'out' / 'seed-1'}" in out
    record = TrainingRecord.from_json_file(tmp_path / "out" / "seed-1" / RECORD_FILE)
    assert (record.seed, record.dataset, record.tract.lam) == (1, "digits", 0.1)
    assert record.metrics["accuracy"] == results[1]["eval_top1"]
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "seed-1")
    assert model.config.id2label[7] == "7"


def test_any_folder_of_images_trains_with_tract_or_without(checkpoint, images, tmp_path, monkeypatch, capsys):
    options = ["--checkpoint", checkpoint, "--dataset", images, "--output_dir"]
    run(monkeypatch, capsys, *options, tmp_path / "tract", "--lam", "0.02")
    run(monkeypatch, capsys, *options, tmp_path / "vanilla", "--no_tract")
    assert TrainingRecord.from_json_file(tmp_path / "tract" / RECORD_FILE).tract.lam == 0.02
    stems = [
        AutoModelForImageClassification.from_pretrained(tmp_path / arm).state_dict()[STEM]
        for arm in ("tract", "vanilla")
    ]
    assert (stems[0] - stems[1]).norm() > 0
    assert TrainingRecord.from_json_file(tmp_path / "vanilla" / RECORD_FILE).tract is None
    card = (tmp_path / "tract" / "README.md").read_text()
    assert str(tmp_path) not in card


def test_a_resumed_run_ends_in_the_same_weights(checkpoint, images, tmp_path, monkeypatch, capsys):
    options = ["--checkpoint", checkpoint, "--dataset", images, "--num_train_epochs", "2"]
    options += ["--save_strategy", "steps", "--save_steps", "3"]  # within the second epoch
    run(monkeypatch, capsys, *options, "--output_dir", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    resume = ["--resume_from_checkpoint", "latest"]
    run(monkeypatch, capsys, *options, "--output_dir", tmp_path / "resumed", *resume)
    states = [
        AutoModelForImageClassification.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "resumed")
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(
        states[0][STEM],
        AutoModelForImageClassification.from_pretrained(tmp_path / "whole" / "checkpoint-3").state_dict()[STEM],
    )


def test_the_scores_are_those_of_the_best_weights_which_are_saved(checkpoint, images, tmp_path, monkeypatch, capsys):
    options = ["--checkpoint", checkpoint, "--dataset", images, "--num_train_epochs", "3", "--learning_rate", "0.01"]
    # The weights with the highest loss count as the best, so that they are not the last ones.
    best = ["--load_best_model_at_end", "True", "--metric_for_best_model", "loss", "--greater_is_better", "True"]
    out = tmp_path / "out"
    said = run(monkeypatch, capsys, *options, *best, "--save_strategy", "epoch", "--output_dir", out)
    assert "The best weights are chosen on test, so their score there is too high" in said
    state = json.loads((out / "checkpoint-6" / "trainer_state.json").read_text())
    folder = state["best_model_checkpoint"]
    assert not folder.endswith("checkpoint-6")
    saved = AutoModelForImageClassification.from_pretrained(out).state_dict()
    expected = AutoModelForImageClassification.from_pretrained(folder).state_dict()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    (result,) = json.loads((out / "results.json").read_text())
    assert result["eval_loss"] == pytest.approx(state["best_metric"], rel=1e-5)
    record = TrainingRecord.from_json_file(out / RECORD_FILE)
    assert record.metrics["accuracy"] == result["eval_top1"]


def test_a_run_without_tests_is_tested_before_its_card_is_written(checkpoint, images, tmp_path, monkeypatch, capsys):
    options = ["--checkpoint", checkpoint, "--dataset", images, "--eval_strategy", "no"]
    run(monkeypatch, capsys, *options, "--output_dir", tmp_path / "out")
    (result,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert TrainingRecord.from_json_file(tmp_path / "out" / RECORD_FILE).metrics["accuracy"] == result["eval_top1"]


def photographs(count: int = 2, height: int = 40, width: int = 64) -> datasets.Dataset:
    """Return rows of images that are not square."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    columns = {"image": [Image.fromarray(image) for image in pixels], "label": list(range(count))}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict(columns, features=features).cast_column("image", datasets.Image(decode=False))


SCALE = {"image_mean": [0.2, 0.3, 0.4], "image_std": [0.5, 0.6, 0.7]}
PROCESSORS = {
    "squashes": ViTImageProcessor(size={"height": 16, "width": 16}, **SCALE),
    "crops": CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 16, "width": 16}, **SCALE),
    "timm": TimmWrapperImageProcessor(
        {"input_size": [3, 16, 16], "crop_pct": 0.7, "mean": SCALE["image_mean"], "std": SCALE["image_std"]}
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_images_are_prepared_by_the_checkpoint_s_own_processor(name):
    processor = PROCESSORS[name]
    rows = photographs()
    data = transfer.ImageData(rows, rows, ["0", "1"], "test")
    train, test = transfer.make_images(transfer.Arguments(), processor, data, 0)
    for index in range(2):
        image = transfer.read_image(rows, index)
        assert torch.equal(test[index][0], processor(image, return_tensors="pt")["pixel_values"][0])
    mean, std = (torch.tensor(SCALE[name])[:, None, None] for name in ("image_mean", "image_std"))
    pixels = train[0][0] * std + mean
    assert pixels.shape == (3, 16, 16)
    assert 255 * pixels == pytest.approx((255 * pixels).round(), abs=1e-3)  # 8 bits, of which none is cut off
    assert 0 <= pixels.min() < 0.3 < 0.7 < pixels.max() <= 1


def test_a_processor_that_leaves_images_of_several_shapes_is_refused():
    processor = ViTImageProcessor(size={"shortest_edge": 16})
    rows = photographs()
    with pytest.raises(SystemExit, match=r"must make images of one size, and makes \(3, 16, 24\) of a wide one"):
        transfer.make_images(transfer.Arguments(), processor, transfer.ImageData(rows, rows, ["0", "1"], "test"), 0)


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
    with pytest.raises(SystemExit, match="which is frozen"):
        run(monkeypatch, capsys, *options)
    run(monkeypatch, capsys, *options, "--no_tract")
    before, after = (
        AutoModelForImageClassification.from_pretrained(f).state_dict()[STEM] for f in (checkpoint, tmp_path / "out")
    )
    assert (before == after).all()


def test_a_corrupt_image_is_named_and_refused_or_left_out(checkpoint, images, tmp_path, monkeypatch, capsys):
    broken = images / "train" / "a" / "3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    options = ["--checkpoint", checkpoint, "--dataset", images, "--output_dir", tmp_path / "out"]
    for workers in ("0", "1"):
        with pytest.raises(SystemExit, match=r"a/3\.png cannot be read .* --corrupt_images skip") as error:
            run(monkeypatch, capsys, *options, "--dataloader_num_workers", workers)
        assert "\n" not in str(error.value)
    out = run(monkeypatch, capsys, *options, "--corrupt_images", "skip")
    assert f"Left out: {broken} cannot be read" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint", "no/such-model"], "--checkpoint no/such-model is no folder and no model that the Hub gives"),
        ([], "--checkpoint outputs/pretrain_vit/model is not there: run pretrain_vit.py first, or name another"),
        (["--checkpoint", "x", "--hub_token", "hf_AbCdEfGh1234"], "--hub_token would stand in your shell's history"),
        (
            ["--checkpoint", "x", "--seeds", "2", "--resume_from_checkpoint", "x"],
            "are for one run: leave --seeds at 1",
        ),
        (
            ["--checkpoint", "x", "--resume_from_checkpoint", "x"],
            "--resume_from_checkpoint x: there is no such folder",
        ),
        (["--checkpoint", "x", "--resume_from_checkpoint", "latest"], "latest: there is no checkpoint in out."),
        (["--lam", "0"], "--lam 0.0: give a number above 0"),
        (["--seeds", "0"], "--seeds 0: give a number above 0"),
        (["--flip", "1.5"], "--flip 1.5: give at most 1"),
        (["--learning_rate", "-1"], "--learning_rate -1.0: give a number above 0"),
        (["--checkpoint", "x", "--load_best_model_at_end"], "These options do not fit: "),
        (
            ["--checkpoint", "CHECKPOINT", "--do_train", "--do_predict"],
            "--do_predict has no use here: this script trains, tests",
        ),
        (["--checkpoint", "CHECKPOINT", "--prediction_loss_only"], "--prediction_loss_only has no use here"),
        (
            ["--checkpoint", "CHECKPOINT", "--freeze", "vit.emebddings.*"],
            "--freeze vit.emebddings.* matches no parameter",
        ),
        (["--checkpoint", "CHECKPOINT", "--dataset", "/no/folder"], "--dataset /no/folder: there is no such folder"),
        (["--checkpoint", "DETECTOR"], "detector cannot be loaded as a classifier of images: "),
        (
            ["--checkpoint", "CHECKPOINT", "--resume_from_checkpoint", "empty"],
            "--resume_from_checkpoint empty cannot be loaded as a classifier of images: ",
        ),
    ],
)
def test_what_cannot_be_is_refused_at_once_in_one_line(checkpoint, options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folders = {"CHECKPOINT": str(checkpoint)}
    (tmp_path / "empty").mkdir()
    if "DETECTOR" in options:
        folders["DETECTOR"] = str(shutil.copytree(checkpoint, tmp_path / "detector"))
        YolosConfig().save_pretrained(tmp_path / "detector")
    given = [folders.get(option, option) for option in options]
    with pytest.raises(SystemExit, match=re.escape(message)) as error:
        run(monkeypatch, capsys, *given, "--output_dir", "out")
    assert "hf_AbCdEfGh1234" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_written_to_is_told_before_the_training(tmp_path, monkeypatch):
    def refuse(dir):
        raise OSError(30, "Read-only file system")

    for script in (transfer, pretrain_vit, quickstart, detect_voc):
        with monkeypatch.context() as patched:
            patched.setattr(script.tempfile, "TemporaryFile", refuse)
            with pytest.raises(SystemExit, match=r"^--output_dir .*new cannot be written to: .*Read-only file system"):
                script.make_folder(tmp_path / "new")
        script.make_folder(tmp_path / "new")


def test_an_option_that_there_is_not_is_told_without_a_list_of_all(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, "--lambda", "1")
    assert capsys.readouterr().err.splitlines()[1:] == ["transfer.py: error: there is no option --lambda"]


def test_without_a_token_a_push_is_refused_before_the_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    push = ["--push_to_hub", "--hub_model_id", "me/x", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"^me/x cannot be pushed to without a token: set HF_TOKEN or run `hf auth"):
        run(monkeypatch, capsys, "--checkpoint", "x", *push)
    monkeypatch.setattr(sys, "argv", ["pretrain_vit.py", *push])
    with pytest.raises(SystemExit, match=r"^me/x cannot be pushed to without a token"):
        pretrain_vit.main()


def test_a_hub_that_refuses_the_repository_is_told_in_one_line(checkpoint, tmp_path, monkeypatch, capsys):
    """Trainer makes it before the training."""
    answer = SimpleNamespace(headers={}, request=None, status_code=403)

    def fine_tune(args, training, data):
        raise HfHubHTTPError("Forbidden:\nyou may not create it", response=answer)

    monkeypatch.setattr(transfer, "fine_tune", fine_tune)
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    push = ["--push_to_hub", "--hub_model_id", "somebody/x", "--output_dir", tmp_path / "out"]
    with pytest.raises(SystemExit, match=r"^--push_to_hub: Forbidden: you may not create it"):
        run(monkeypatch, capsys, "--checkpoint", checkpoint, *push)


def test_a_head_for_the_same_classes_stays(checkpoint):
    names = ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert transfer.describe_head(str(checkpoint), names) == "The head is kept: 3 classes."
    kept = "The head is kept, though its 3 classes have other names or another order: it learns them anew."
    for others in (["a", "b", "c"], names[::-1]):
        assert transfer.describe_head(str(checkpoint), others) == kept


def test_a_checkpoint_without_a_head_gets_one(tmp_path):
    """Of two classes, as many as transformers notes for it."""
    ViTConfig(architectures=["ViTModel"]).save_pretrained(tmp_path)
    told = transfer.describe_head(str(tmp_path), ["a", "b"])
    assert told == f"The head is new: {tmp_path} has none for images."


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path):
    for number in (9, 10, 11, "best"):
        (tmp_path / f"checkpoint-{number}").mkdir()
    for number in (9, 10, "best"):
        (tmp_path / f"checkpoint-{number}" / "trainer_state.json").touch()
    assert transfer.find_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_images_are_decoded_once_and_drawn_anew_in_each_epoch(monkeypatch):
    images = transfer.AugmentedImages(photographs(), draw_number)
    first = images[1][0]
    monkeypatch.delattr(transfer, "read_image")
    assert images[1][0] == first
    images.set_epoch(1)
    assert images[1][0] != first


def test_a_worker_process_keeps_no_images(monkeypatch):
    monkeypatch.setattr(transfer, "get_worker_info", object)
    images = transfer.AugmentedImages(photographs(), draw_number)
    assert images[1] == images[1]
    assert not images.decoded


def test_workers_that_outlive_an_epoch_draw_anew_in_the_next():
    images = transfer.AugmentedImages(photographs(), draw_number)
    loader = DataLoader(images, num_workers=1, persistent_workers=True)
    drawn = []
    for epoch in range(2):
        images.set_epoch(epoch)
        drawn.append([number.item() for number, _ in loader])
        assert drawn[epoch] == [number.item() for number, _ in images]
    assert not set(drawn[0]) & set(drawn[1])


def draw_number(image: Image.Image) -> torch.Tensor:
    return torch.rand(())


def test_each_run_of_wandb_ends_before_the_next_training(checkpoint, tmp_path, monkeypatch, capsys):
    events = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(finish=lambda: events.append("finish")))

    def fine_tune(args, training, data):
        events.append(training.seed)
        return {"eval_top1": 0.5}

    monkeypatch.setattr(transfer, "fine_tune", fine_tune)
    (tmp_path / "out").mkdir()
    run(monkeypatch, capsys, "--checkpoint", checkpoint, "--seeds", "2", "--output_dir", tmp_path / "out")
    assert events == [0, "finish", 1, "finish"]
