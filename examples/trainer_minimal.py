# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf-tract",
#     "datasets>=4.8",
#     "pillow>=11",
#     "torch>=2.8",
#     "torchvision>=0.23",
#     "transformers[torch]>=5.0",
# ]
# ///
"""Trains an image classifier on your images by transformers' Trainer, with TrAct as one callback.

    python trainer_minimal.py --dataset PATH_TO_IMAGES

The images are whatever `datasets.load_dataset` reads: a folder for each class, a metadata.csv beside the images,
parquet files, or a data set on the Hub.
"""

import argparse
import struct
from collections import Counter
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets.exceptions import DatasetsError
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTImageProcessor,
    set_seed,
)
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from hf_tract import TrActCallback, TrActError
from hf_tract.metrics import compute_top_k

parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--dataset", required=True, help="a folder of images, or the id of a data set on the Hub")
parser.add_argument("--image_column", default="image", help="its column of images")
parser.add_argument("--label_column", default="label", help="its column of labels, words or numbers")
parser.add_argument("--model", help="a checkpoint to fine-tune; a small ViT of random weights if there is none")
parser.add_argument("--lam", type=float, default=0.1, help="TrAct's damping")
parser.add_argument("--epochs", type=int, default=10, help="passes over the training images")
parser.add_argument("--report_to", default="none", help="tensorboard, wandb, trackio, ...")
parser.add_argument("--resume_from_checkpoint", help="OUTPUT_DIR/checkpoint-N, to go on from there")
parser.add_argument("--output_dir", default="outputs/minimal", help="folder of the trained model")


def main() -> None:
    """Train, save the model, and say what to do with it."""
    args = parser.parse_args()
    if args.epochs < 1:
        parser.error(f"--epochs {args.epochs}: give a number above 0")
    try:
        trainer = make_trainer(args)
    except (TrActError, OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, DatasetsError) as error:
        parser.error(" ".join(str(error).split()))
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return
    print(f"The model is in {args.output_dir}, with its card, and loads without hf-tract:")
    print(f'    transformers.pipeline("image-classification", "{args.output_dir}")("IMAGE.jpg")')
    print(f"To publish it: python push_to_hub.py {args.output_dir} --repo_id OWNER/NAME")


def make_trainer(args: argparse.Namespace) -> Trainer:
    """Return a Trainer of the model and the images that the options name."""
    set_seed(42)  # Trainer's seed, which it sets after the model is made
    callback = TrActCallback(lam=args.lam)
    splits = load_splits(args)
    names = splits["train"].features["label"].names
    if len(names) < 2:
        parser.error(f"--dataset {args.dataset} has one class, {names[0]}: a classifier needs two or more")
    # Trainer itself passes over a ViT's weights in a checkpoint (transformers 5.24).
    processor, model = load_model(args.resume_from_checkpoint or args.model, names)
    splits = splits.cast_column("image", datasets.Image(decode=False))  # prepare decodes them, and names corrupt files
    splits = splits.with_transform(partial(prepare, processor=processor))
    settings = TrainingArguments(
        output_dir=args.output_dir,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=64,
        learning_rate=5e-4,
        eval_strategy="epoch",
        logging_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.accelerator.is_available(),
        report_to=args.report_to,
    )
    return Trainer(
        model=model,
        args=settings,
        train_dataset=splits["train"],
        eval_dataset=splits["test"],
        processing_class=processor,
        compute_metrics=compute_top_k,
        callbacks=[callback],  # This is all that TrAct needs.
    )


def load_splits(args: argparse.Namespace) -> datasets.DatasetDict:
    """Load the splits `train` and `test` with the columns `image` and `label`."""
    builder = datasets.load_dataset_builder(args.dataset)
    if Path(args.dataset).is_dir():
        refuse_repeated_files(builder)
    builder.download_and_prepare()
    splits = builder.as_dataset()
    if "train" not in splits:
        parser.error(f"--dataset {args.dataset} has the splits {', '.join(splits)}, and needs one named train")
    splits = splits.select_columns([args.image_column, args.label_column])
    splits = splits.rename_columns({args.image_column: "image", args.label_column: "label"})
    if not isinstance(splits["train"].features["label"], datasets.ClassLabel):
        splits = splits.cast_column("label", datasets.Value("string"))
        names = sorted(splits["train"].unique("label"))
        splits = splits.cast_column("label", datasets.ClassLabel(names=names))
    tested = [name for name in ("validation", "valid", "val", "dev", "test") if name in splits]
    with_labels = [name for name in tested if not {-1, None} & set(splits[name].unique("label"))]
    if with_labels:
        splits["test"] = splits[with_labels[0]]
    else:
        splits = splits["train"].train_test_split(0.2, seed=0)
        print(f"No images with labels are set aside to test on, so {len(splits['test'])}, drawn at random, are now.")
    return splits


def refuse_repeated_files(builder: datasets.DatasetBuilder) -> None:
    """Refuse a file that is read twice, since `datasets` finds the folders of each split by words in their names."""
    files = Counter(chain.from_iterable(builder.config.data_files.values()))
    for file, count in files.most_common(1):
        if count > 1:
            parser.error(
                f"{file} would be read twice. A folder is a split if its name has a word such as train, test, val or "
                f"dev: rename all others"
            )


def prepare(rows: dict[str, list[Any]], processor: Any) -> dict[str, Any]:
    """Resize and normalise images when they are used; augmentation of the training images would go here."""
    images = []
    for stored in rows["image"]:
        stored = stored or {"path": None, "bytes": None}  # an empty cell
        name = stored["path"] or "an image"
        try:
            image = datasets.Image().decode_example(stored)
        except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
            parser.error(f"{name} cannot be read ({error}): mend it or take it away")
        if image.mode.startswith(("I", "F")):
            parser.error(f"{name} has 16 bits or more (mode {image.mode}): scale it to 8, or use pretrain_vit.py")
        images.append(image.convert("RGB"))
    return {**processor(images, return_tensors="pt"), "labels": rows["label"]}


def load_model(checkpoint: str | None, names: list[str]) -> tuple[Any, Any]:
    """Return an image processor and a classifier for these classes."""
    numbers = {name: number for number, name in enumerate(names)}
    labels: dict[str, Any] = {"id2label": dict(enumerate(names)), "label2id": numbers}
    if checkpoint:
        model = AutoModelForImageClassification.from_pretrained(checkpoint, ignore_mismatched_sizes=True, **labels)
        if model.config.model_type == "timm_wrapper":
            model.config.label_names = names  # Without this it saves the names that it had.
        return AutoImageProcessor.from_pretrained(checkpoint), model
    config = ViTConfig(image_size=64, patch_size=8, hidden_size=128, intermediate_size=512, **labels)
    config.num_hidden_layers = config.num_attention_heads = 4
    size = {"height": 64, "width": 64}
    # lam=0.1 is for standardised pixels, which ViT's own mean and deviation of 0.5 do not give.
    processor = ViTImageProcessor(size=size, image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD)
    return processor, AutoModelForImageClassification.from_config(config)


if __name__ == "__main__":
    main()
