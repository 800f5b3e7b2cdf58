"""The recipe of a pre-training run, and the options of the run itself: YAML below, the command line above."""

import argparse
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from benchmarks.training.image_data import DataArguments


@dataclass
class Recipe(DataArguments):
    """What is trained and how: the fields of a recipe file."""

    model: str = field(default="vit", metadata={"help": "a transformers model type, a timm name, or a checkpoint"})
    model_config: str = field(
        default="{}",
        metadata={"help": "JSON: settings of a model of random weights; a recipe's are for its own model"},
    )
    image_size: int = 32
    mean: list[float] = field(
        default_factory=list, metadata={"help": "of each channel, 0 to 1; measured where not given"}
    )
    std: list[float] = field(
        default_factory=list, metadata={"help": "of each channel, 0 to 1; measured where not given"}
    )
    epochs: int = 8
    batch_size: int = field(default=128, metadata={"help": "images of one process and micro-step"})
    gradient_accumulation_steps: int = 1
    mixed_precision: str = field(default="no", metadata={"help": "no, bf16 or fp16"})
    channels_last: bool = field(
        default=False, metadata={"help": "the memory format in which convolutions are often faster"}
    )
    optimizer: str = field(default="adamw", metadata={"help": "any name of timm.optim.create_optimizer_v2"})
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    decay_all: bool = field(default=False, metadata={"help": "weight decay on biases and norms too"})
    schedule: str = field(default="cosine", metadata={"help": "any name of timm.scheduler.create_scheduler_v2"})
    decay_milestones: list[int] = field(default_factory=list, metadata={"help": "epochs of the multistep schedule"})
    decay_rate: float = 0.1
    warmup_epochs: int = 0
    clip_grad_norm: float = field(default=0.0, metadata={"help": "0 for none; it sees TrAct's gradient"})
    label_smoothing: float = 0.0
    bce_loss: bool = field(default=False, metadata={"help": "binary cross-entropy over the classes, as DeiT III"})
    mixup: float = 0.0
    cutmix: float = 0.0
    crop_scale: float = field(
        default=0.6, metadata={"help": "least part of the image that a random crop keeps; 1 for no crop"}
    )
    crop_pct: float = field(default=1.0, metadata={"help": "part of a test image's side that its centre crop keeps"})
    crop_padding: int = field(
        default=0, metadata={"help": "zeros around the image before a crop of its size, as for CIFAR"}
    )
    flip: float = 0.5
    rotation: float = field(default=0.0, metadata={"help": "the most degrees by which an image is turned"})
    color_jitter: float = 0.3
    auto_augment: str | None = field(
        default=None, metadata={"help": "timm's notation (rand-m9-mstd0.5-inc1, 3a), or cifar10"}
    )
    random_erasing: float = 0.0
    in_memory: bool = field(default=False, metadata={"help": "decode the images once, and only crop and flip them"})
    repeated_augmentation: int = field(
        default=0, metadata={"help": "copies of an image in an epoch's batches; 0 for none"}
    )
    ema_decay: float = field(
        default=0.0, metadata={"help": "also average the weights, and test the average; 0 for not"}
    )
    lam: float = field(default=0.1, metadata={"help": "TrAct's damping"})
    scope: str = field(default="global", metadata={"help": "global or local: see hf_tract.apply_tract"})
    whiten_init: bool = field(
        default=False,
        metadata={"help": "start the first layer as W0 (C + lam I)^-1/2: see hf_tract.whiten_first_layer"},
    )
    whiten_unscaled: bool = field(default=False, metadata={"help": "leave that start as small as it comes out"})
    seed: int = 0


@dataclass
class Run:
    """Where a run goes and how it is watched."""

    recipe: str | None = field(default=None, metadata={"help": "a YAML file; photo crops where none is given"})
    no_tract: bool = field(default=False, metadata={"help": "the same without TrAct"})
    output_dir: str = "outputs/pretrain_vit"
    checkpointing_steps: str = field(
        default="epoch", metadata={"help": "optimizer steps between them, or epoch, or never"}
    )
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "a checkpoint's folder, or latest"})
    report_to: str | None = field(default=None, metadata={"help": "tensorboard, wandb, trackio, ..., or all"})
    num_workers: int = 0
    cpu: bool = False
    license: str | None = field(default=None, metadata={"help": "of the model, for its card"})
    push_to_hub: bool = False
    hub_model_id: str | None = None

    def __post_init__(self) -> None:
        """Refuses what is no time for a checkpoint, before anything runs."""
        steps = self.checkpointing_steps
        if steps not in ("epoch", "never") and not (steps.isdigit() and int(steps) > 0):
            raise SystemExit(f"--checkpointing_steps {steps} must be epoch, never, or a number of optimizer steps.")


def parse(*more: type) -> tuple[Any, ...]:
    """The recipe and the run, and more dataclasses of options."""
    return parse_with_recipe("photo_crops.yaml", Recipe, Run, *more)


def parse_with_recipe(usual: str, recipe: type, *more: type) -> tuple[Any, ...]:
    """Parses options into dataclasses; the values of the file that --recipe names are the first one's defaults.

    Args:
        usual: the recipe where none is named.
        recipe: what a recipe file may set.
        more: what else may stand on the command line.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    first.add_argument("--model")
    given = first.parse_known_args()[0]
    file = given.recipe or Path(__file__).with_name("recipes") / usual
    values: dict[str, Any] = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    known = [each.name for each in dataclasses.fields(recipe)]
    if unknown := sorted(set(values) - set(known)):
        raise SystemExit(f"{file} sets {', '.join(unknown)}, which a recipe does not have; it has {', '.join(known)}.")
    if given.model not in (None, values.get("model")):
        values.pop("model_config", None)  # which is of the recipe's own model
    parser = HfArgumentParser([recipe, *more])  # type: ignore[list-item]
    parser.set_defaults(
        **{key: json.dumps(value) if isinstance(value, dict) else value for key, value in values.items()}
    )
    return parser.parse_args_into_dataclasses()
