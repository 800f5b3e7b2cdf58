"""Pre-trains any transformers or timm vision model from a recipe, with TrAct, by accelerate.

    accelerate launch examples/pretrain_vit.py                      # photo crops, minutes on two cores
    accelerate launch examples/pretrain_vit.py --recipe examples/recipes/cifar10_vit.yaml --report_to tensorboard
    torchrun --nproc-per-node 2 examples/pretrain_vit.py            # two processes, on CPU too
    accelerate launch examples/pretrain_vit.py --resume_from_checkpoint latest

A recipe sets defaults; what the command line says wins. A run that was killed and resumed ends in the same weights.
"""

import dataclasses
import io
import json
import os
import re
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import datasets
import numpy as np
import timm
import torch
from accelerate import Accelerator, PartialState, skip_first_batches
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed, tqdm
from PIL import Image, ImageOps
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from transformers import CONFIG_MAPPING

from hf_tract import TrActHandle, apply_tract, whiten_first_layer
from hf_tract.integrations import TrainingRecord, stats_to_log
from hf_tract.metrics import TopK
from image_data import Splits, normalization
from loaders import make_loaders
from modeling import Preprocessing, logits_of, make_model, save_model
from photo_crops import photo_crops
from progress import Progress, add_epoch, read_epochs, start
from recipe import Recipe, Run, parse
from upload import check_token, push_folder

BUILT_IN: dict[str, Callable[[], datasets.DatasetDict]] = {"photo_crops": photo_crops}


@dataclass
class DataOptions:
    """Names the images, as options of the script."""

    dataset: str = field(
        default="photo_crops",
        metadata={"help": "photo_crops (needs no download), a folder of images or of parquet files, or a Hub id"},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "the Hub's name for a variant of the data set"})
    train_split: str = "train"
    eval_split: str | None = field(default=None, metadata={"help": "by default test, validation, or a share held out"})
    image_column: str | None = field(default=None, metadata={"help": "by default the first column of images"})
    label_column: str | None = field(default=None, metadata={"help": "by default the first column of classes"})
    train_samples: int = field(default=0, metadata={"help": "use that many training images; 0 for all"})
    test_samples: int = field(default=0, metadata={"help": "use that many test images; 0 for all"})
    corrupt_images: str = field(
        default="refuse", metadata={"help": "refuse or skip images that cannot be read", "choices": ["refuse", "skip"]}
    )


EVAL_SPLITS = ("test", "validation", "val", "valid", "dev")
LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "cls")
HELD_OUT = 0.2  # of a data set that has no split to test on
IS_MAIN_PROCESS = os.environ.get("RANK", "0") == "0"


class ImageError(ValueError):
    """Names an image that cannot be used, and says what to do."""


class ImageData(NamedTuple):
    """Holds rows with the columns `image` (still encoded) and `label` (a number), and the names of the classes."""

    train: datasets.Dataset
    test: datasets.Dataset
    names: list[str]
    eval_split: str


def say(message: str) -> None:
    """Print a line, in the main process only."""
    if IS_MAIN_PROCESS:
        print(message, flush=True)


def stop(message: str) -> NoReturn:
    """End the script with one line, which only the main process prints."""
    raise SystemExit(message if IS_MAIN_PROCESS else 1)


def load_images(options: DataOptions) -> ImageData:
    """Load the images that `options` name, and find their columns, their classes and the split to test on."""
    splits = read_splits(options)
    for option in ("train_split", "eval_split"):
        split = getattr(options, option)
        if split and split not in splits:
            stop(f"--{option} {split}: {options.dataset} has the splits {', '.join(splits)}.")
    train = pick_columns(splits[options.train_split], options)
    names = class_names(train, options)
    train = number_labels(train, names, options)
    report_empty_classes(train, names, options)
    eval_split = options.eval_split or find_eval_split(splits, options)
    if eval_split:
        test = number_labels(pick_columns(splits[eval_split], options), names, options)
    else:
        train, test = hold_out(train, options)
    train = sample(train, options.train_samples)
    test = sample(test, options.test_samples)
    if options.corrupt_images == "skip":
        train, test = drop_corrupt(train), drop_corrupt(test)
    return ImageData(train, test, names, eval_split or "test")


def read_splits(options: DataOptions) -> datasets.DatasetDict:
    """Read a built-in data set, a folder that `save_to_disk` wrote, or what `datasets.load_dataset` reads."""
    name = options.dataset
    if name in BUILT_IN:
        return BUILT_IN[name]()
    folder = Path(name)
    if not folder.exists() and (folder.is_absolute() or name.startswith((".", "~"))):
        stop(f"--dataset {name}: there is no such folder.")
    if folder.is_file():
        stop(f"--dataset {name} is a file: name its folder.")
    try:
        if (folder / "dataset_dict.json").exists():
            return datasets.DatasetDict.load_from_disk(name)
        if (folder / "state.json").exists():
            return datasets.DatasetDict(train=datasets.Dataset.load_from_disk(name))
        return datasets.load_dataset(name, options.dataset_config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(f"{error} {error.__cause__ or ''}".split())[:300]
        expected = "a folder of images by class or of parquet files, or the id of a data set on the Hub"
        stop(f"--dataset {name} cannot be read; it must be {expected}. The reason: {reason}")


def pick_columns(rows: datasets.Dataset, options: DataOptions) -> datasets.Dataset:
    """Return the two columns that are used as `image` and `label`; images are decoded later, one by one."""
    image, label = options.image_column, options.label_column
    for option, column in {"image_column": image, "label_column": label}.items():
        if column and column not in rows.column_names:
            stop(f"--{option} {column}: {options.dataset} has the columns {', '.join(rows.column_names)}.")
    for column, feature in rows.features.items():
        if not image and isinstance(feature, datasets.Image):
            image = column
        if not label and (isinstance(feature, datasets.ClassLabel) or column in LABEL_COLUMNS):
            label = column
    for option, column in {"image_column": image, "label_column": label}.items():
        if not column:
            found = ", ".join(rows.column_names)
            advice = f"name one by --{option}, or sort the images into a folder for each class"
            stop(f"--dataset {options.dataset} has no column that is known for its {option}, only {found}: {advice}.")
    if not isinstance(rows.features[image], datasets.Image):
        stop(f"--image_column {image}: it holds {rows.features[image]}, and no images.")
    rows = rows.select_columns([image, label]).rename_columns({image: "image", label: "label"})
    return rows.cast_column("image", datasets.Image(decode=False))


def is_labelled(rows: datasets.Dataset) -> bool:
    """Return whether each row has a label; the Hub's test splits often have None or -1 in place of labels."""
    labels = rows["label"]
    return len(rows) > 0 and all(label not in (None, -1) for label in labels)


def class_names(train: datasets.Dataset, options: DataOptions) -> list[str]:
    """Return the names of the classes; labels without names are named by themselves."""
    if not is_labelled(train):
        stop(f"--train_split {options.train_split}: some of the {len(train)} rows in {options.dataset} have no label.")
    feature = train.features["label"]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    if not isinstance(feature, datasets.Value):
        stop(f"--dataset {options.dataset}: the labels must be words or numbers, and are {feature}.")
    return [str(label) for label in sorted(set(train["label"]))]


def number_labels(rows: datasets.Dataset, names: list[str], options: DataOptions) -> datasets.Dataset:
    """Return the rows with the positions of their labels among `names`."""
    if not is_labelled(rows):
        stop(f"--eval_split {options.eval_split}: some of the {len(rows)} rows in {options.dataset} have no label.")
    if isinstance(rows.features["label"], datasets.ClassLabel):
        return rows
    words = [str(label) for label in rows["label"]]
    unknown = sorted(set(words) - set(names))
    if unknown:
        stop(f"--dataset {options.dataset} has labels to test on that no training image has: {unknown[:5]}.")
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
        stop(f"--dataset {options.dataset} has {len(rows)} image: at least 2 are needed, to train and to test on.")
    share = "the same share of each class"
    try:
        parts = rows.train_test_split(HELD_OUT, seed=0, stratify_by_column="label")
    except ValueError:  # A class has fewer images than that takes.
        share = "whatever their class"
        parts = rows.train_test_split(HELD_OUT, seed=0)
    say(
        f"{options.dataset} has no split to test on: {len(parts['test'])} of its {len(rows)} images are held out for "
        f"that ({share}, drawn with seed 0). To choose them yourself, make folders train and test."
    )
    return parts["train"], parts["test"]


def report_empty_classes(train: datasets.Dataset, names: list[str], options: DataOptions) -> None:
    """Say which classes have no image to learn from, and which class folders are empty."""
    used = set(train["label"])
    empty = {name for number, name in enumerate(names) if number not in used}
    if Path(options.dataset).is_dir():
        for folder, folders, files in os.walk(options.dataset):
            if not folders and not files:
                empty.add(Path(folder).name)
    if empty:
        say(f"{options.dataset} has no training image of {', '.join(sorted(empty))}: such a class is not learned.")


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
            corrupt.append(f"Left out: {error}")
        else:
            readable.append(index)
    if corrupt:
        say("\n".join(corrupt))
    return rows.select(readable)


def read_image(rows: datasets.Dataset, index: int) -> Image.Image:
    """Decode an image as 8-bit RGB, turned as its EXIF data say.

    Transparency is dropped, as in transformers' pipelines, which later classify such images.

    Raises:
        ImageError: if the image is corrupt, or has numbers on a scale that cannot be known.
    """
    encoded = rows[index]["image"]
    name = encoded["path"] or f"image {index}"
    source = io.BytesIO(encoded["bytes"]) if encoded["bytes"] else encoded["path"]
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
        raise ImageError(
            f"{name} has values from {low:g} to {high:g} (Pillow's mode {image.mode}): integers must be from 0 to "
            f"65535 and floats from 0 to 1; scale it before."
        )
    return Image.fromarray((values * 255 / top).round().astype(np.uint8)).convert("RGB")


class Trained(NamedTuple):
    """What a run leaves: the model to save, TrAct's handle, how images are seen, the figures of each epoch."""

    model: nn.Module
    handle: TrActHandle | None
    look: Preprocessing
    splits: Splits
    history: list[dict[str, Any]]


def main() -> None:
    recipe, run = parse()
    hub_id = run.hub_model_id or Path(run.output_dir).name
    if run.push_to_hub:
        check_token(hub_id)
    trained = train(recipe, run)
    if PartialState().is_main_process:
        folder = Path(run.output_dir) / "model"
        save_model(trained.model, folder, trained.look, trained.splits.names)
        record(recipe, hub_id, run.license, trained).save(folder, run.hub_model_id)
        print(f"The model is in {folder}, with its card.")
        if run.push_to_hub:
            print(push_folder(folder, hub_id, update=True))
        else:
            print(f"To fine-tune it: python examples/transfer.py --model {folder}")
            print(f"To publish it: python examples/push_to_hub.py {run.output_dir} --repo_id OWNER/NAME")


def ready_made(recipe: Recipe, splits: Splits, look: Preprocessing) -> nn.Module:
    """The model that a recipe names."""
    return make_model(recipe.model, json.loads(recipe.model_config), recipe.image_size, splits.names)


def usual_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that a recipe names."""
    made: torch.optim.Optimizer = create_optimizer_v2(
        model, recipe.optimizer, recipe.learning_rate, recipe.weight_decay, filter_bias_and_bn=not recipe.decay_all
    )
    return made


def train(
    recipe: Recipe,
    run: Run,
    make: Callable[[Recipe, Splits, Preprocessing], nn.Module] = ready_made,
    make_optimizer: Callable[[Recipe, nn.Module], torch.optim.Optimizer] = usual_optimizer,
) -> Trained:
    """The whole run, from the data set to the last epoch's test.

    Args:
        recipe: what is trained and how.
        run: where it goes and how it is watched.
        make: the model, from the recipe, the data and how images are seen.
        make_optimizer: the optimizer of that model.
    """
    project = ProjectConfiguration(run.output_dir, automatic_checkpoint_naming=True, total_limit=2)
    accelerator = Accelerator(
        cpu=run.cpu
        or not torch.accelerator.is_available(),  # else torchrun's processes would not find each other on CPU
        mixed_precision=recipe.mixed_precision,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        log_with=run.report_to,
        project_config=project,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=recipe.seed),
        step_scheduler_with_optimizer=False,
    )
    set_seed(recipe.seed)
    with accelerator.main_process_first():
        splits = recipe.load()
    measured = ([], []) if recipe.mean and recipe.std else normalization(splits, recipe.image_size)
    look = Preprocessing(recipe.image_size, recipe.mean or measured[0], recipe.std or measured[1])
    train_loader, test_loader, images = make_loaders(splits, recipe, run, look, accelerator)
    if not len(train_loader):
        raise SystemExit(
            f"--batch_size {recipe.batch_size} is more than the {len(splits.train)} training images of a process."
        )
    model = make(recipe, splits, look)
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if recipe.whiten_init:
        whiten_first_layer(model, train_loader, recipe.lam, match_scale=not recipe.whiten_unscaled)
    set_seed(recipe.seed, device_specific=True)  # the same weights on every rank, and other draws of dropout and mixup
    optimizer = make_optimizer(recipe, model)
    handle = None
    if not run.no_tract:
        handle = apply_tract(model, recipe.lam, scope=recipe.scope)  # type: ignore[arg-type]
        accelerator.print(handle)
    model, optimizer, test_loader = accelerator.prepare(model, optimizer, test_loader)
    if not recipe.repeated_augmentation:
        train_loader = accelerator.prepare(train_loader)
    steps_per_epoch = -(-len(train_loader) // recipe.gradient_accumulation_steps)
    schedule, _ = create_scheduler_v2(
        optimizer,
        recipe.schedule,
        recipe.epochs,
        warmup_epochs=recipe.warmup_epochs,
        warmup_lr=0.0,
        warmup_prefix=False,
        decay_milestones=recipe.decay_milestones,
        decay_rate=recipe.decay_rate,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    ema = ModelEmaV3(accelerator.unwrap_model(model), decay=recipe.ema_decay) if recipe.ema_decay else None
    progress = Progress()
    kept = [each for each in (ema, progress) if each]
    accelerator.register_for_checkpointing(*kept)
    history = Path(run.output_dir) / "history.jsonl"
    start(accelerator, run.resume_from_checkpoint, len(kept), history, progress)
    if run.report_to:
        accelerator.init_trackers(
            "pretrain_vit", {key: str(value) for key, value in dataclasses.asdict(recipe).items()}
        )

    criterion, mixup = make_loss(recipe, len(splits.names))
    bar = tqdm(
        total=recipe.epochs * steps_per_epoch,
        initial=progress.step,
        desc="training",
        disable=not accelerator.is_main_process,
    )
    schedule.step_update(progress.step)
    figures: dict[str, float] = {}
    clock = time.perf_counter if torch.accelerator.is_available() and not run.cpu else time.process_time
    for epoch in range(progress.epoch, recipe.epochs):
        began = clock() - progress.seconds
        progress.epoch = epoch
        images.set_epoch(epoch)
        model.train()
        for pixels, labels in batches_left(train_loader, epoch, progress.batch):
            with accelerator.accumulate(model):
                if mixup:
                    pixels, labels = mixup(pixels, labels)
                loss = criterion(logits_of(model(pixels)), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients and recipe.clip_grad_norm:
                    accelerator.clip_grad_norm_(model.parameters(), recipe.clip_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            progress.batch, progress.loss = progress.batch + 1, loss.detach()
            if accelerator.sync_gradients:
                progress.step += 1
                schedule.step_update(progress.step)
                if ema:
                    ema.update(accelerator.unwrap_model(model), step=progress.step)
                bar.update()
                if progress.step % 10 == 0:
                    logged = {"train/loss": loss.item(), "train/lr": optimizer.param_groups[0]["lr"]}
                    if handle and run.report_to:  # without a tracker they would be computed for nobody
                        logged |= {f"train/{name}": value for name, value in stats_to_log(handle).items()}
                    accelerator.log(logged, step=progress.step)
                if run.checkpointing_steps.isdigit() and progress.step % int(run.checkpointing_steps) == 0:
                    progress.seconds = clock() - began
                    accelerator.save_state()
        figures = {"epoch": epoch + 1, "step": progress.step, "loss": float(progress.loss)}
        progress.epoch, progress.batch, progress.seconds = epoch + 1, 0, clock() - began
        figures |= {
            "seconds": round(progress.seconds, 3),
            **evaluate(ema.module if ema else model, test_loader, accelerator),
        }
        accelerator.log({f"test/{key}": value for key, value in figures.items()}, step=progress.step)
        bar.set_postfix(
            {key: f"{value:.3f}" for key, value in figures.items() if key not in ("epoch", "step", "seconds")}
        )
        add_epoch(history, {**figures, "tract": not run.no_tract}, accelerator)
        if run.checkpointing_steps == "epoch":
            accelerator.save_state()
    bar.close()
    figures = figures or evaluate(ema.module if ema else model, test_loader, accelerator)  # a finished run, resumed
    accelerator.print(f"top-1 {100 * figures['top1']:.1f} %, top-5 {100 * figures['top5']:.1f} %")
    accelerator.end_training()
    best = ema.module if ema else accelerator.unwrap_model(model)
    if recipe.channels_last:
        best = best.to(memory_format=torch.contiguous_format)  # which is what safetensors saves
    return Trained(best, handle, look, splits, read_epochs(history))


def batches_left(loader: Any, epoch: int, done: int) -> Any:
    """The batches of an epoch after the first `done`; none where a checkpoint was made after the last one."""
    if done >= len(loader):
        return []
    if done:
        loader = skip_first_batches(loader, done)
    loader.set_epoch(epoch)
    return loader


def make_loss(recipe: Recipe, classes: int) -> tuple[nn.Module, Mixup | None]:
    """The loss, and what mixes images and labels, if anything does."""
    if recipe.mixup or recipe.cutmix:
        mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=classes)
        return (BinaryCrossEntropy() if recipe.bce_loss else SoftTargetCrossEntropy()), mixup
    if recipe.bce_loss:
        return BinaryCrossEntropy(smoothing=recipe.label_smoothing), None
    return nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing), None


@torch.no_grad()
def evaluate(model: nn.Module, loader: Any, accelerator: Accelerator) -> dict[str, float]:
    """Top-1 and top-5 over all processes."""
    model.eval()
    metric = TopK()
    for pixels, labels in loader:
        scores, labels = accelerator.gather_for_metrics((logits_of(model(pixels)).float(), labels))
        metric.add_batch(predictions=scores.cpu().numpy(), references=labels.cpu().numpy())
    return metric.compute() or {}


def record(recipe: Recipe, hub_id: str, license: str | None, trained: Trained) -> TrainingRecord:
    """What the model's card tells."""
    kept = {"epoch": "epoch", "loss": "loss", "accuracy": "top1", "top5": "top5"}
    rows = [{name: row[key] for name, key in kept.items()} for row in trained.history]
    handle = trained.handle
    ours = ("lam", "scope")  # which the card tells by itself, where TrAct is on
    settings = {key: value for key, value in dataclasses.asdict(recipe).items() if value and key not in ours}
    fresh = recipe.model in CONFIG_MAPPING or timm.is_model(recipe.model)
    record = TrainingRecord(
        name=hub_id.split("/")[-1],
        library="timm" if timm.is_model(recipe.model) else "transformers",
        dataset=recipe.dataset,
        tract=handle.config if handle else None,
        layers=[layer.name for layer in handle.layers] if handle else [],
        base_model=None if fresh else recipe.model,
        license=license,
        metrics={name: rows[-1][name] for name in ("accuracy", "top5")},
        history=rows,
        split=trained.splits.eval_split,
        seed=recipe.seed,
    )
    return dataclasses.replace(
        record,
        hyperparameters={**settings, "dataset": record.dataset},
        command=re.sub(r" --resume_from_checkpoint \S+", "", record.command),  # which makes no difference
    )


if __name__ == "__main__":
    main()
