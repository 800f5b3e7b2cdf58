"""Describes what is trained and how, as a recipe file says."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

RECIPES = Path(__file__).with_name("recipes")


@dataclass
class Recipe:
    """Holds the fields of a recipe file, with their defaults."""

    dataset: str = "photo_crops"  # or a Hub id, or a folder of parquet files or images
    label_column: str | None = None  # by default the first column of class labels
    train_samples: int = 0  # 0 for all
    test_samples: int = 0
    model: str = "vit"  # a transformers model type, a timm name, cifar_NAME, or a checkpoint
    model_config: dict[str, Any] = field(default_factory=dict)  # of a model of random weights
    image_size: int = 32
    mean: list[float] = field(default_factory=list)  # of each channel, 0 to 1; measured where not given
    std: list[float] = field(default_factory=list)
    epochs: int = 8
    batch_size: int = 128  # of one process
    mixed_precision: str = "no"  # no, bf16 or fp16
    channels_last: bool = False
    optimizer: str = "adamw"  # any name of timm.optim.create_optimizer_v2
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    decay_all: bool = False  # weight decay on biases and norms too
    schedule: str = "cosine"  # any name of timm.scheduler.create_scheduler_v2
    decay_milestones: list[int] = field(default_factory=list)  # epochs of the multistep schedule
    decay_rate: float = 0.1
    warmup_epochs: int = 0
    clip_grad_norm: float = 0.0  # 0 for none; it sees TrAct's gradient
    label_smoothing: float = 0.0
    bce_loss: bool = False  # binary cross-entropy over the classes, as DeiT III
    mixup: float = 0.0
    cutmix: float = 0.0
    crop_scale: float = 0.6  # least part of the image that a random crop keeps; 1 for no crop
    crop_pct: float = 1.0  # part of a test image's side that its centre crop keeps
    crop_padding: int = 0  # zeros around the image before a crop of its size, as for CIFAR
    flip: float = 0.5  # probability of a mirrored image
    rotation: float = 0.0  # the most degrees by which an image is turned
    color_jitter: float = 0.3
    auto_augment: str | None = None  # timm's notation (rand-m9-mstd0.5-inc1, 3a), or cifar10
    in_memory: bool = False  # decode the images once, and only crop and flip them
    repeated_augmentation: int = 0  # copies of an image in an epoch's batches; 0 for none
    lam: float = 0.1
    whiten_init: bool = False  # start the first layer as hf_tract.whiten_first_layer does
    whiten_unscaled: bool = False  # leave that start as small as it comes out
    seed: int = 0


def field_names() -> list[str]:
    """Return the names of a recipe's fields."""
    return [each.name for each in dataclasses.fields(Recipe)]


def read_recipe(file: Path) -> Recipe:
    """Return the recipe that a YAML file describes."""
    values: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    unknown = sorted(set(values) - set(field_names()))
    if unknown:
        known = ", ".join(field_names())
        raise SystemExit(f"{file} sets {', '.join(unknown)}, which a recipe does not have; it has {known}.")
    return Recipe(**values)
