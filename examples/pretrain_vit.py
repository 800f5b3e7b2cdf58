# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf-tract",
#     "accelerate>=1.10",
#     "datasets>=4.8",
#     "huggingface_hub>=1.0",
#     "matplotlib>=3.9",
#     "numpy",
#     "pillow>=11",
#     "pytorch-optimizer>=4.0",
#     "pyyaml>=6",
#     "scikit-image>=0.24",
#     "scikit-learn>=1.5",
#     "timm>=1.0.21",
#     "torch>=2.8",
#     "torchvision>=0.23",
#     "tqdm>=4.66",
#     "transformers>=5.0",
# ]
# ///
"""Pre-trains a vision model of transformers or timm by accelerate, with TrAct or without it.

    accelerate launch pretrain_vit.py     # crops of photographs: no download, minutes on two cores
    accelerate launch pretrain_vit.py --dataset PATH_TO_IMAGES --image_size 64 --crop_scale 0.5
    accelerate launch pretrain_vit.py --recipe recipes/cifar10_vit.yaml --report_to tensorboard
    torchrun --nproc-per-node 2 pretrain_vit.py     # two processes, on a CPU too
    accelerate launch pretrain_vit.py --resume_from_checkpoint latest

A recipe is a YAML file with the values of options; the command line wins over it. A run that was killed and resumed
ends in the same weights.
"""

import argparse
import contextlib
import dataclasses
import functools
import glob
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import datasets
import numpy as np
import skimage.data
import sklearn.datasets
import timm
import torch
import yaml
from accelerate import Accelerator, skip_first_batches
from accelerate.tracking import get_available_trackers
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, broadcast, set_seed
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from PIL import Image, ImageOps
from timm.data import Mixup, create_transform
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, default_convert, get_worker_info
from torchvision.transforms import v2
from tqdm.auto import tqdm
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForImageClassification,
    CLIPImageProcessor,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
)

from hf_tract import TrActError, apply_tract, find_first_layers, whiten_first_layer
from hf_tract.integrations import TrainingRecord, stats_to_log
from hf_tract.metrics import compute_top_k

SMALL_VIT = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 384,
    "patch_size": 8,
}
MAX_BYTES = 2 * 2**30  # of decoded images that a process keeps in memory; more are decoded when they are used
HEADS = ("classifier.*", "head.*", "fc.*")  # what transformers and timm call the layer of the classes
MODELS = ("config.json", ".safetensors", ".bin", ".pt", ".pth", ".h5", ".onnx", ".gguf", ".msgpack")  # in any form
IGNORED = ("_*", "checkpoint-*", "checkpoints/*", "seed-*")  # what is not published
IS_MAIN_PROCESS = os.environ.get("RANK", "0") == "0"


def option(default: Any, text: str) -> Any:
    """Return the field of an option, with its help."""
    return field(default=default, metadata={"help": text})


@dataclass
class DataOptions:
    """Names the images."""

    dataset: str = option(
        "photo_crops", "photo_crops (needs no download), a folder of images or of parquet files, or a Hub id."
    )
    dataset_config: str | None = option(None, "the Hub's name for a variant of the data set.")
    train_split: str = option("train", "its part to train on.")
    eval_split: str | None = option(
        None, "its part to test on; by default test, validation, or a share that is held out."
    )
    image_column: str | None = option(None, "by default the first column of images.")
    label_column: str | None = option(None, "by default the first column of classes.")
    train_samples: int = option(0, "use that many training images; 0 for all.")
    test_samples: int = option(0, "use that many test images; 0 for all.")
    corrupt_images: Literal["refuse", "skip"] = option("refuse", "refuse images that cannot be read, or skip them.")


class ImageError(ValueError):
    """Names an image that cannot be used, and says what to do."""


class ImageData(NamedTuple):
    """Holds rows with the columns `image` (still encoded) and `label` (a number), and the names of the classes."""

    train: datasets.Dataset
    test: datasets.Dataset
    names: list[str]
    eval_split: str


@dataclass
class Recipe(DataOptions):
    """Says what is trained and how; a recipe file may set each of these."""

    model: str = option("vit", "a model type of transformers, a name of timm, or a checkpoint (Hub id or folder).")
    model_config: str = option("{}", "JSON with settings for random weights; a vit without settings is a small one.")
    image_size: int = option(32, "height and width of the images.")
    epochs: int = option(8, "passes over the training images.")
    batch_size: int = option(128, "images of each process and micro-step.")
    gradient_accumulation_steps: int = option(1, "micro-steps in an optimizer step.")
    mixed_precision: Literal["no", "bf16", "fp16"] = option(
        "no", "of the model's operations; what `accelerate launch` is told is the default."
    )
    optimizer: str = option(
        "adamw",
        "of timm.optim.create_optimizer_v2 (adamw, muon, lamb, ...), or muon_split, soap or schedule_free; "
        "with TrAct, soap has shown no gain, and muon has ended lower.",
    )
    learning_rate: float = option(1e-3, "its highest value.")
    weight_decay: float = option(0.0, "not of biases and norms.")
    schedule: Literal["cosine", "constant"] = option(
        "cosine", "of the learning rate, by timm; constant is for schedule_free."
    )
    warmup_epochs: int = option(0, "epochs in which the learning rate rises from 0.")
    clip_grad_norm: float = option(0.0, "largest norm of the gradient, which TrAct has changed; 0 for none.")
    label_smoothing: float = option(0.0, "share of a label that goes to all classes.")
    mixup: float = option(0.0, "alpha of timm's mixup; 0 for none.")
    cutmix: float = option(0.0, "alpha of timm's cutmix; 0 for none.")
    crop_scale: float = option(1.0, "least share of an image's area in a random crop; 1 for no such crops.")
    crop_padding: int = option(0, "zeros around an image before a random crop of its size, as for CIFAR.")
    flip: float = option(0.5, "probability of a mirrored image.")
    color_jitter: float = option(0.0, "strength of timm's color jitter; not beside most of --auto_augment.")
    auto_augment: str | None = option(
        None, "in timm's notation, such as rand-m9-mstd0.5-mmax9-inc1 or 3a; or cifar10."
    )
    random_erasing: float = option(0.0, "probability of an erased rectangle.")
    ema_decay: float = option(0.0, "decay of averaged weights, which are then tested and saved; 0 for none.")
    lam: float = option(0.1, "TrAct's damping.")
    whiten_init: bool = option(False, "start with a whitened first layer, see hf_tract.whiten_first_layer.")
    seed: int = option(0, "of the weights, the order of the images and their augmentation.")


@dataclass
class Run:
    """Says where a run goes and how it is watched."""

    recipe: str | None = option(None, "a YAML file with values of the options above.")
    no_tract: bool = option(False, "train without TrAct.")
    output_dir: str = option("outputs/pretrain_vit", "folder of the model, its history and the checkpoints.")
    checkpointing_steps: str = option("epoch", "optimizer steps between checkpoints, or epoch, or never.")
    resume_from_checkpoint: str | None = option(None, "a checkpoint's folder, or latest.")
    report_to: str | None = option(None, "tensorboard, wandb, trackio, ..., or all.")
    num_workers: int = option(
        2, "processes that read images which do not fit in memory, or need timm's augmentations."
    )
    cpu: bool = option(False, "leave the accelerator alone.")
    license: str | None = option(None, "of the model, for its card.")
    push_to_hub: bool = option(False, "publish the model at the end, in a repository that holds none yet.")
    hub_model_id: str | None = option(None, "OWNER/NAME on the Hub; by default the name of output_dir.")
    hub_private_repo: bool = option(False, "make the repository a private one.")


def main() -> None:
    """Train, and leave a model with its card."""
    recipe, run = parse_arguments()
    hub_id = run.hub_model_id or Path(run.output_dir).absolute().name
    make_folder(Path(run.output_dir))
    if run.push_to_hub:
        check_token(hub_id)
        if IS_MAIN_PROCESS:
            hub_id = prepare_repository(hub_id, run.hub_private_repo)
    try:
        training = Training(recipe, run)
        training.run_epochs()
    except ImageError as error:
        # A worker process adds its traceback before the message.
        raise SystemExit(str(error).rpartition("ImageError: ")[2].strip()) from error
    except TrActError as error:
        stop(str(error))
    if not training.accelerator.is_main_process:
        return
    folder = Path(run.output_dir) / "model"
    save_model(training.best_model(), folder, training.look, training.data.names)
    training.record(hub_id).save(folder, hub_id)
    print(f"The model is in {folder}, with its card.")
    if run.push_to_hub:
        with uploading(folder, hub_id):
            commit = HfApi().upload_folder(repo_id=hub_id, folder_path=folder, commit_message="Add model")
            print(f"It is published: {commit.repo_url}")
    else:
        print(f"To publish it: python push_to_hub.py {run.output_dir} --repo_id OWNER/NAME")
    print(f"To fine-tune it: python transfer.py --checkpoint {folder}")


# Options


def parse_arguments() -> tuple[Recipe, Run]:
    """Read the recipe file and the command line, which wins; each wrong value ends the script with one line."""
    usage = "pretrain_vit.py [options]; --help lists them"
    first = argparse.ArgumentParser(usage=usage, add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    file = first.parse_known_args()[0].recipe
    arguments = sys.argv[1:]
    if file:
        arguments = [*recipe_arguments(file), *arguments]
    parser = HfArgumentParser([Recipe, Run], usage=usage, allow_abbrev=False)  # type: ignore[list-item]
    steps = int(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", 1))
    parser.set_defaults(
        mixed_precision=os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), gradient_accumulation_steps=steps
    )
    recipe, run, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    if unknown:
        parser.error(f"there is no option {unknown[0]}")
    check_recipe(recipe)
    check_augmentation(recipe)
    check_run(run)
    return recipe, run


def recipe_arguments(file: str) -> list[str]:
    """Return the values of a recipe file as command-line arguments, which are parsed alike."""
    try:
        values = dict(yaml.safe_load(Path(file).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        stop(f"--recipe {file} cannot be read, or has no lines such as `epochs: 8`: {one_line(error)}")
    known = [each.name for each in dataclasses.fields(Recipe)]
    arguments = []
    for name, value in values.items():
        if name not in known:
            stop(f"--recipe {file}: {name} is none of a recipe's options: {', '.join(known)}.")
        if isinstance(value, dict):
            value = json.dumps(value)
        elif name == "mixed_precision" and value is False:
            value = "no"  # which YAML reads as False
        if value is not None:
            arguments.append(f"--{name}={value}")
    return arguments


def check_recipe(recipe: Recipe) -> None:
    """Refuse numbers that cannot be meant, before anything is loaded."""
    for name in ("image_size", "epochs", "batch_size", "gradient_accumulation_steps", "lam", "learning_rate"):
        value = getattr(recipe, name)
        if not 0 < value < math.inf:
            stop(f"--{name} {value}: give a number above 0.")
    for name in ("label_smoothing", "flip", "crop_scale", "random_erasing", "ema_decay"):
        value = getattr(recipe, name)
        if not 0 <= value <= 1:
            stop(f"--{name} {value}: give a number from 0 to 1.")
    others = ("weight_decay", "clip_grad_norm", "mixup", "cutmix", "color_jitter")
    for name in ("train_samples", "test_samples", "seed", "warmup_epochs", "crop_padding", *others):
        value = getattr(recipe, name)
        if not value >= 0:
            stop(f"--{name} {value}: give 0 or more.")


def check_augmentation(recipe: Recipe) -> None:
    """Refuse augmentations that do not go together."""
    if (recipe.mixup or recipe.cutmix) and recipe.batch_size % 2:
        stop(f"--batch_size {recipe.batch_size}: --mixup and --cutmix take pairs, so it must be even.")
    policy = recipe.auto_augment or "cifar10"
    if recipe.color_jitter and policy != "cifar10" and "3a" not in policy:
        advice = "give 0, or one of the policies cifar10 and 3a"
        stop(f"--color_jitter {recipe.color_jitter}: timm leaves it out beside --auto_augment {policy}; {advice}.")


def check_run(run: Run) -> None:
    """Refuse what cannot be meant of checkpoints, trackers and folders."""
    steps = run.checkpointing_steps
    is_number = steps.isdigit() and int(steps) > 0
    if steps not in ("epoch", "never") and not is_number:
        stop(f"--checkpointing_steps {steps} must be epoch, never, or a number of optimizer steps.")
    trackers = [str(tracker) for tracker in get_available_trackers()]
    if run.report_to not in (None, "all", *trackers):
        stop(f"--report_to {run.report_to}: give one of {', '.join(trackers)}, all, or install it.")
    if run.num_workers < 0:
        stop(f"--num_workers {run.num_workers}: give 0 or more.")
    if Path(run.output_dir).is_file():
        stop(f"--output_dir {run.output_dir} is a file: name a folder.")


# Training


@dataclass
class TrainingProgress:
    """Counts what is done, and keeps the figures of each epoch; accelerate saves and restores it."""

    settings: dict[str, Any]  # on which the result depends
    epoch: int = 0
    batch: int = 0  # of the epoch
    step: int = 0
    loss: Any = 0.0  # sum over the epoch's batches
    history: list[dict[str, Any]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        return {**vars(self), "loss": float(self.loss)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint holds, unless it is of a run with other settings."""
        stored = state.get("settings", self.settings)
        changes = []
        for name, value in self.settings.items():
            before = stored.get(name, value)
            if before != value:
                changes.append(f"{name} {before}, not {value}")
        if changes:
            told = "; ".join(changes)
            stop(f"--resume_from_checkpoint: the run that is to be resumed has {told}.")
        vars(self).update(state)


class Training:
    """Trains a model as a recipe says, and goes on where a checkpoint was made."""

    def __init__(self, recipe: Recipe, run: Run) -> None:
        self.recipe, self.run = recipe, run
        self.accelerator = make_accelerator(recipe, run)
        set_seed(recipe.seed)
        with self.accelerator.main_process_first():
            self.data = load_images(recipe)
        images = recipe.batch_size * self.accelerator.num_processes
        if images > len(self.data.train):
            stop(f"--batch_size {recipe.batch_size}: all processes need {images} images, of {len(self.data.train)}.")
        self.look = measure_look(self.data.train, recipe.image_size)
        train_loader, test_loader = make_loaders(recipe, run, self.data, self.look)
        model = make_model(recipe, self.data.names)
        if recipe.whiten_init:
            whiten_first_layer(model, train_loader, recipe.lam)
        set_seed(recipe.seed, device_specific=True)  # so that dropout and mixup differ between processes
        optimizer = make_named_optimizer(recipe, model)
        self.handle = None
        if not run.no_tract:  # This is all that TrAct needs.
            self.handle = apply_tract(model, recipe.lam)
            say(self.handle.summary())
        prepared = self.accelerator.prepare(model, optimizer, train_loader, test_loader)
        self.model, self.optimizer, self.train_loader, self.test_loader = prepared
        self.steps_per_epoch = math.ceil(len(self.train_loader) / recipe.gradient_accumulation_steps)
        self.schedule = make_schedule(recipe, self.optimizer, self.steps_per_epoch)
        self.criterion, self.mixup = make_loss(recipe, len(self.data.names))
        settings = settings_of(recipe, run, self.accelerator.num_processes)
        self.progress = TrainingProgress(settings)
        self.ema = None
        self.accelerator.register_for_checkpointing(self.progress)
        if recipe.ema_decay:
            self.ema = ModelEmaV3(self.plain_model(), decay=recipe.ema_decay)
            self.accelerator.register_for_checkpointing(self.ema)
        self.resume()
        if run.report_to:
            words = {name: str(value) for name, value in dataclasses.asdict(recipe).items()}
            self.accelerator.init_trackers("pretrain_vit", words)

    def run_epochs(self) -> None:
        """Train what is left of the epochs, and test after each of them."""
        progress = self.progress
        steps = self.recipe.epochs * self.steps_per_epoch
        self.schedule.step_update(progress.step)
        with tqdm(total=steps, initial=progress.step, desc="training", disable=not IS_MAIN_PROCESS) as bar:
            while progress.epoch < self.recipe.epochs:
                self.train_epoch(bar)
                self.finish_epoch(bar)
        last = progress.history[-1]
        say(f"Test accuracy: top-1 {100 * last['top1']:.1f} %, top-5 {100 * last['top5']:.1f} %.")
        self.accelerator.end_training()

    def train_epoch(self, bar: Any) -> None:
        """Train on the batches of an epoch that have not been seen yet."""
        done = self.progress.batch
        loader = self.train_loader
        if done >= len(loader):
            return  # The checkpoint is of the epoch's last step.
        if done:
            loader = skip_first_batches(loader, done)
        loader.set_epoch(self.progress.epoch)
        loader.dataset.set_epoch(self.progress.epoch)  # which accelerate does not do for some kinds of loader
        self.model.train()
        self.optimizer.train()  # schedule_free trains other weights than it tests
        for pixels, labels in loader:
            loss = self.train_batch(pixels, labels)
            self.progress.batch += 1
            self.progress.loss += loss
            if self.accelerator.sync_gradients:
                self.finish_step(loss)
                bar.update()

    def train_batch(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Accumulate the gradient of a batch, of which the optimizer makes a step when there are enough of them."""
        with self.accelerator.accumulate(self.model):
            if self.mixup:
                pixels, labels = self.mixup(pixels, labels)
            loss: Tensor = self.criterion(logits_of(self.model(pixels)), labels)
            self.accelerator.backward(loss * self.micro_step_weight())
            if self.accelerator.sync_gradients and self.recipe.clip_grad_norm:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach().float()

    def micro_step_weight(self) -> float:
        """Return the weight by which a step's gradient is the mean over its micro-steps.

        It is 1 except in the last step of an epoch, which may have fewer of them: accelerate divides by the same
        number there.
        """
        full: int = self.accelerator.gradient_accumulation_steps
        begin = self.progress.batch - self.progress.batch % full
        return full / min(full, len(self.train_loader) - begin)

    def finish_step(self, loss: Tensor) -> None:
        """Set the learning rate, average the weights, log and save after an optimizer step."""
        progress = self.progress
        progress.step += 1
        self.schedule.step_update(progress.step)
        if self.ema:
            self.ema.update(self.plain_model(), step=progress.step)
        if self.run.report_to and progress.step % min(10, self.steps_per_epoch) == 0:
            figures = {"train/loss": float(loss), "train/lr": self.optimizer.param_groups[0]["lr"]}
            if self.handle:
                for name, value in stats_to_log(self.handle).items():
                    figures[f"train/{name}"] = value
            self.accelerator.log(figures, step=progress.step)
        every = self.run.checkpointing_steps
        if every.isdigit() and progress.step % int(every) == 0:
            progress.loss = self.summed_loss()  # since the main process alone saves it
            self.accelerator.save_state()

    def summed_loss(self) -> Tensor:
        """Return the sum of the losses of the epoch's batches, as the mean over all processes."""
        mine = torch.as_tensor(self.progress.loss, dtype=torch.float32, device=self.accelerator.device)
        mean: Tensor = self.accelerator.reduce(mine, "mean")
        return mean

    def finish_epoch(self, bar: Any) -> None:
        """Test the model, and write the figures of all epochs so far."""
        progress = self.progress
        self.optimizer.eval()
        loss = float(self.summed_loss()) / progress.batch
        scores = self.evaluate()
        progress.epoch += 1
        progress.batch = 0
        progress.loss = 0.0
        row = {"epoch": progress.epoch, "step": progress.step}
        progress.history.append({**row, "loss": loss, **scores})
        figures = {f"test/{name}": value for name, value in scores.items()}
        self.accelerator.log({"train/epoch_loss": loss, **figures}, step=progress.step)
        bar.set_postfix(loss=loss, **scores)
        if self.accelerator.is_main_process:
            lines = [json.dumps(row) + "\n" for row in progress.history]
            Path(self.run.output_dir, "history.jsonl").write_text("".join(lines))
        if self.run.checkpointing_steps == "epoch":
            self.accelerator.save_state()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return top-1 and top-5 on the test images of all processes."""
        model = self.model
        if self.ema:
            model = self.ema.module
            share_buffers(model)
        model.eval()
        scores, labels = [], []
        for pixels, numbers in self.test_loader:
            gathered = self.accelerator.gather_for_metrics((logits_of(model(pixels)).float(), numbers))
            scores.append(gathered[0].cpu().numpy())
            labels.append(gathered[1].cpu().numpy())
        return compute_top_k(EvalPrediction(np.concatenate(scores), np.concatenate(labels)))

    def resume(self) -> None:
        """Restore the checkpoint that is asked for, and remove those that a killed run made after it."""
        folder = Path(self.run.output_dir) / "checkpoints"
        found = sorted(folder.glob("checkpoint_*"), key=number_of_checkpoint)
        chosen = self.find_checkpoint(found)
        if chosen:
            try:
                self.accelerator.load_state(str(chosen))
            except (OSError, ValueError, RuntimeError, KeyError) as error:
                stop(f"--resume_from_checkpoint {chosen} does not belong to these options: {one_line(error)}")
            self.accelerator.project_configuration.iteration = number_of_checkpoint(chosen) + 1
            say(f"Resumed from {chosen}: epoch {self.progress.epoch + 1}, step {self.progress.step}.")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            Path(self.run.output_dir).mkdir(parents=True, exist_ok=True)
            for path in found:
                if number_of_checkpoint(path) >= self.accelerator.project_configuration.iteration:
                    shutil.rmtree(path)
        self.accelerator.wait_for_everyone()

    def find_checkpoint(self, found: list[Path]) -> Path | None:
        """Return the checkpoint that --resume_from_checkpoint means; None without that option."""
        wanted = self.run.resume_from_checkpoint
        if not wanted:
            if found:
                folder = found[0].parent
                stop(f"{folder} is not empty: add --resume_from_checkpoint latest, or name another --output_dir.")
            return None
        if wanted == "latest":
            written_last = f"custom_checkpoint_{len(self.accelerator._custom_objects) - 1}.pkl"
            complete = [path for path in found if (path / written_last).exists()]
            if not complete:  # They may be of a run with other options, which load_state refuses.
                complete = [path for path in found if (path / "custom_checkpoint_0.pkl").exists()]
            if complete:
                return complete[-1]
            say(f"There is no checkpoint in {self.run.output_dir}: training begins anew.")
            return None
        if not re.fullmatch(r"checkpoint_\d+", Path(wanted).name) or not Path(wanted).is_dir():
            stop(f"--resume_from_checkpoint {wanted} must be latest, or a folder that is named like checkpoint_3.")
        output = Path(self.run.output_dir)
        is_own = Path(wanted).resolve().parent == (output / "checkpoints").resolve()
        if not is_own and output.is_dir() and any(output.iterdir()):
            advice = f"name a new or empty --output_dir, not {output}"
            stop(f"--resume_from_checkpoint {wanted} is of another run: {advice}.")
        return Path(wanted)

    def best_model(self) -> nn.Module:
        """Return the model that was tested: the averaged weights where there are any."""
        model = self.plain_model()
        if self.ema:
            model = self.ema.module
        return model

    def plain_model(self) -> nn.Module:
        """Return the model without what accelerate and torch.compile have wrapped around it."""
        model: nn.Module = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model

    def record(self, hub_id: str) -> TrainingRecord:
        """Return what the model's card tells."""
        recipe, history = self.recipe, self.progress.history
        rows = []
        for row in history:
            rows.append({"epoch": row["epoch"], "loss": row["loss"], "accuracy": row["top1"], "top5": row["top5"]})
        settings = {name: value for name, value in dataclasses.asdict(recipe).items() if value and name != "lam"}
        scores = {"accuracy": rows[-1]["accuracy"]}
        if len(self.data.names) > 5:
            scores["top5"] = rows[-1]["top5"]
        base = None
        if is_checkpoint(recipe.model):
            base = without_prefix(recipe.model)
        record = TrainingRecord(
            name=hub_id.split("/")[-1],
            library="transformers",
            dataset=recipe.dataset,
            base_model=base,
            license=self.run.license,
            metrics=scores,
            history=rows,
            split=self.data.eval_split,
            seed=recipe.seed,
        )
        if self.accelerator.num_processes > 1:
            settings["processes"] = self.accelerator.num_processes
        # The record has left out the folders of this machine.
        settings |= {"dataset": record.dataset, "model": record.base_model or recipe.model}
        changes: dict[str, Any] = {"hyperparameters": settings}
        # It makes no difference to the result that a run was resumed.
        changes["command"] = re.sub(r" --resume_from_checkpoint[ =]\S+", "", record.command)
        if self.handle:
            changes["tract"] = self.handle.config
            changes["layers"] = [layer.name for layer in self.handle.layers]
        if is_timm(recipe.model):
            changes["library"] = "timm"
        return dataclasses.replace(record, **changes)


def share_buffers(model: torch.nn.Module) -> None:
    """Give each process the buffers of the first, which are saved: each has seen other images."""
    for buffer in model.buffers():
        broadcast(buffer)


def settings_of(recipe: Recipe, run: Run, processes: int) -> dict[str, Any]:
    """Return what a run that is resumed must have in common with the one that wrote the checkpoint."""
    settings = dataclasses.asdict(recipe)
    settings["dataset"] = Path(recipe.dataset).name  # A folder may have been moved.
    # More processes with smaller batches make the same steps.
    settings["images in a batch of all processes"] = processes * settings.pop("batch_size")
    settings["no_tract"] = run.no_tract
    return settings


def number_of_checkpoint(folder: Path) -> int:
    """Return the number in the name of a checkpoint's folder."""
    return int(folder.name.rpartition("_")[2])


def make_accelerator(recipe: Recipe, run: Run) -> Accelerator:
    """Make what runs the model on all devices and processes."""
    try:
        accelerator = Accelerator(
            # torchrun's processes on a CPU do not find each other without this.
            cpu=run.cpu or not torch.accelerator.is_available(),
            mixed_precision=recipe.mixed_precision,
            gradient_accumulation_steps=recipe.gradient_accumulation_steps,
            log_with=run.report_to,
            project_config=ProjectConfiguration(run.output_dir, automatic_checkpoint_naming=True, total_limit=2),
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=recipe.seed),
            step_scheduler_with_optimizer=False,
        )
    except (ValueError, ImportError) as error:
        stop(f"--mixed_precision {recipe.mixed_precision} or --report_to {run.report_to}: {one_line(error)}")
    steps = accelerator.gradient_accumulation_steps
    if steps != recipe.gradient_accumulation_steps:
        given = f"--gradient_accumulation_steps {recipe.gradient_accumulation_steps}"
        stop(f"{given}: accelerate's launcher was told {steps}. Tell both the same, or only one of them.")
    return accelerator


def make_named_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """Make an optimizer by its name in timm, or muon_split, soap or schedule_free."""
    if recipe.optimizer in ("soap", "schedule_free"):
        return make_uncommon_optimizer(recipe, model)
    name = recipe.optimizer
    momentum = 0.9
    settings: dict[str, Any] = {}
    if name in ("muon", "muon_split"):
        momentum = 0.95
        settings["betas"] = (0.9, 0.999)  # AdamW's own, for what Muon leaves to it
    if name == "muon_split":
        name = "muon"
        first = [f"{layer.name}.*" for layer in find_first_layers(model)]
        settings["fallback_list"] = (*first, *HEADS)
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            model, name, recipe.learning_rate, recipe.weight_decay, momentum, **settings
        )
    except (ValueError, AssertionError, TypeError, RuntimeError, ImportError) as error:
        stop(f"--optimizer {recipe.optimizer}: timm.optim.create_optimizer_v2 cannot make it: {one_line(error)}")
    return optimizer


def make_uncommon_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """Make an optimizer that timm does not have."""
    try:
        from pytorch_optimizer import SOAP, ScheduleFreeAdamW
    except ImportError:
        stop(f"--optimizer {recipe.optimizer} needs pytorch_optimizer: pip install pytorch_optimizer.")
    groups = param_groups_weight_decay(model, recipe.weight_decay)
    if recipe.optimizer == "soap":
        soap: torch.optim.Optimizer = SOAP(groups, recipe.learning_rate)
        return soap
    if recipe.schedule != "constant":
        say(f"schedule_free averages its weights in place of --schedule {recipe.schedule}: constant suits it better.")
    averaging: torch.optim.Optimizer = ScheduleFreeAdamW(groups, recipe.learning_rate)
    return averaging


def make_schedule(recipe: Recipe, optimizer: Any, steps_per_epoch: int) -> Any:
    """Make a learning rate's schedule by its name in timm; it counts optimizer steps."""
    name = recipe.schedule
    lowest = 0.0
    if name == "constant":  # which timm has since 1.0.31
        name, lowest = "cosine", recipe.learning_rate
    schedule, _ = create_scheduler_v2(
        optimizer,
        name,
        recipe.epochs,
        min_lr=lowest,
        warmup_epochs=recipe.warmup_epochs,
        warmup_lr=0.0,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    return schedule


def make_loss(recipe: Recipe, classes: int) -> tuple[nn.Module, Mixup | None]:
    """Return the loss, and what mixes images and labels, if anything does."""
    if not recipe.mixup and not recipe.cutmix:
        return nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing), None
    mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=classes)
    return SoftTargetCrossEntropy(), mixup


# Models


class Look(NamedTuple):
    """Holds how a model sees images: their side, and each channel's mean and deviation on the scale 0 to 1."""

    size: int
    mean: list[float]
    std: list[float]


MODEL_ERRORS = (OSError, ValueError, TypeError, KeyError, AssertionError, RuntimeError, StrictDataclassError)


def make_model(recipe: Recipe, names: list[str]) -> nn.Module:
    """Make the classifier that a recipe names, and try it on an image of its size."""
    name = recipe.model
    settings = model_settings(recipe)
    model: nn.Module
    try:
        if name in CONFIG_MAPPING:
            config = AutoConfig.for_model(name, **settings, **label_settings(names))
            model = AutoModelForImageClassification.from_config(config)
        elif is_timm(name):
            model = timm.create_model(name, num_classes=len(names), **settings)
        else:
            model = load_checkpoint(name, names)
            say(
                f"--model {name} gets images of --image_size {recipe.image_size}, standardised as this data set needs "
                f"it. transfer.py gives a checkpoint what its own processor makes."
            )
        freeze_unused(model.eval(), torch.zeros(1, 3, recipe.image_size, recipe.image_size))
    except MODEL_ERRORS as error:
        kinds = "a model type of transformers (vit, ...), a name of timm or a checkpoint"
        size = f"for images of --image_size {recipe.image_size}"
        stop(f"--model {name} must be {kinds}, and cannot be made {size}: {one_line(error)}")
    return model


def freeze_unused(model: nn.Module, pixels: Tensor) -> None:
    """Freeze the parameters that the scores do not depend on, such as the mask token of Dinov2.

    Several processes would wait for their gradients.
    """
    logits_of(model(pixels)).sum().backward()
    unused = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.requires_grad_(False)
            unused.append(name)
    model.zero_grad()
    if unused:
        say(f"Not trained, since no score depends on it: {', '.join(unused)}.")


def is_timm(model: str) -> bool:
    """Return whether timm makes the model; a type of transformers comes first."""
    return model not in CONFIG_MAPPING and bool(timm.is_model(model))


def is_checkpoint(model: str) -> bool:
    """Return whether a model has weights already."""
    return model not in CONFIG_MAPPING and not is_timm(model)


def model_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings in `--model_config`; transformers itself would ignore a misspelt one."""
    try:
        settings = dict(json.loads(recipe.model_config))
    except (ValueError, TypeError):
        stop(f"--model_config {recipe.model_config}: give JSON, such as '{json.dumps(SMALL_VIT)}'.")
    if recipe.model not in CONFIG_MAPPING:
        if settings and is_checkpoint(recipe.model):
            stop(f"--model_config is for random weights, and {recipe.model} is a checkpoint: leave it out.")
        return settings
    known = AutoConfig.for_model(recipe.model)
    for name in settings:
        if not hasattr(known, name):
            stop(f"--model_config: {recipe.model} has no setting {name!r}.")
    if recipe.model == "vit" and not settings:
        settings = SMALL_VIT
    return {"image_size": recipe.image_size, **settings}


def label_settings(names: list[str]) -> dict[str, Any]:
    """Return what a configuration of transformers holds about the classes."""
    numbers = {name: number for number, name in enumerate(names)}
    return {"id2label": dict(enumerate(names)), "label2id": numbers, "num_labels": len(names)}


def load_checkpoint(name: str, names: list[str]) -> PreTrainedModel:
    """Load a checkpoint of transformers or timm, with a new head where it has other classes."""
    model: PreTrainedModel = AutoModelForImageClassification.from_pretrained(
        without_prefix(name), ignore_mismatched_sizes=True, **label_settings(names)
    )
    if model.config.model_type == "timm_wrapper":
        model.config.label_names = names  # Without this it saves the names that it had.
    return model


def without_prefix(name: str) -> str:
    """Return a checkpoint's name without timm's prefix of the Hub."""
    return name.removeprefix("hf-hub:").removeprefix("hf_hub:")


def logits_of(output: Any) -> Tensor:
    """Return the scores in what a model of transformers or timm returns."""
    scores: Tensor = getattr(output, "logits", output)
    return scores


def save_model(model: nn.Module, folder: Path, look: Look, names: list[str]) -> None:
    """Save a model so that `from_pretrained` or timm loads it, with how test images are prepared and the classes."""
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(folder)
        make_processor(look).save_pretrained(folder)
        return
    pretrained: Any = model.pretrained_cfg
    pretrained.update(mean=look.mean, std=look.std, input_size=(3, look.size, look.size))
    pretrained.update(interpolation="bicubic", crop_pct=1.0, crop_mode="center")
    timm.models.save_for_hf(model, folder, model_config={"label_names": names}, safe_serialization=True)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config.get("model_args", {}).pop("num_classes", None)  # transformers' wrapper of timm would give it twice.
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def one_line(error: Exception) -> str:
    """Return the beginning of an error's text in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


# The Hub


def check_token(repo_id: str) -> None:
    """Refuse to begin a training whose model could not be pushed for want of a token."""
    if get_token() is None:
        stop(f"{repo_id} cannot be pushed to without a token: set HF_TOKEN or run `hf auth login`.")


def prepare_repository(repo_id: str, private: bool = False) -> str:
    """Return a repository's whole id, and make it if there is none; refuse one that is public or holds a model.

    It is made before the training, as Trainer does it, since that shows a token that may not write.
    """
    api = HfApi()
    try:
        if "/" not in repo_id:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        files = api.list_repo_files(repo_id)
        is_public = not api.model_info(repo_id).private
    except Exception as error:  # The errors of the Hub's client and of its connections have no common class.
        stop(f"--push_to_hub: {repo_id} cannot be written to: {one_line(error)}")
    if private and is_public:
        stop(f"--hub_private_repo: {repo_id} exists and is public. Change it on the Hub, or name another.")
    if any(name.endswith(MODELS) for name in files):
        advice = "name another by --hub_model_id, or push afterwards by push_to_hub.py --update"
        stop(f"{repo_id} holds a model already: {advice}.")
    return repo_id


@contextlib.contextmanager
def uploading(folder: str | Path, repo_id: str, *options: str) -> Iterator[None]:
    """Turn an error of an upload inside into one line, with the command that uploads the rest.

    Args:
        folder: what is uploaded.
        repo_id: the repository that it is uploaded to.
        options: those of the command.
    """
    try:
        yield
    except Exception as error:  # The errors of the Hub's client and of its connections have no common class.
        reason = one_line(error)
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            reason = "the token may not write there; use one of an owner or member that may."
        left_out = [f"--exclude={pattern}" for pattern in IGNORED]
        command = shlex.join(["hf", "upload", repo_id, str(folder), ".", *left_out, *options])
        stop(f"The upload to {repo_id} did not end: {reason} All is still in {folder}; to go on: {command}")


# Images in batches


def make_loaders(recipe: Recipe, run: Run, data: ImageData, look: Look) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Make loaders of the training images, which are augmented, and of the test images."""
    count = len(data.train) + len(data.test)
    fits = count * 3 * look.size**2 <= MAX_BYTES
    by_timm = recipe.auto_augment or recipe.color_jitter or recipe.random_erasing or recipe.crop_scale < 1
    train: Any
    test: Any
    if fits and not by_timm:
        train = ImagesInMemory(data.train, look, recipe.flip, recipe.crop_padding, recipe.seed)
    else:
        train = AugmentedImages(data.train, make_augmentation(recipe, look), recipe.seed)
    if fits:
        test = ImagesInMemory(data.test, look)
    else:
        processor = make_processor(look)
        test = AugmentedImages(data.test, functools.partial(prepare_image, processor))
    train_loader = DataLoader(train, shuffle=True, drop_last=True, **loader_options(train, recipe, run))
    test_loader = DataLoader(test, **loader_options(test, recipe, run))
    return train_loader, test_loader


def loader_options(images: Any, recipe: Recipe, run: Run) -> dict[str, Any]:
    """Return what a loader of these images is told beside its order."""
    options: dict[str, Any] = {}
    options["batch_size"] = recipe.batch_size
    options["pin_memory"] = torch.accelerator.is_available()
    # Each pass draws a seed for the workers, and a run that is resumed begins one pass more. Drawn from torch's own
    # generator, it would change what dropout draws.
    options["generator"] = torch.Generator().manual_seed(recipe.seed)
    if isinstance(images, ImagesInMemory):
        options["collate_fn"] = default_convert  # They come as batches already.
    else:
        options["num_workers"] = run.num_workers
    return options


def make_augmentation(recipe: Recipe, look: Look) -> Callable[[Image.Image], Tensor]:
    """Make timm's transforms of training images, after those of CIFAR's recipes that timm does not have."""
    first: list[Any] = []
    if recipe.crop_padding:
        first = [v2.Resize(look.size), v2.CenterCrop(look.size), v2.RandomCrop(look.size, recipe.crop_padding)]
    policy = recipe.auto_augment
    if policy == "cifar10":
        first.append(v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10))
        policy = None
    options: dict[str, Any] = {"scale": (recipe.crop_scale, 1.0)}
    if recipe.crop_scale == 1:
        options["ratio"] = (1.0, 1.0)
    try:
        by_timm = create_transform(
            look.size,
            is_training=True,
            hflip=recipe.flip,
            color_jitter=recipe.color_jitter,
            auto_augment=policy,
            re_prob=recipe.random_erasing,
            interpolation="bicubic",
            mean=look.mean,
            std=look.std,
            **options,
        )
    except (AssertionError, ValueError, KeyError) as error:
        stop(f"--auto_augment {policy} is neither timm's notation nor cifar10: {one_line(error)}")
    augmentation: Callable[[Image.Image], Tensor] = v2.Compose([*first, by_timm])
    return augmentation


def make_processor(look: Look) -> CLIPImageProcessor:
    """Make the image processor that prepares test images and is saved: it resizes the shorter side, and crops."""
    square = {"height": look.size, "width": look.size}
    shorter_side = {"shortest_edge": look.size}
    return CLIPImageProcessor(size=shorter_side, crop_size=square, image_mean=look.mean, image_std=look.std)


def make_square(processor: CLIPImageProcessor, image: Image.Image) -> Tensor:
    """Resize and crop an image of any shape to uint8 (3, size, size)."""
    batch = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")
    pixels: Tensor = batch["pixel_values"][0]
    return pixels


def prepare_image(processor: Any, image: Image.Image) -> Tensor:
    """Resize, crop and normalise an image as an image processor of transformers or timm does."""
    batch = processor(image, return_tensors="pt")
    pixels: Tensor = batch["pixel_values"][0]
    return pixels


def measure_look(rows: datasets.Dataset, size: int) -> Look:
    """Measure the mean and the deviation of each channel over at most 1000 images."""
    processor = make_processor(Look(size, [0.0] * 3, [1.0] * 3))
    chosen = np.random.default_rng(0).permutation(len(rows))[:1000]
    squares = []
    for index in chosen:
        image = read_image(rows, int(index))
        squares.append(make_square(processor, image))
    pixels = torch.stack(squares) / 255
    std = pixels.std((0, 2, 3)).clamp(min=1e-3)  # for images of one colour
    return Look(size, pixels.mean((0, 2, 3)).tolist(), std.tolist())


class ImagesInMemory(Dataset[tuple[Tensor, Tensor]]):
    """Holds decoded images, and crops, mirrors and normalises a whole batch at once.

    An image's crop depends on `seed`, the epoch and its index alone, and so not on where a run was resumed.
    """

    def __init__(self, rows: datasets.Dataset, look: Look, flip: float = 0.0, padding: int = 0, seed: int = 0) -> None:
        processor = make_processor(look)
        self.pixels = torch.empty(len(rows), 3, look.size, look.size, dtype=torch.uint8)
        for index in tqdm(range(len(rows)), "decoding images", leave=False, disable=not IS_MAIN_PROCESS):
            self.pixels[index] = make_square(processor, read_image(rows, index))
        self.labels = torch.tensor(rows["label"])
        self.mean = torch.tensor(look.mean).view(3, 1, 1)
        self.std = torch.tensor(look.std).view(3, 1, 1)
        self.flip, self.padding, self.seed = flip, padding, seed
        self.set_epoch(0)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return a batch; PyTorch's loader calls this method where there is one."""
        pixels = self.pixels[indices]
        if self.padding:
            size = pixels.shape[-1]
            windows = F.pad(pixels, [self.padding] * 4).unfold(2, size, 1).unfold(3, size, 1)
            top, left = self.corners[indices].T
            pixels = windows[torch.arange(len(pixels)), :, top, left]
        flipped = torch.where(self.flips[indices].view(-1, 1, 1, 1), pixels.flip(-1), pixels)
        return (flipped / 255 - self.mean) / self.std, self.labels[indices]

    def set_epoch(self, epoch: int) -> None:
        """Draw the crops and flips of an epoch."""
        draw = np.random.default_rng([self.seed, epoch])
        self.corners = torch.from_numpy(draw.integers(0, 2 * self.padding + 1, (len(self), 2)))
        self.flips = torch.from_numpy(draw.random(len(self)) < self.flip)


class AugmentedImages(Dataset[tuple[Tensor, int]]):
    """Transforms images one by one; decoded ones stay in memory until it is full, if no worker process reads them.

    What a transform draws depends on `seed`, the epoch and the image's index alone, and so not on the number of
    workers and processes, nor on where a run was resumed.
    """

    def __init__(self, rows: datasets.Dataset, transform: Callable[[Image.Image], Tensor], seed: int = 0) -> None:
        self.rows, self.transform, self.seed = rows, transform, seed
        # Worker processes that live for several epochs see it change, since they share its memory.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.labels: list[int] = list(rows["label"])
        self.decoded: dict[int, Image.Image] = {}
        self.free = MAX_BYTES

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.decode(index)
        # timm draws from all three generators, whose states belong to the training.
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        sequence = np.random.SeedSequence([self.seed, int(self._epoch), index])
        seed = int(sequence.generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 0.1 ms.
        try:
            return self.transform(image), self.labels[index]
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])

    def decode(self, index: int) -> Image.Image:
        """Decode an image, or find it decoded."""
        if index in self.decoded:
            return self.decoded[index]
        image = read_image(self.rows, index)
        size = 3 * image.width * image.height
        # A worker process mostly ends with the epoch, and would keep what is never read again.
        if size <= self.free and get_worker_info() is None:
            self.free -= size
            self.decoded[index] = image
        return image

    def set_epoch(self, epoch: int) -> None:
        """Change what the transforms draw."""
        self._epoch.fill_(epoch)


# Photo crops: a small data set without a download

CELL = 48
CROP = 32
PHOTOGRAPHS = [
    *("astronaut", "brick", "camera", "cell", "chelsea", "clock_motion", "coffee", "coins", "grass", "gravel"),
    *("hubble_deep_field", "ihc", "moon", "motorcycle_left", "page", "retina", "rocket", "text"),
    *("china", "flower"),  # in scikit-learn, all others in scikit-image
]


def photo_crops() -> datasets.DatasetDict:
    """Make a data set of photographs: which of them is a crop of 32x32 pixels taken from?"""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=PHOTOGRAPHS)})
    splits = datasets.DatasetDict()
    for split, count in {"train": 300, "test": 100}.items():
        columns: dict[str, list[Any]] = {"image": [], "label": []}
        for label, name in enumerate(PHOTOGRAPHS):
            columns["image"] += draw_crops(read_photograph(name), label, split, count)
            columns["label"] += [label] * count
        splits[split] = datasets.Dataset.from_dict(columns, features=features)
    return splits


def draw_crops(photograph: np.ndarray, label: int, split: str, count: int) -> list[Image.Image]:
    """Draw crops from cells of 48x48 pixels; a quarter of a photograph's cells is for testing alone."""
    down, across = photograph.shape[0] // CELL, photograph.shape[1] // CELL
    cells = np.random.default_rng([0, label]).permutation(down * across)
    test_cells, train_cells = np.split(cells, [math.ceil(len(cells) / 4)])
    cells = {"train": train_cells, "test": test_cells}[split]
    draw = np.random.default_rng([0, label, split == "test"])
    crops = []
    for _ in range(count):
        corner = CELL * np.array(divmod(draw.choice(cells), across))
        top, left = corner + draw.integers(0, CELL - CROP + 1, size=2)
        crops.append(Image.fromarray(photograph[top : top + CROP, left : left + CROP]))
    return crops


def read_photograph(name: str) -> np.ndarray:
    """Read a photograph out of scikit-image or scikit-learn, as RGB."""
    folders = [Path(skimage.data.__file__).parent, Path(sklearn.datasets.__file__).parent / "images"]
    files = [file for folder in folders for file in folder.glob(f"{name}.*")]
    with Image.open(files[0]) as image:
        return np.asarray(image.convert("RGB"))


# Images of your own

BUILT_IN: dict[str, Callable[[], datasets.DatasetDict]] = {"photo_crops": photo_crops}
EVAL_SPLITS = ("test", "validation", "val", "valid", "dev")
LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "cls")
HELD_OUT = 0.2  # of a data set that has no split to test on
NOT_IMAGES = (".arrow", ".csv", ".db", ".ini", ".json", ".jsonl", ".md", ".parquet", ".txt", ".xml", ".yaml")


def say(message: str) -> None:
    """Print a line, in the main process only."""
    if IS_MAIN_PROCESS:
        print(message, flush=True)


def make_folder(folder: Path) -> None:
    """Make a folder of results, and end the script now if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        stop(f"--output_dir {folder} cannot be written to: {error}")


def stop(message: str) -> NoReturn:
    """End the script with one line, which only the main process prints."""
    raise SystemExit(message if IS_MAIN_PROCESS else 1)


def load_images(options: DataOptions) -> ImageData:
    """Load the images that `options` name, and find their columns, their classes and the split to test on."""
    splits = read_splits(options)
    check_splits(splits, options)
    train = pick_columns(splits[options.train_split], options)
    names = class_names(train, options)
    train = number_labels(train, names, options)
    report_empty_classes(train, names, options)
    eval_split = options.eval_split or find_eval_split(splits, options)
    if eval_split:
        test = pick_columns(splits[eval_split], options)
        test = number_labels(test, names, options)
    else:
        train, test = hold_out(train, options)
    train = as_asked(train, options.train_samples, options)
    test = as_asked(test, options.test_samples, options)
    return ImageData(train, test, names, eval_split or f"a held-out fifth of {options.train_split}")


def check_splits(splits: datasets.DatasetDict, options: DataOptions) -> None:
    """Refuse names of splits that are not there."""
    for option in ("train_split", "eval_split"):
        split = getattr(options, option)
        if split and split not in splits:
            stop(f"--{option} {split}: {options.dataset} has the splits {', '.join(splits)}.")


def read_splits(options: DataOptions) -> datasets.DatasetDict:
    """Read a built-in data set, a folder that `save_to_disk` wrote, or what `datasets.load_dataset` reads."""
    name = options.dataset
    if name in BUILT_IN:
        return make_built_in(name)
    folder = Path(name).expanduser()
    is_path = folder.is_absolute() or name.startswith((".", "~"))
    if is_path and not folder.exists():
        stop(f"--dataset {name}: there is no such folder.")
    if folder.is_file():
        stop(f"--dataset {name} is a file: name its folder.")
    if folder.is_dir():
        name = str(folder.absolute())  # A folder named csv or text would mean a reader of `datasets`.
    # Otherwise the drawn rows would be noted in the data set's folder, which may be read-only.
    datasets.disable_caching()
    try:
        if (folder / "dataset_dict.json").exists():
            return datasets.DatasetDict.load_from_disk(name)
        if (folder / "state.json").exists():
            train = datasets.Dataset.load_from_disk(name)
            return datasets.DatasetDict(train=train)
        builder = datasets.load_dataset_builder(name, options.dataset_config)
        check_files(builder, options)
        builder.download_and_prepare()
        return builder.as_dataset()
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(f"{error} {error.__cause__ or ''}".split())
        expected = "a folder of images by class or of parquet files, or a Hub id"
        stop(f"--dataset {options.dataset} must be {expected}, and cannot be read: {reason[:300]}")


def make_built_in(name: str) -> datasets.DatasetDict:
    """Make a built-in data set; a folder of its name needs a path before it."""
    if Path(name).is_dir():
        say(f"--dataset {name} is built in; the folder of that name is ./{name}.")
    return BUILT_IN[name]()


def check_files(builder: datasets.DatasetBuilder, options: DataOptions) -> None:
    """Refuse a folder's file that is read twice, and say which of its files are not read."""
    root = Path(options.dataset).expanduser().resolve()
    if not root.is_dir():
        return
    read: dict[str, str] = {}
    for split, files in builder.config.data_files.items():
        for file in files:
            if file in read:
                stop(
                    f"--dataset {options.dataset}: {file} would be read twice, for {read[file]} and for {split}. A "
                    f"folder is a split if its name has a word such as train, test, val or dev: rename all others."
                )
            read[file] = split
    unread: Counter[str] = Counter()
    for name in glob.iglob("**/*.*", root_dir=root, recursive=True):
        path = root / name
        if path.as_posix() not in read and path.suffix.lower() not in NOT_IMAGES and path.is_file():
            unread[f"{Path(name).parent} ({path.suffix})"] += 1
    if unread:
        places = ", ".join(sorted(unread)[:5])
        say(
            f"{options.dataset}: {unread.total()} files are not read, among them those of {places}. HEIC and AVIF "
            f"must be converted to JPEG or PNG. A folder is a split if its name has a word such as train, test, "
            f"val or dev, and folders beside it are not read: rename it if it is a class."
        )


def pick_columns(rows: datasets.Dataset, options: DataOptions) -> datasets.Dataset:
    """Return the two columns that are used as `image` and `label`; images are decoded later, one by one."""
    images = []
    labels = []
    for column, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            images.append(column)
        if isinstance(feature, datasets.ClassLabel) or column in LABEL_COLUMNS:
            labels.append(column)
    image = find_column(rows, "image_column", images, options)
    label = find_column(rows, "label_column", labels, options)
    if image not in images:
        stop(f"--image_column {image} holds no images, but {rows.features[image]}.")
    rows = rows.select_columns([image, label])
    rows = rows.rename_columns({image: "image", label: "label"})
    return rows.cast_column("image", datasets.Image(decode=False))


def find_column(rows: datasets.Dataset, option: str, known: list[str], options: DataOptions) -> str:
    """Return the column that an option names, or else the first of those that are known for it."""
    named: str | None = getattr(options, option)
    columns = ", ".join(rows.column_names)
    if named and named not in rows.column_names:
        stop(f"--{option} {named}: {options.dataset} has the columns {columns}.")
    if not named and not known:
        advice = f"name it by --{option}, or sort the images into a folder for each class"
        stop(f"--dataset {options.dataset}: which of its columns is it ({columns})? Please {advice}.")
    return named or known[0]


def labels_in(rows: datasets.Dataset) -> set[Any]:
    """Return the different labels, without a walk over the rows."""
    return set(rows.select_columns("label").unique("label"))


def is_labelled(rows: datasets.Dataset) -> bool:
    """Return whether each row has a label; the Hub's test splits often have None or -1 in place of labels."""
    labels = labels_in(rows)
    return len(rows) > 0 and None not in labels and -1 not in labels


def class_names(train: datasets.Dataset, options: DataOptions) -> list[str]:
    """Return the names of the classes; labels without names are named by themselves."""
    feature = train.features["label"]
    if not isinstance(feature, datasets.ClassLabel | datasets.Value):
        stop(f"--dataset {options.dataset}: labels must be words or numbers, and are {feature}.")
    if not is_labelled(train):
        stop(f"--train_split {options.train_split}: {options.dataset} has rows without a label there.")
    if isinstance(feature, datasets.ClassLabel):
        names = list(feature.names)
    else:
        names = [str(label) for label in sorted(labels_in(train))]
    if len(names) < 2:
        stop(f"--dataset {options.dataset} has one class, {names[0]}: a classifier needs two or more.")
    return names


def number_labels(rows: datasets.Dataset, names: list[str], options: DataOptions) -> datasets.Dataset:
    """Return the rows with the positions of their labels among `names`."""
    if not is_labelled(rows):
        stop(f"--eval_split {options.eval_split}: {options.dataset} has rows without a label there.")
    feature = rows.features["label"]
    has_numbers = isinstance(feature, datasets.ClassLabel)
    if has_numbers and feature.names == names:
        return rows
    words = [str(label) for label in rows["label"]]
    if has_numbers:  # Those of another list of names.
        words = feature.int2str(list(map(int, words)))
    unknown = sorted(set(words) - set(names))
    if unknown:
        stop(f"--dataset {options.dataset}: no training image has the labels {unknown[:5]}, which are tested.")
    feature = datasets.ClassLabel(names=names)
    numbers = feature.str2int(words)
    return rows.remove_columns("label").add_column("label", numbers, feature=feature)


def find_eval_split(splits: datasets.DatasetDict, options: DataOptions) -> str | None:
    """Return the first split to test on that has labels; None if there is none."""
    for split in EVAL_SPLITS:
        if split in splits and is_labelled(pick_columns(splits[split], options)):
            return split
    return None


def hold_out(rows: datasets.Dataset, options: DataOptions) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split off a share of the rows to test on, the same at each call, and say so."""
    if len(rows) < 2:
        stop(f"--dataset {options.dataset} has one image, and needs others to test on.")
    how = "the same share of each class"
    try:
        parts = rows.train_test_split(HELD_OUT, seed=0, stratify_by_column="label")
    except ValueError:  # A class has fewer images than that takes.
        how = "whatever their class"
        parts = rows.train_test_split(HELD_OUT, seed=0)
    count = len(parts["test"])
    say(
        f"{options.dataset} has no split to test on: {count} of its {len(rows)} images are held out for that, "
        f"drawn with seed 0, {how}. To choose them yourself, make folders train and test."
    )
    return parts["train"], parts["test"]


def report_empty_classes(train: datasets.Dataset, names: list[str], options: DataOptions) -> None:
    """Say which classes have no image to learn from, and which class folders are empty."""
    root = Path(options.dataset).expanduser()
    folders = glob.glob("**/", root_dir=root, recursive=True)
    empty = {Path(folder).name for folder in folders if not os.listdir(root / folder)}
    empty = {*names, *empty.difference(EVAL_SPLITS)}
    for number in labels_in(train):
        empty.discard(names[number])
    if empty:
        classes = ", ".join(sorted(empty))
        say(f"{options.dataset} has no training image of {classes}: such a class is not learned.")


def as_asked(rows: datasets.Dataset, count: int, options: DataOptions) -> datasets.Dataset:
    """Return `count` of the rows, all for 0, without corrupt images if the options say so."""
    rows = sample(rows, count)
    if options.corrupt_images == "skip":
        rows = drop_corrupt(rows)
    return rows


def sample(rows: datasets.Dataset, count: int) -> datasets.Dataset:
    """Return `count` rows drawn with seed 0, or all for 0."""
    if not count:
        return rows
    return rows.shuffle(seed=0).select(range(min(count, len(rows))))


def drop_corrupt(rows: datasets.Dataset) -> datasets.Dataset:
    """Return the rows whose images can be read, and name the others."""
    readable = []
    corrupt = []
    for index in tqdm(range(len(rows)), "looking for corrupt images", leave=False, disable=not IS_MAIN_PROCESS):
        try:
            read_image(rows, index)
        except ImageError as error:
            # What it advises after the colon is this.
            reason = str(error).rpartition(": ")[0]
            corrupt.append(f"Left out: {reason}.")
        else:
            readable.append(index)
    if corrupt:
        say("\n".join(corrupt))
    if not readable:
        stop("--corrupt_images skip: not one image is left.")
    return rows.select(readable)


def read_image(rows: datasets.Dataset, index: int) -> Image.Image:
    """Decode an image as 8-bit RGB, turned as its EXIF data say.

    Transparency is dropped, as in transformers' pipelines, which later classify such images.

    Raises:
        ImageError: if the image is corrupt, or has numbers on a scale that cannot be known.
    """
    encoded = rows[index]["image"] or {"path": "", "bytes": None}
    name = encoded["path"] or f"image {index}"
    source = encoded["path"] or ""
    if encoded["bytes"]:
        source = io.BytesIO(encoded["bytes"])
    try:
        with Image.open(source) as image:
            turned = ImageOps.exif_transpose(image)
        if turned.mode.startswith(("I", "F")):
            return scale_to_8_bits(turned, name)
        if turned.mode == "P":
            turned = turned.convert("RGBA")  # which knows each way to store a palette's transparency
        return turned.convert("RGB")
    except ImageError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        advice = "mend it, or leave such images out by --corrupt_images skip"
        raise ImageError(f"{name} cannot be read ({error}): {advice}.") from error


def scale_to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """Return a 16-bit or float image as 8-bit RGB; Pillow itself cuts off all values above 255."""
    values = np.asarray(image, dtype=np.float64)
    top = 65535.0
    if image.mode == "F":
        top = 1.0
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= top):
        found = f"values from {low:g} to {high:g} in Pillow's mode {image.mode}"
        raise ImageError(f"{name} has {found}: scale integers to 0 ... 65535 and floats to 0 ... 1 before.")
    scaled = (values * 255 / top).round().astype(np.uint8)
    return Image.fromarray(scaled).convert("RGB")


if __name__ == "__main__":
    main()
