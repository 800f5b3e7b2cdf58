"""Fine-tunes a checkpoint on a data set of images by Trainer, with TrAct or without it.

    python examples/transfer.py                     # from photo crops to handwritten digits, no download, minutes
    python examples/transfer.py --checkpoint google/vit-base-patch16-224-in21k --dataset tanganke/stanford_cars
    python examples/transfer.py --checkpoint hf-hub:timm/resnet50.a1_in1k --dataset dpdl-benchmark/oxford_flowers102

Every option of `transformers.TrainingArguments`, such as --push_to_hub, is one of this script. Images are resized and
normalised as the checkpoint's image processor says.
"""

import fnmatch
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

from hf_tract import TrActCallback, find_first_layers
from hf_tract.integrations import use_model_card
from hf_tract.metrics import compute_top_k
from image_data import DATASET_HELP, DataArguments, Images, Splits, to_tensor, without_corrupt
from modeling import Preprocessing, checkpoint_id, head_of, load_processor, make_transformers_model, preprocessing_of
from upload import check_token, resumable

PHOTO_CROPS = "outputs/pretrain_vit"


@dataclass
class Arguments(DataArguments):
    """What is fine-tuned, on what."""

    checkpoint: str = field(
        default="photo_crops",
        metadata={
            "help": "a Hub id, timm's hf-hub:ID, a folder; photo_crops is made by pretrain_vit.py where it is missing"
        },
    )
    dataset: str = field(default="digits", metadata={"help": DATASET_HELP})
    corrupt_images: str = field(
        default="refuse", metadata={"help": "refuse, or skip: leave them out, with their names"}
    )
    crop_scale: float = field(default=0.6, metadata={"help": "least part of a training image that a crop keeps"})
    flip: float | None = field(
        default=None, metadata={"help": "share of mirrored training images; 0.5, but 0 for digits"}
    )
    lam: float = field(default=0.1, metadata={"help": "TrAct's damping"})
    no_tract: bool = field(default=False, metadata={"help": "the same without TrAct"})
    freeze: list[str] = field(
        default_factory=list, metadata={"help": "glob patterns of parameters that stay as they are"}
    )
    seeds: int = field(default=1, metadata={"help": "fine-tune from that many seeds, from --seed on"})
    license: str | None = field(default=None, metadata={"help": "of the model, for its card"})


DEFAULTS = {
    "output_dir": "outputs/transfer",
    "num_train_epochs": 10,
    "per_device_train_batch_size": 64,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "eval_strategy": "epoch",
    "logging_strategy": "epoch",
    "save_strategy": "no",
    "per_device_eval_batch_size": 256,
    "seed": 0,
    "dataloader_pin_memory": torch.accelerator.is_available(),
}


def main() -> None:
    parser = HfArgumentParser([Arguments, TrainingArguments])  # type: ignore[list-item]
    parser.set_defaults(**DEFAULTS)
    args, training = parser.parse_args_into_dataclasses()
    check(args, training)
    if args.checkpoint == "photo_crops":
        args.checkpoint = pretrained()
    splits = args.load()
    if args.corrupt_images == "skip":
        splits = skip_corrupt(splits)
    print(head_of(args.checkpoint, splits.names))
    results = []
    output = Path(training.output_dir)
    for seed in range(training.seed, training.seed + args.seeds):
        folder = str(output / f"seed-{seed}") if args.seeds > 1 else training.output_dir
        results.append(fine_tune(args, replace(training, seed=seed, output_dir=folder), splits))
    top1 = 100 * np.array([result["eval_top1"] for result in results])
    spread = (
        f" ± {top1.std(ddof=1):.1f}, by seed {', '.join(f'{value:.1f}' for value in top1)}" if len(top1) > 1 else ""
    )
    print(f"top-1 {top1.mean():.1f} %{spread}")
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")


def fine_tune(args: Arguments, training: TrainingArguments, splits: Splits) -> dict[str, float]:
    """One run; saves the model with its card, and pushes it when asked to. Returns the last evaluation."""
    training.remove_unused_columns = False
    start = training.resume_from_checkpoint or args.checkpoint
    set_seed(training.seed)
    processor = load_processor(args.checkpoint)
    model = make_transformers_model(start, {}, 0, splits.names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad &= not any(fnmatch.fnmatch(name, pattern) for pattern in args.freeze)
    # By name: TrAct on a layer that --freeze froze is an error then.
    stems = [layer.name for layer in find_first_layers(model)]
    train, test = make_images(args, preprocessing_of(processor), splits, training.seed)
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=test,
        processing_class=processor,
        data_collator=collate,
        compute_metrics=compute_top_k,
        callbacks=[] if args.no_tract else [TrActCallback(lam=args.lam, layers=stems)],
    )
    use_model_card(
        trainer,
        dataset=args.dataset,
        base_model=checkpoint_id(args.checkpoint),
        license=args.license,
        split=splits.eval_split,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    if training.push_to_hub:  # which saves before
        with resumable(training.output_dir or ".", training.hub_model_id or Path(training.output_dir or ".").name):
            trainer.push_to_hub()
    else:
        trainer.save_model()
        trainer.create_model_card()
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry] or [trainer.evaluate()]
    return {"seed": training.seed, **evaluated[-1]}


def make_images(args: Arguments, look: Preprocessing, splits: Splits, seed: int) -> tuple[Images, Images]:
    """Training images, cropped and mirrored at random, and test images, both as the checkpoint wants them."""
    flip = args.flip if args.flip is not None else 0.5 * (args.dataset != "digits")
    end = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(look.mean, look.std)]
    crop = v2.RandomResizedCrop(look.size, scale=(args.crop_scale, 1.0), antialias=True)
    augmented = v2.Compose([v2.ToImage(), crop, v2.RandomHorizontalFlip(flip), *end])
    return Images(splits.train, splits, augmented, seed), Images(
        splits.test, splits, v2.Compose([*to_tensor(look.size), *end])
    )


def collate(rows: Sequence[tuple[Tensor, int]]) -> dict[str, Tensor]:
    """A batch as the models take it."""
    pixels, labels = zip(*rows, strict=True)
    return {"pixel_values": torch.stack(pixels), "labels": torch.tensor(labels)}


def skip_corrupt(splits: Splits) -> Splits:
    """The splits without images that cannot be read, which are named."""
    kept: dict[str, Any] = {}
    for split in ("train", "test"):
        kept[split], corrupt = without_corrupt(getattr(splits, split), splits.image)
        if corrupt:
            print(f"Left out of the images for {split}, since they cannot be read: {', '.join(corrupt)}")
    return splits._replace(**kept)


def pretrained() -> str:
    """The folder of the ViT that pretrain_vit.py makes from photo crops."""
    model = Path(PHOTO_CROPS, "model")
    if not model.exists():
        print("Pre-training on photo crops first, a few minutes.")
        script = Path(__file__).with_name("pretrain_vit.py")
        subprocess.run(
            [sys.executable, str(script), "--output_dir", PHOTO_CROPS, "--checkpointing_steps", "never"], check=True
        )
    return str(model)


def check(args: Arguments, training: TrainingArguments) -> None:
    """Refuses what cannot be meant, before anything is loaded."""
    if args.corrupt_images not in ("refuse", "skip"):
        raise SystemExit(f"--corrupt_images {args.corrupt_images}: it must be refuse or skip.")
    if training.hub_token:
        raise SystemExit("--hub_token would stand in your shell's history: set HF_TOKEN or run `hf auth login`.")
    if training.push_to_hub:
        check_token(training.hub_model_id or str(training.output_dir))
    if args.seeds > 1 and (training.push_to_hub or training.resume_from_checkpoint):
        raise SystemExit("--push_to_hub and --resume_from_checkpoint are for one run: leave --seeds at 1.")


if __name__ == "__main__":
    main()
