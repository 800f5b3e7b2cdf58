"""Trains the same small vision model from the same seed with Trainer: vanilla, with TrAct, with a whitened start too.

    python examples/quickstart.py                       # photo crops, no download, a few minutes on two cores
    python examples/quickstart.py --seeds 5             # mean and spread
    python examples/quickstart.py --dataset uoft-cs/cifar10 --model convnext --image_size 32

Runs that have finished are kept in OUTPUT_DIR/records.jsonl and are not run again.
"""

import json
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from torchvision.transforms import v2
from transformers import (
    CONFIG_MAPPING,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from comparison import Record, compare, two_arms
from hf_tract import TrActCallback, find_first_layers
from image_data import DATASET_HELP, load_splits, normalization, to_tensor
from modeling import make_transformers_model
from step_clock import StepClock

SMALL_VIT = (
    '{"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 384, "patch_size": 8}'
)

WHITENED = "TrAct, whitened start"
NO_SETTINGS = ("lam", "seeds", "first_seed", "output_dir", "report_to")  # what a run without TrAct does not depend on


class Data(NamedTuple):
    """Training and test images, and the names of the classes."""

    train: datasets.Dataset
    test: datasets.Dataset
    labels: list[str]


@dataclass
class Arguments:
    """What to train, on what, and how long."""

    dataset: str = field(default="photo_crops", metadata={"help": DATASET_HELP})
    model: str = field(
        default="vit",
        metadata={"help": "a model type for random weights (vit, convnext, resnet, ...), or a checkpoint"},
    )
    model_config: str = field(
        default="",
        metadata={
            "help": "JSON: settings of a model of random weights; by default a small ViT's, or the model type's own"
        },
    )
    image_size: int = field(default=32, metadata={"help": "side of the images that the model gets"})
    train_samples: int = field(
        default=0, metadata={"help": "use that many training images, the same for each run; 0 for all"}
    )
    lam: float = field(default=0.1, metadata={"help": "TrAct's damping"})
    epochs: int = 8
    batch_size: int = 128
    learning_rate: float = 1e-3
    max_grad_norm: float = field(
        default=1.0, metadata={"help": "Trainer's clipping, which sees TrAct's gradient; 0 for none"}
    )
    seeds: int = field(default=1, metadata={"help": "train each arm from that many seeds"})
    first_seed: int = 0
    report_to: str = field(default="none", metadata={"help": "tensorboard, wandb, trackio, ..."})
    output_dir: str = "outputs/quickstart"


def main() -> None:
    args: Arguments
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    args.model_config = args.model_config or (SMALL_VIT if args.model == "vit" else "{}")
    same = {key: value for key, value in vars(args).items() if key not in NO_SETTINGS}
    data = load_images(args)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    title = f"{Path(args.dataset).name}, {args.model}, lam {args.lam:g}"
    arms = two_arms(same, args.lam)
    if args.model in CONFIG_MAPPING:  # whose weights are random
        arms[WHITENED] = {**arms["TrAct"], "whiten_init": True}
    compare(Path(args.output_dir), arms, seeds, partial(train, data=data, args=args), title)


def train(arm: str, seed: int, settings: dict[str, Any], data: Data, args: Arguments) -> Record:
    """One run of one arm."""
    set_seed(seed)
    model = make_transformers_model(args.model, json.loads(args.model_config), args.image_size, data.labels)
    stem = find_first_layers(model)[0]
    print(f"\n{arm}, seed {seed}: {model.num_parameters():,} parameters, first layer {stem.name} {stem.module}")
    clock = StepClock()
    tract = {name: settings[name] for name in ("lam", "whiten_init") if name in settings}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=os.path.join(args.output_dir, f"{arm}-{seed}"),
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=2 * args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            max_grad_norm=args.max_grad_norm,
            eval_strategy="epoch",
            logging_strategy="epoch",
            save_strategy="no",
            remove_unused_columns=False,
            dataloader_pin_memory=torch.accelerator.is_available(),
            report_to=args.report_to,
            seed=seed,
        ),
        train_dataset=data.train,
        eval_dataset=data.test,
        compute_metrics=accuracy,
        callbacks=[clock, *([TrActCallback(**tract)] if tract else [])],
    )
    trainer.train()
    curve = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    return Record(arm, seed, curve, clock.median(), settings)


def load_images(args: Arguments) -> Data:
    """Data sets that give `pixel_values` and `labels`, training images with flips and jitter."""
    splits = load_splits(args.dataset, train_samples=args.train_samples)
    mean, std = normalization(splits, args.image_size)
    normalize = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    jitter = [v2.RandomHorizontalFlip(), v2.ColorJitter(brightness=0.3, contrast=0.3)]

    def give(*transforms: v2.Transform) -> Any:
        transform = v2.Compose([*to_tensor(args.image_size), *transforms])
        return lambda rows: {
            "pixel_values": [transform(row) for row in rows[splits.image]],
            "labels": rows[splits.label],
        }

    train, test = splits.train.with_transform(give(*jitter, *normalize)), splits.test.with_transform(give(*normalize))
    return Data(train, test, splits.names)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Top-1."""
    return {"accuracy": float((np.argmax(prediction.predictions, axis=-1) == prediction.label_ids).mean())}


if __name__ == "__main__":
    main()
