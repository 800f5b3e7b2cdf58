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

    # photo_crops, a Hub id, or a folder of parquet files or images.
    dataset: str = "photo_crops"
    # The default is the first column of class labels.
    label_column: str | None = None
    # 0 takes all.
    train_samples: int = 0
    test_samples: int = 0
    # So many training rows behind the first train_samples are tested on, in place of the test split, to choose by.
    validation_samples: int = 0
    # A transformers model type, a timm name, cifar_NAME, or a checkpoint.
    model: str = "vit"
    # Settings of a model of random weights.
    model_config: dict[str, Any] = field(default_factory=dict)
    image_size: int = 32
    # The values of each channel, from 0 to 1; they are measured where they are not given.
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    epochs: int = 8
    # Images of one process.
    batch_size: int = 128
    # One of no, bf16 and fp16.
    mixed_precision: str = "no"
    channels_last: bool = False
    # Any name of timm.optim.create_optimizer_v2; benchmarks.paper knows more.
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    # Whether biases and norms decay too.
    decay_all: bool = False
    # Any name of timm.scheduler.create_scheduler_v2.
    schedule: str = "cosine"
    # Epochs of the multistep schedule.
    decay_milestones: list[int] = field(default_factory=list)
    decay_rate: float = 0.1
    warmup_epochs: int = 0
    # 0 clips nothing; otherwise TrAct's gradient is clipped.
    clip_grad_norm: float = 0.0
    label_smoothing: float = 0.0
    # Binary cross-entropy over the classes, as DeiT III.
    bce_loss: bool = False
    mixup: float = 0.0
    cutmix: float = 0.0
    # The least part of the image that a random crop keeps; 1 crops nothing.
    crop_scale: float = 0.6
    # Part of a test image's side that its centre crop keeps.
    crop_pct: float = 1.0
    # Zeros around the image before a crop of its size, as for CIFAR.
    crop_padding: int = 0
    # Probability of a mirrored image.
    flip: float = 0.5
    # The most degrees by which an image is turned.
    rotation: float = 0.0
    color_jitter: float = 0.3
    # Timm's notation (rand-m9-mstd0.5-inc1, 3a), or cifar10.
    auto_augment: str | None = None
    # Decode the images once, and only crop and flip them.
    in_memory: bool = False
    # Copies of an image in an epoch's batches; 0 repeats none.
    repeated_augmentation: int = 0
    lam: float = 0.1
    # Start the first layer as hf_tract.whiten_first_layer does.
    whiten_init: bool = False
    # Leave that start as small as it comes out.
    whiten_unscaled: bool = False
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
