"""The accelerate example: any model from a recipe, resumed anywhere, on one process or two."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import yaml
from accelerate import Accelerator
from huggingface_hub import ModelCard
from transformers import AutoModelForImageClassification

import pretrain_vit
from helpers.environments import reset_accelerate
from helpers.oracle import assert_close
from helpers.ranks import on_two_ranks
from hf_tract.integrations import TrainingRecord
from hf_tract.integrations.training_record import RECORD_FILE
from hf_tract.metrics import TopK
from recipe import Recipe

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "patch_size": 8}
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


def history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run from start to end: 2 epochs of 8 steps."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return run(monkeypatch, tmp_path_factory.mktemp("whole"))


def test_a_run_leaves_a_model_that_transformers_loads(whole):
    assert [(entry["epoch"], entry["step"], entry["tract"]) for entry in history(whole)] == [
        (1, 8, True),
        (2, 16, True),
    ]
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= {
        file.name for file in (whole / "model").iterdir()
    }
    assert weights(whole).isfinite().all()


def test_the_model_has_a_card_of_its_run(whole):
    record = TrainingRecord.from_json_file(whole / "model" / RECORD_FILE)
    assert (record.dataset, record.base_model, record.library) == ("photo_crops", None, "transformers")
    assert [row["accuracy"] for row in record.history] == [entry["top1"] for entry in history(whole)]
    assert record.metrics["accuracy"] == history(whole)[-1]["top1"]
    assert record.command.startswith("python ")
    card = ModelCard.load(whole / "model" / "README.md")
    assert {"tract", "hf-tract"} <= set(card.data.tags)
    assert "lam = 0.1" in card.text


def test_without_tract_another_model_comes_out(whole, tmp_path, monkeypatch):
    vanilla = run(monkeypatch, tmp_path, "--no_tract")
    assert "lam" not in (vanilla / "model" / "README.md").read_text()
    assert not history(vanilla)[0]["tract"]
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
    resumed, straight = ([{**entry, "seconds": None} for entry in history(folder)] for folder in (tmp_path, whole))
    assert resumed == straight  # but for how long it took
    times = [entry["seconds"] for entry in history(tmp_path)]
    assert 0 < times[0] < times[1]


@pytest.mark.parametrize("steps", ["epochs", "0", "-3"])
def test_what_is_no_time_for_a_checkpoint_is_refused(tmp_path, monkeypatch, steps):
    with pytest.raises(SystemExit, match=f"--checkpointing_steps {steps} must be epoch, never, or a number"):
        run(monkeypatch, tmp_path, f"--checkpointing_steps={steps}")


def test_a_whitened_start_is_resumed_too(whole, tmp_path, monkeypatch):
    options = ["--whiten_init"]
    run(monkeypatch, tmp_path / "straight", *options)
    run_until_killed(monkeypatch, tmp_path / "resumed", 1, *options)
    run(monkeypatch, tmp_path / "resumed", *options, "--resume_from_checkpoint", "latest")
    assert torch.equal(weights(tmp_path / "straight"), weights(tmp_path / "resumed"))
    assert not torch.equal(weights(tmp_path / "straight"), weights(whole))


def test_images_in_memory_are_resumed_too(whole, tmp_path, monkeypatch):
    options = ["--in_memory", "--color_jitter", "0", "--crop_padding", "2"]
    straight, folder = run(monkeypatch, tmp_path / "straight", *options), tmp_path / "resumed"
    run_until_killed(monkeypatch, folder, 3, *options)
    run(monkeypatch, folder, *options, "--resume_from_checkpoint", "latest")
    assert not torch.equal(weights(straight), weights(whole))
    assert torch.equal(weights(folder), weights(straight))


def test_images_in_memory_refuse_other_augmentations(tmp_path, monkeypatch):
    with pytest.raises(
        SystemExit, match=r"--rotation 5.0, --color_jitter 0.3: --in_memory only crops .* and flips; leave one"
    ):
        run(monkeypatch, tmp_path, "--in_memory", "--rotation", "5")


def test_a_finished_run_resumed_stays_as_it_is(whole, monkeypatch):
    before, told = weights(whole), history(whole)
    run(monkeypatch, whole, "--resume_from_checkpoint", "latest")
    assert torch.equal(weights(whole), before)
    assert history(whole) == told


def test_a_used_folder_is_not_overwritten(whole, monkeypatch):
    with pytest.raises(
        SystemExit, match=r"has checkpoints: add --resume_from_checkpoint latest, or name another --output_dir"
    ):
        run(monkeypatch, whole)


def test_every_part_of_a_recipe_runs_together(tmp_path, monkeypatch):
    """A timm model, accumulation, bf16, mixup, EMA, repeated augmentation and the like, tracked by TensorBoard."""
    recipe = {
        "model": "resnet18",
        "optimizer": "lamb",
        "bce_loss": True,
    }
    recipe |= {
        "mixup": 0.8,
        "cutmix": 1.0,
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "random_erasing": 0.25,
        "ema_decay": 0.9,
    }
    recipe |= {"repeated_augmentation": 3, "clip_grad_norm": 1.0, "warmup_epochs": 1, "gradient_accumulation_steps": 3}
    recipe |= {"mixed_precision": "bf16", "crop_padding": 4, "channels_last": True}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    options = [
        "--recipe",
        str(tmp_path / "recipe.yaml"),
        "--model_config",
        "{}",
        "--train_samples",
        "96",
        "--report_to",
        "tensorboard",
    ]
    run(monkeypatch, tmp_path / "out", *options)
    assert len(history(tmp_path / "out")) == 2
    assert list((tmp_path / "out").rglob("events.out.*"))
    loaded = timm.create_model(
        "resnet18", num_classes=20, checkpoint_path=str(tmp_path / "out/model/model.safetensors")
    )
    assert loaded.conv1.weight.isfinite().all()


@pytest.mark.parametrize("file", sorted((EXAMPLES / "recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_recipes_name_what_exists(file, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain_vit.py", "--recipe", str(file)])
    recipe, _ = pretrain_vit.parse()
    written = yaml.safe_load(file.read_text())
    assert {key: getattr(recipe, key) for key in written if key != "model_config"} == {
        key: value for key, value in written.items() if key != "model_config"
    }
    assert json.loads(recipe.model_config) == written["model_config"]
    assert recipe.model == "vit" or timm.is_model(recipe.model)
    pretrain_vit.make_loss(recipe, 10)


def test_the_command_line_wins_over_the_recipe_and_a_typo_is_named(tmp_path, monkeypatch):
    file = tmp_path / "recipe.yaml"
    file.write_text("epochs: 5\nlam: 0.2\n")
    monkeypatch.setattr(sys, "argv", ["pretrain_vit.py", "--recipe", str(file), "--epochs", "7"])
    recipe, _ = pretrain_vit.parse()
    assert (recipe.epochs, recipe.lam, recipe.batch_size) == (7, 0.2, Recipe.batch_size)
    settings = {model: model_config(file, monkeypatch, model) for model in ("vit", "resnet")}
    assert settings == {"vit": {"patch_size": 4}, "resnet": {}}  # which are of the recipe's own model
    file.write_text("epoch: 5\n")
    with pytest.raises(SystemExit, match=r"sets epoch, which a recipe does not have; it has dataset, "):
        pretrain_vit.parse()


def model_config(file: Path, monkeypatch, model: str) -> dict[str, int]:
    """Of that model in a recipe for a ViT."""
    file.write_text("model: vit\nmodel_config: {patch_size: 4}\n")
    monkeypatch.setattr(sys, "argv", ["pretrain_vit.py", "--recipe", str(file), "--model", model])
    return json.loads(pretrain_vit.parse()[0].model_config)


def test_top_1_and_top_5_are_counted():
    scores = torch.eye(8).numpy() + torch.linspace(0.5, 0, 8).numpy()
    assert TopK().compute(predictions=scores, references=list(range(8))) == {"top1": 1.0, "top5": 1.0}
    assert TopK().compute(predictions=scores, references=[0, 7, 0, 0] + [7] * 4) == {"top1": 0.25, "top5": 0.5}


def on_a_rank(rank: int, arguments: str) -> None:
    """Runs the script as one of the processes that `torchrun` starts."""
    folder, *options = json.loads(arguments)
    sys.argv = ["pretrain_vit.py", *FAST, *HALF_THE_BATCH, "--output_dir", folder, *options]
    pretrain_vit.main()
    reset_accelerate()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Makes the folders of a run on two processes, and of one that was begun on one of them."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_until_killed(monkeypatch, folder / "resumed", after=3)
    runs = [[str(folder / "straight")], [str(folder / "resumed"), "--resume_from_checkpoint", "latest"]]
    on_two_ranks(folder, on_a_rank, [json.dumps(each) for each in runs])
    return folder


def test_two_processes_end_where_one_does(whole, two):
    assert_close(weights(two / "straight"), weights(whole), 1e-3)
    assert history(two / "straight")[-1]["step"] == history(whole)[-1]["step"]


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
