"""The accelerate example: any model from a recipe, resumed anywhere, on one process or two."""

import dataclasses
import functools
import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import timm
import torch
import yaml
from accelerate import Accelerator, PartialState
from huggingface_hub import ModelCard
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoImageProcessor, AutoModelForImageClassification

import pretrain_vit
from helpers.environments import reset_accelerate
from helpers.oracle import assert_close
from helpers.ranks import on_two_ranks
from hf_tract.integrations import TrainingRecord
from hf_tract.integrations.training_record import RECORD_FILE
from pretrain_vit import Recipe

pretrain_vit.BUILT_IN["photo_crops"] = functools.cache(pretrain_vit.photo_crops)  # made once for all runs here
EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "patch_size": 8}
TINY_DINO = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 1, "patch_size": 8}
FAST = [
    *(["--cpu"] if torch.accelerator.is_available() else []),
    *("--epochs", "2", "--train_samples", "128", "--test_samples", "100", "--batch_size", "16"),
    *("--model_config", json.dumps(TINY)),
]
HALF_THE_BATCH = ["--batch_size", "8"]  # of each of two processes, which see the same images together


def run(monkeypatch, folder, *arguments) -> Path:
    monkeypatch.setattr(sys, "argv", ["pretrain_vit.py", *FAST, "--output_dir", str(folder), *arguments])
    try:
        pretrain_vit.main()
    finally:
        reset_accelerate()
    return folder


def weights(folder: Path) -> torch.Tensor:
    model = AutoModelForImageClassification.from_pretrained(folder / "model")
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def stem(folder: Path) -> torch.Tensor:
    model = AutoModelForImageClassification.from_pretrained(folder / "model")
    return model.vit.embeddings.patch_embeddings.projection.weight.detach()


def history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run from start to end: 2 epochs of 8 steps."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return run(monkeypatch, tmp_path_factory.mktemp("whole"))


def test_a_run_leaves_a_model_that_transformers_loads(whole):
    assert [(entry["epoch"], entry["step"]) for entry in history(whole)] == [(1, 8), (2, 16)]
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= {
        file.name for file in (whole / "model").iterdir()
    }
    assert weights(whole).isfinite().all()


def test_the_model_has_a_card_of_its_run(whole):
    record = TrainingRecord.from_json_file(whole / "model" / RECORD_FILE)
    assert (record.dataset, record.base_model, record.library) == ("photo_crops", None, "transformers")
    assert [row["accuracy"] for row in record.history] == [entry["top1"] for entry in history(whole)]
    assert record.metrics["accuracy"] == history(whole)[-1]["top1"]
    assert record.hyperparameters["mixed_precision"] == "no"
    assert record.command.startswith("python ")
    card = ModelCard.load(whole / "model" / "README.md")
    assert {"tract", "hf-tract"} <= set(card.data.tags)
    assert "lam = 0.1" in card.text


def test_lam_reaches_the_layer(tmp_path, monkeypatch):
    handles, original = [], pretrain_vit.apply_tract
    monkeypatch.setattr(pretrain_vit, "apply_tract", lambda *args: handles.append(original(*args)) or handles[-1])
    run(monkeypatch, tmp_path, "--lam", "0.02", "--epochs", "1")
    assert [handle.config.lam for handle in handles] == [0.02]


@pytest.fixture(scope="module")
def vanilla(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return run(monkeypatch, tmp_path_factory.mktemp("vanilla"), "--no_tract")


def test_without_tract_another_model_comes_out(whole, vanilla):
    assert "lam" not in (vanilla / "model" / "README.md").read_text()
    assert (weights(vanilla) - weights(whole)).norm() > 1e-3 * weights(whole).norm()


def run_until_killed(monkeypatch, folder, after: int, *options: str, every: int = 3) -> None:
    """Dies after that many checkpoints, one in so many steps, and in the middle of the next."""

    class Killed(BaseException):
        pass

    saves, save_state = [], Accelerator.save_state

    def save_and_die(self, *args, **kwargs):
        saves.append(save_state(self, *args, **kwargs))
        if len(saves) == after:
            (folder / "checkpoints" / f"checkpoint_{after}").mkdir()
            raise Killed

    monkeypatch.setattr(Accelerator, "save_state", save_and_die)
    with pytest.raises(Killed):
        run(monkeypatch, folder, "--checkpointing_steps", str(every), *options)
    monkeypatch.setattr(Accelerator, "save_state", save_state)


@pytest.mark.parametrize("after, every", [(1, 3), (3, 3), (2, 4)], ids=["epoch 1", "epoch 2", "an epoch's last step"])
def test_stopped_within_an_epoch_and_resumed_it_ends_bit_identical(whole, tmp_path, monkeypatch, after, every):
    run_until_killed(monkeypatch, tmp_path, after, every=every)
    run(monkeypatch, tmp_path, "--checkpointing_steps", str(every), "--resume_from_checkpoint", "latest")
    assert torch.equal(weights(tmp_path), weights(whole))
    assert history(tmp_path) == history(whole)


def test_a_whitened_start_is_resumed_too(whole, tmp_path, monkeypatch):
    options = ["--whiten_init"]
    run(monkeypatch, tmp_path / "straight", *options)
    run_until_killed(monkeypatch, tmp_path / "resumed", 1, *options)
    run(monkeypatch, tmp_path / "resumed", *options, "--resume_from_checkpoint", "latest")
    assert torch.equal(weights(tmp_path / "straight"), weights(tmp_path / "resumed"))
    assert not torch.equal(weights(tmp_path / "straight"), weights(whole))


def test_timms_augmentations_and_dropout_are_resumed_too(whole, tmp_path, monkeypatch):
    options = ["--color_jitter", "0.3", "--crop_padding", "2", "--num_workers", "0"]
    options += ["--model_config", json.dumps({**TINY, "hidden_dropout_prob": 0.2})]
    straight, folder = run(monkeypatch, tmp_path / "straight", *options), tmp_path / "resumed"
    run_until_killed(monkeypatch, folder, 3, *options)
    run(monkeypatch, folder, *options, "--resume_from_checkpoint", "latest")
    assert not torch.equal(weights(straight), weights(whole))
    assert torch.equal(weights(folder), weights(straight))


@pytest.mark.parametrize(
    "options, change",
    [
        (["--lam", "0.2"], "lam 0.1, not 0.2"),
        (["--no_tract", "--epochs", "3"], "epochs 2, not 3; no_tract False, not"),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(whole, monkeypatch, options, change):
    with pytest.raises(SystemExit, match=f"the run that is to be resumed has {change}"):
        run(monkeypatch, whole, *options, "--resume_from_checkpoint", "latest")


def test_checkpoints_without_averaged_weights_are_refused_and_kept(whole, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(whole / "checkpoints", folder / "checkpoints")
    with pytest.raises(SystemExit, match=r"--resume_from_checkpoint .*checkpoint_1 does not belong to these options"):
        run(monkeypatch, folder, "--ema_decay", "0.99", "--resume_from_checkpoint", "latest")
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"checkpoint_0", "checkpoint_1"}


def test_another_run_s_checkpoint_needs_a_folder_of_its_own(whole, tmp_path, monkeypatch):
    (tmp_path / "checkpoints" / "checkpoint_1").mkdir(parents=True)
    elsewhere = whole / "checkpoints" / "checkpoint_0"
    with pytest.raises(SystemExit, match=r"checkpoint_0 is of another run: name a new or empty --output_dir, not "):
        run(monkeypatch, tmp_path, "--resume_from_checkpoint", str(elsewhere))
    assert (tmp_path / "checkpoints" / "checkpoint_1").exists()
    folder = run(monkeypatch, tmp_path / "new", "--resume_from_checkpoint", str(elsewhere))
    assert torch.equal(weights(folder), weights(whole))


def test_a_finished_run_resumed_stays_as_it_is(whole, monkeypatch):
    before, told = weights(whole), history(whole)
    run(monkeypatch, whole, "--resume_from_checkpoint", "latest")
    assert torch.equal(weights(whole), before)
    assert history(whole) == told


def test_a_used_folder_is_not_overwritten(whole, monkeypatch):
    with pytest.raises(
        SystemExit, match=r"is not empty: add --resume_from_checkpoint latest, or name another --output_dir"
    ):
        run(monkeypatch, whole)


def test_every_part_of_a_recipe_runs_together(tmp_path, monkeypatch):
    """A timm model, accumulation, bf16, mixup, averaged weights and the like, tracked by TensorBoard."""
    recipe = {"model": "resnet18", "optimizer": "lamb", "mixup": 0.8, "cutmix": 1.0, "ema_decay": 0.9}
    recipe |= {
        "auto_augment": "rand-m9-mstd0.5-mmax9-inc1",
        "random_erasing": 0.25,
        "crop_padding": 4,
        "crop_scale": 0.5,
    }
    recipe |= {"clip_grad_norm": 1.0, "warmup_epochs": 1, "gradient_accumulation_steps": 3, "mixed_precision": "bf16"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    losses = []

    def train_batch(training, pixels, labels, train_batch=pretrain_vit.Training.train_batch):
        losses.append(train_batch(training, pixels, labels))
        return losses[-1]

    monkeypatch.setattr(pretrain_vit.Training, "train_batch", train_batch)
    options = ["--recipe", str(tmp_path / "recipe.yaml"), "--model_config", "{}", "--train_samples", "160"]
    run(monkeypatch, tmp_path / "out", *options, "--epochs", "3", "--report_to", "tensorboard", "--num_workers", "1")
    assert [entry["step"] for entry in history(tmp_path / "out")] == [4, 8, 12]
    events = EventAccumulator(str(next((tmp_path / "out").rglob("events.out.*")).parent)).Reload()
    logged = events.Tags()["scalars"]
    assert {"train/loss", "train/tract/grad_norm", "train/tract/condition", "test/top1"} <= set(logged)
    assert "test/loss" not in logged
    means = torch.stack(losses).view(3, 10).mean(1).tolist()  # 10 micro-batches in each of 3 epochs
    assert [entry["loss"] for entry in history(tmp_path / "out")] == pytest.approx(means, rel=1e-5)
    assert [event.value for event in events.Scalars("train/epoch_loss")] == pytest.approx(means, rel=1e-5)
    loaded = timm.create_model(
        "resnet18", num_classes=20, checkpoint_path=str(tmp_path / "out/model/model.safetensors")
    )
    assert loaded.conv1.weight.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        ["--optimizer", "muon_split"],
        ["--optimizer", "soap"],
        ["--optimizer", "schedule_free", "--schedule", "constant", "--warmup_epochs", "1"],
    ],
)
def test_other_optimizers_are_resumed_in_the_middle_of_an_epoch(options, tmp_path, monkeypatch):
    options = [*options, "--learning_rate", "0.01"]
    expected = run(monkeypatch, tmp_path / "whole", *options)
    folder = run(monkeypatch, tmp_path / "killed", *options, "--checkpointing_steps", "5")
    shutil.rmtree(folder / "checkpoints" / "checkpoint_2")
    assert history(folder) == history(expected)
    resumed = ["--checkpointing_steps", "5", "--resume_from_checkpoint", str(folder / "checkpoints" / "checkpoint_1")]
    run(monkeypatch, folder, *options, *resumed)
    assert history(folder) == history(expected)
    assert torch.equal(weights(folder), weights(expected))


def test_muon_leaves_first_layer_and_head_to_adamw(monkeypatch):
    recipe, _ = parse(monkeypatch, "--optimizer", "muon_split", "--model_config", json.dumps(TINY))
    model = pretrain_vit.make_model(recipe, ["a", "b"])
    optimizer = pretrain_vit.make_named_optimizer(recipe, model)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.95}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.999)}
    for each in model.parameters():
        each.grad = torch.ones_like(each)
    optimizer.step()
    by_muon = {name for name, each in model.named_parameters() if optimizer.state[each]["use_muon"]}
    assert by_muon == {name for name, each in model.named_parameters() if ".layers." in name and each.ndim == 2}
    assert by_muon


def test_schedule_free_is_tested_and_saved_with_averaged_weights(tmp_path, monkeypatch):
    made = []

    def kept(recipe, model, make=pretrain_vit.make_named_optimizer):
        made.append((model, make(recipe, model)))
        return made[0][1]

    def tested(training, evaluate=pretrain_vit.Training.evaluate):
        assert not made[0][1].param_groups[0]["train_mode"]
        return evaluate(training)

    monkeypatch.setattr(pretrain_vit, "make_named_optimizer", kept)
    monkeypatch.setattr(pretrain_vit.Training, "evaluate", tested)
    options = ["--optimizer", "schedule_free", "--schedule", "constant", "--learning_rate", "0.01"]
    saved = weights(run(monkeypatch, tmp_path, *options))
    model, optimizer = made[0]
    assert not optimizer.param_groups[0]["train_mode"]
    assert torch.equal(torch.cat([each.detach().flatten() for each in model.parameters()]), saved)
    optimizer.train()
    trained = torch.cat([each.detach().flatten() for each in model.parameters()])
    assert (trained - saved).abs().max() > 1e-4


def test_the_precision_that_accelerate_launch_is_told_is_used_and_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # which `accelerate launch` sets
    run(monkeypatch, tmp_path, "--epochs", "1")
    record = TrainingRecord.from_json_file(tmp_path / "model" / RECORD_FILE)
    assert record.hyperparameters["mixed_precision"] == "bf16"
    with pytest.raises(SystemExit, match="the run that is to be resumed has mixed_precision bf16, not no"):
        run(monkeypatch, tmp_path, "--epochs", "1", "--mixed_precision", "no", "--resume_from_checkpoint", "latest")


def test_the_micro_steps_that_accelerate_launch_is_told_are_used(tmp_path, monkeypatch):
    options = ["--epochs", "1", "--train_samples", "48", "--batch_size", "12"]
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")  # which it sets for DeepSpeed
    launched = run(monkeypatch, tmp_path / "launched", *options)
    with pytest.raises(SystemExit, match=r"^--gradient_accumulation_steps 4: accelerate's launcher was told 2"):
        run(monkeypatch, tmp_path / "both", *options, "--gradient_accumulation_steps", "4")
    monkeypatch.delenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    asked = run(monkeypatch, tmp_path / "asked", *options, "--gradient_accumulation_steps", "2")
    assert history(launched)[-1]["step"] == history(asked)[-1]["step"] == 2
    assert torch.equal(weights(launched), weights(asked))


def test_an_epoch_s_last_step_is_the_mean_over_its_own_micro_steps(tmp_path, monkeypatch):
    """Of 3 micro-steps in place of 4, or of one whole batch, with TrAct's second moment."""
    options = ["--optimizer", "sgd", "--learning_rate", "1", "--epochs", "1", "--train_samples", "48"]
    whole_batch = run(monkeypatch, tmp_path / "whole", *options, "--batch_size", "48")
    in_three = run(monkeypatch, tmp_path / "three", *options, "--gradient_accumulation_steps", "4")
    assert history(in_three)[-1]["step"] == 1
    assert_close(weights(in_three), weights(whole_batch), 1e-4)


@pytest.mark.parametrize("average", [[], ["--ema_decay", "0.9"]])
def test_a_compiled_model_is_saved_and_resumed_as_an_ordinary_one(whole, average, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")  # as `accelerate launch --dynamo_backend eager` does
    run(monkeypatch, tmp_path, *average)
    compiled = weights(tmp_path)
    if not average:
        assert_close(compiled, weights(whole), 1e-3)
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
    run(monkeypatch, tmp_path, *average, "--resume_from_checkpoint", "latest")
    assert torch.equal(weights(tmp_path), compiled)


def test_averaged_weights_are_tested_and_saved_and_gradients_clipped(tmp_path, monkeypatch):
    tested, norms, means = [], [], []

    class Watched(pretrain_vit.Training):
        def finish_step(self, loss):
            now = torch.cat([p.detach().flatten() for p in self.model.parameters()])
            means.append(0.9 * means[-1] + 0.1 * now if means else now)
            super().finish_step(loss)

        def evaluate(self):
            tested.append(torch.cat([p.detach().flatten() for p in self.best_model().parameters()]).clone())
            return super().evaluate()

    def clip(accelerator, parameters, norm, clip_grad_norm_=Accelerator.clip_grad_norm_):
        norms.append(norm)
        return clip_grad_norm_(accelerator, parameters, norm)

    monkeypatch.setattr(pretrain_vit, "Training", Watched)
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", clip)
    saved = weights(run(monkeypatch, tmp_path, "--ema_decay", "0.9", "--clip_grad_norm", "0.5"))
    assert_close(saved, means[-1], 1e-5)
    assert torch.equal(tested[-1], saved)
    assert set(norms) == {0.5}
    assert len(norms) == len(means) == 16


def test_schedule_free_says_what_it_needs(monkeypatch, capsys):
    recipe, _ = parse(monkeypatch, "--optimizer", "schedule_free", "--model_config", json.dumps(TINY))
    model = pretrain_vit.make_model(recipe, ["a", "b"])
    pretrain_vit.make_named_optimizer(recipe, model)
    assert "schedule_free averages its weights in place of --schedule cosine" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(SystemExit, match="--optimizer schedule_free needs pytorch_optimizer: pip install"):
        pretrain_vit.make_named_optimizer(recipe, model)


def test_a_constant_rate_warms_up_and_stays(monkeypatch):
    recipe, _ = parse(monkeypatch, "--schedule", "constant", "--warmup_epochs", "1", "--epochs", "3")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], recipe.learning_rate)
    schedule = pretrain_vit.make_schedule(recipe, optimizer, 4)
    rates = []
    for step in range(13):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"] / recipe.learning_rate)
    assert rates == pytest.approx([0, 0.25, 0.5, 0.75, *[1.0] * 9])


def parse(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["pretrain_vit.py", *map(str, arguments)])
    return pretrain_vit.parse_arguments()


@pytest.mark.parametrize("file", ["cifar10_vit", "transfer_vit"])
def test_recipes_name_what_exists(file, monkeypatch):
    file = EXAMPLES / "recipes" / f"{file}.yaml"
    recipe, _ = parse(monkeypatch, "--recipe", file)
    written = yaml.safe_load(file.read_text())
    written["model_config"] = json.dumps(written["model_config"])
    assert {key: getattr(recipe, key) for key in written} == written
    assert pretrain_vit.make_model(recipe, ["a", "b"]).num_labels == 2
    pretrain_vit.make_augmentation(recipe, pretrain_vit.Look(32, [0.5] * 3, [0.5] * 3))


@pytest.mark.parametrize("policy", ["cifar10", "3a", "rand-m9-mstd0.5", "augmix-m3", "original", "v0"])
def test_color_jitter_is_refused_where_timm_leaves_it_out(policy, monkeypatch):
    recipe = Recipe(color_jitter=0.3, auto_augment=policy)
    augmentation = pretrain_vit.make_augmentation(recipe, pretrain_vit.Look(32, [0.5] * 3, [0.5] * 3))
    options = ["--color_jitter", "0.3", "--auto_augment", policy]
    if "ColorJitter" in repr(augmentation):
        assert parse(monkeypatch, *options)[0] == recipe
        return
    message = f"--color_jitter 0.3: timm leaves it out beside --auto_augment {policy}"
    with pytest.raises(SystemExit, match=message):
        parse(monkeypatch, *options)


def test_parameters_that_no_class_depends_on_are_frozen_and_named(monkeypatch, capsys):
    recipe, _ = parse(monkeypatch, "--model", "dinov2", "--model_config", json.dumps(TINY_DINO))
    model = pretrain_vit.make_model(recipe, ["a", "b"])
    frozen = [name for name, each in model.named_parameters() if not each.requires_grad]
    assert frozen == ["dinov2.embeddings.mask_token"]
    assert all(each.grad is None for each in model.parameters())
    assert capsys.readouterr().out.count("dinov2.embeddings.mask_token") == 1


def test_the_command_line_wins_over_the_recipe(tmp_path, monkeypatch):
    file = tmp_path / "recipe.yaml"
    file.write_text("epochs: 5\nlam: 0.2\nlearning_rate: 1e-2\nmixed_precision: no\nauto_augment: null\n")
    recipe, _ = parse(monkeypatch, "--recipe", file, "--epochs", "7")
    assert (recipe.epochs, recipe.lam, recipe.batch_size) == (7, 0.2, Recipe.batch_size)
    assert (recipe.learning_rate, recipe.mixed_precision, recipe.auto_augment) == (0.01, "no", None)


def test_each_option_has_a_line_in_the_help(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parse(monkeypatch, "--help")
    text = " ".join(capsys.readouterr().out.split())
    for expected in ("passes over the training images. (default: 8)", "TrAct's damping. (default: 0.1)"):
        assert expected in text
    for option in dataclasses.fields(pretrain_vit.Recipe) + dataclasses.fields(pretrain_vit.Run):
        assert option.metadata["help"] in text


@pytest.mark.parametrize(
    "options, message",
    [
        (["--image_size", "0"], "--image_size 0: give a number above 0"),
        (["--lam", "-1"], "--lam -1.0: give a number above 0"),
        (["--lam", "nan"], "--lam nan: give a number above 0"),
        (["--flip", "2"], "--flip 2.0: give a number from 0 to 1"),
        (["--train_samples", "-1"], "--train_samples -1: give 0 or more"),
        (["--checkpointing_steps=epochs"], "--checkpointing_steps epochs must be epoch, never, or a number"),
        (["--checkpointing_steps=0"], "--checkpointing_steps 0 must be epoch, never, or a number"),
        (["--checkpointing_steps=-3"], "--checkpointing_steps -3 must be epoch, never, or a number"),
        (["--report_to", "tensorbord"], "--report_to tensorbord: give one of "),
        (["--mixup", "0.1", "--batch_size", "15"], "--batch_size 15: --mixup and --cutmix take pairs"),
        (["--recipe", "missing.yaml"], "--recipe missing.yaml cannot be read"),
        (["--recipe", "list.yaml"], "--recipe list.yaml cannot be read, or has no lines such as `epochs: 8`"),
        (["--recipe", "typo.yaml"], "--recipe typo.yaml: epoch is none of a recipe's options: dataset, "),
        (["--output_dir", "typo.yaml"], "--output_dir typo.yaml is a file"),
    ],
)
def test_a_wrong_value_is_told_in_one_line_before_anything_is_loaded(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("typo.yaml").write_text("epoch: 5\n")
    Path("list.yaml").write_text("- 5\n")
    with pytest.raises(SystemExit, match=re.escape(message)) as error:
        parse(monkeypatch, *options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--epoch_s", "3"], "there is no option --epoch_s"),
        (["--recip", "x.yaml"], "there is no option --recip"),
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["--mixed_precision", "bf61"], "invalid choice: 'bf61' (choose from 'no', 'bf16', 'fp16')"),
        (["--corrupt_images", "ignore"], "invalid choice: 'ignore' (choose from 'refuse', 'skip')"),
    ],
)
def test_a_wrong_option_is_told_without_a_list_of_all_options(options, message, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parse(monkeypatch, *options)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert message in lines[1]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "vitt"], "--model vitt must be a model type of transformers"),
        (["--model_config", "{"], "--model_config {: give JSON, such as"),
        (["--model_config", '{"hidden_sise": 8}'], "--model_config: vit has no setting 'hidden_sise'"),
        (["--model_config", '{"hidden_size": "many"}'], "--model vit must be"),
        (["--model", "resnet18", "--model_config", '{"depth": 5}'], "--model resnet18 must be"),
        (["--model", "vit_tiny_patch16_224"], "cannot be made for images of --image_size 32"),
        (["--optimizer", "adamm", "--model_config", json.dumps(TINY)], "--optimizer adamm: timm.optim"),
    ],
)
def test_what_is_no_model_and_no_optimizer_is_told_in_one_line(options, message, monkeypatch):
    recipe, _ = parse(monkeypatch, *options)
    with pytest.raises(SystemExit, match=re.escape(message)) as error:
        pretrain_vit.make_named_optimizer(recipe, pretrain_vit.make_model(recipe, ["a", "b"]))
    assert "\n" not in str(error.value)


def test_what_does_not_fit_the_data_or_the_checkpoints_is_told_in_one_line(whole, tmp_path, monkeypatch):
    wrong = {
        "--batch_size 129": "--batch_size 129: all processes need 129 images, of 128",
        "--resume_from_checkpoint no/checkpoint_1": "--resume_from_checkpoint no/checkpoint_1 must be latest",
        f"--resume_from_checkpoint {whole}/checkpoints/checkpoint_0 --model_config {{}}": "does not belong to these",
    }
    for options, message in wrong.items():
        with pytest.raises(SystemExit, match=re.escape(message)) as error:
            run(monkeypatch, tmp_path, *options.split())
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("images", ["in memory", "one by one"])
def test_the_saved_processor_makes_the_pixels_that_were_tested(images, tmp_path, monkeypatch):
    recipe, options = parse(monkeypatch, "--model_config", json.dumps(TINY), "--num_workers", 0)
    if images == "one by one":
        monkeypatch.setattr(pretrain_vit, "MAX_BYTES", 0)
    random = np.random.default_rng(0)
    pixels = [Image.fromarray(random.integers(0, 256, (64, 70, 3), dtype=np.uint8)) for _ in range(2)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"image": pixels, "label": [0, 1]}, features=features)
    rows = rows.cast_column("image", datasets.Image(decode=False))
    data = pretrain_vit.ImageData(rows, rows, ["a", "b"], "test")
    look = pretrain_vit.measure_look(rows, 32)
    _, test = pretrain_vit.make_loaders(recipe, options, data, look)
    tested, _ = next(iter(test))
    pretrain_vit.save_model(pretrain_vit.make_model(recipe, ["a", "b"]), tmp_path, look, ["a", "b"])
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    prepared = processor(pixels, return_tensors="pt")["pixel_values"]
    assert_close(tested, prepared, 1e-5)


def test_timm_s_own_transform_makes_the_pixels_that_were_tested(tmp_path):
    look = pretrain_vit.Look(160, [0.2, 0.3, 0.4], [0.5, 0.6, 0.7])
    pretrain_vit.save_model(timm.create_model("test_vit", num_classes=2), tmp_path, look, ["a", "b"])
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 260, 3), dtype=np.uint8))
    found = AutoImageProcessor.from_pretrained(tmp_path)(image)["pixel_values"]
    expected = pretrain_vit.make_processor(look)(image, return_tensors="pt")["pixel_values"]
    assert (found - expected).abs().max() < 2.5 / 255 / 0.5  # Pillow rounds differently.


def test_a_checkpoint_of_timm_s_on_the_hub_is_named_by_its_id_there(whole, monkeypatch):
    recipe, options = parse(monkeypatch, "--model", "hf-hub:timm/resnet18.a1_in1k", "--no_tract")
    training = pretrain_vit.Training.__new__(pretrain_vit.Training)
    training.recipe, training.run, training.handle = recipe, options, None
    training.accelerator = SimpleNamespace(num_processes=1)
    training.data = SimpleNamespace(eval_split="test", names=list("abc"))
    training.progress = SimpleNamespace(history=history(whole))
    assert training.record("me/x").base_model == "timm/resnet18.a1_in1k"


def test_a_card_shows_no_folder_of_a_checkpoint(whole, tmp_path, monkeypatch):
    checkpoint = tmp_path / "acme" / "vit"
    recipe, options = parse(monkeypatch, "--model", str(checkpoint), "--no_tract")
    training = pretrain_vit.Training.__new__(pretrain_vit.Training)
    training.recipe, training.run, training.handle = recipe, options, None
    training.accelerator = SimpleNamespace(num_processes=1)
    training.data = SimpleNamespace(eval_split="test", names=list("abc"))
    training.progress = SimpleNamespace(history=history(whole))
    record = training.record("me/x")
    assert record.hyperparameters["model"] == record.base_model == "vit"
    assert "acme" not in json.dumps(record.hyperparameters)


def test_a_checkpoint_is_told_what_it_sees(tmp_path, monkeypatch, capsys):
    checkpoint = run(monkeypatch, tmp_path / "first", "--epochs", "1") / "model"
    capsys.readouterr()
    few = ["--train_samples", "32", "--test_samples", "32", "--epochs", "1", "--batch_size", "16"]
    options = ["--model", str(checkpoint), *few, "--output_dir", str(tmp_path / "second")]
    monkeypatch.setattr(sys, "argv", ["pretrain_vit.py", *options])
    pretrain_vit.main()
    reset_accelerate()
    assert f"--model {checkpoint} gets images of --image_size 32, standardised" in capsys.readouterr().out


def test_wrong_augmentations_are_told_in_one_line(monkeypatch):
    recipe, _ = parse(monkeypatch, "--auto_augment", "random")
    with pytest.raises(SystemExit, match="--auto_augment random is neither timm's notation nor cifar10"):
        pretrain_vit.make_augmentation(recipe, pretrain_vit.Look(32, [0.5] * 3, [0.5] * 3))


def on_a_rank(rank: int, arguments: str) -> None:
    """Runs the script as one of the processes that `torchrun` starts."""
    folder, *options = json.loads(arguments)
    sys.argv = ["pretrain_vit.py", *FAST, *HALF_THE_BATCH, "--output_dir", folder, *options]
    pretrain_vit.main()
    reset_accelerate()


def buffers_on_a_rank(rank: int, module: str) -> torch.Tensor:
    PartialState(cpu=True)
    model = torch.nn.BatchNorm2d(3)
    model.running_mean.fill_(1 + rank)
    importlib.import_module(module).share_buffers(model)
    reset_accelerate()
    return model.running_mean


def test_each_process_tests_the_buffers_that_are_saved(tmp_path):
    modules = ["pretrain_vit", "detect_voc"]
    for results in on_two_ranks(tmp_path, buffers_on_a_rank, modules):
        assert [results[name].tolist() for name in modules] == [[1.0] * 3] * 2


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Makes the folders of a run on two processes, and of one that was begun on one of them."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_until_killed(monkeypatch, folder / "resumed", after=3)
    runs = [[str(folder / "straight")], [str(folder / "resumed"), "--resume_from_checkpoint", "latest"]]
    on_two_ranks(folder, on_a_rank, [json.dumps(each) for each in runs])
    return folder


@pytest.mark.parametrize("name", ["straight", "resumed"])
def test_two_processes_train_the_first_layer_as_one_does(whole, vanilla, two, name):
    effect = (stem(whole) - stem(vanilla)).norm()
    assert (stem(two / name) - stem(whole)).norm() < 0.02 * effect


def test_two_processes_end_where_one_does(whole, two):
    assert_close(weights(two / "straight"), weights(whole), 1e-3)
    assert history(two / "straight")[-1]["step"] == history(whole)[-1]["step"]
    record = TrainingRecord.from_json_file(two / "straight" / "model" / RECORD_FILE)
    assert record.hyperparameters["processes"] == 2


def test_a_model_with_a_parameter_that_is_not_used_trains_on_two_processes(tmp_path):
    options = ["--model", "dinov2", "--model_config", json.dumps(TINY_DINO)]
    on_two_ranks(tmp_path, on_a_rank, [json.dumps([str(tmp_path / "run"), *options])])
    assert [entry["step"] for entry in history(tmp_path / "run")] == [8, 16]


@pytest.mark.parametrize("name", ["straight", "resumed"])
def test_the_loss_is_the_mean_over_the_epoch_and_the_processes(whole, two, name):
    losses = [entry["loss"] for entry in history(two / name)]
    assert losses == pytest.approx([entry["loss"] for entry in history(whole)], rel=1e-4)


def test_begun_on_one_process_and_resumed_on_two_it_ends_there_too(whole, two):
    assert_close(weights(two / "resumed"), weights(whole), 1e-3)
    assert [entry["step"] for entry in history(two / "resumed")] == [8, 16]


def command(folder: Path, *options: str, launcher: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, *launcher, str(EXAMPLES / "pretrain_vit.py"), *FAST, "--output_dir", str(folder), *options]


@pytest.mark.slow
def test_torchrun_ends_where_one_process_does(whole, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    subprocess.run(command(tmp_path, *HALF_THE_BATCH, launcher=launcher), check=True)
    assert_close(weights(tmp_path), weights(whole), 1e-3)


@pytest.mark.slow
def test_killed_within_an_epoch_and_resumed_it_ends_bit_identical(tmp_path):
    more = ("--epochs", "4", "--train_samples", "2048", "--batch_size", "32", "--checkpointing_steps", "5")
    subprocess.run(command(tmp_path / "whole", *more), check=True)
    process = subprocess.Popen(command(tmp_path / "killed", *more))
    while not (tmp_path / "killed/checkpoints/checkpoint_14").exists():  # in the second epoch of 64 steps
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(command(tmp_path / "killed", *more, "--resume_from_checkpoint", "latest"), check=True)
    assert torch.equal(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
