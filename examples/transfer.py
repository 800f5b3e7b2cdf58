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
#     "scikit-learn>=1.5",
#     "scipy>=1.11",
#     "timm>=1.0.21",
#     "torch>=2.8",
#     "torchvision>=0.23",
#     "tqdm>=4.66",
#     "transformers>=5.0",
# ]
# ///
"""Fine-tunes a checkpoint of transformers or timm on images by Trainer, with TrAct or without it.

    python transfer.py                              # the model of pretrain_vit.py on handwritten digits, no download
    python transfer.py --checkpoint google/vit-base-patch16-224-in21k --dataset tanganke/stanford_cars
    python transfer.py --checkpoint hf-hub:timm/resnet50.a1_in1k --dataset PATH_TO_IMAGES --dataloader_num_workers 4

The options of `transformers.TrainingArguments`, such as --push_to_hub (which replaces a model in that repository), are
options of this script too. Test images go through the checkpoint's own image processor. Training images are cropped at
random, resized to the size that it gives, and normalised by it.
"""

import contextlib
import fnmatch
import functools
import glob
import io
import json
import math
import os
import random
import re
import shlex
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import datasets
import numpy as np
import sklearn.datasets
import torch
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image, ImageOps
from scipy import stats
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from torchvision.transforms import v2
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_tract import TrActCallback, TrActError, find_first_layers
from hf_tract.integrations import use_model_card
from hf_tract.metrics import compute_top_k

CHECKPOINT = "outputs/pretrain_vit/model"
DEFAULTS = {
    "output_dir": "outputs/transfer",
    "num_train_epochs": 10,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 256,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "eval_strategy": "epoch",
    "logging_strategy": "epoch",
    "save_strategy": "no",
    "seed": 0,
    "dataloader_pin_memory": torch.accelerator.is_available(),
}
MAX_BYTES = 2 * 2**30  # of decoded images that a process keeps in memory; more are decoded when they are used
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


@dataclass
class Arguments(DataOptions):
    """Says what is fine-tuned."""

    dataset: str = option("digits", "digits (needs no download), a folder of images or of parquet files, or a Hub id.")
    checkpoint: str = option(
        CHECKPOINT, "a folder, a Hub id, or timm's hf-hub:ID; by default the model of pretrain_vit.py."
    )
    crop_scale: float = option(0.6, "least share of an image's area in a random crop.")
    flip: float | None = option(None, "probability of a mirrored training image; by default 0.5, and 0 for digits.")
    lam: float = option(0.1, "TrAct's damping.")
    no_tract: bool = option(False, "train without TrAct.")
    freeze: list[str] = field(
        default_factory=list, metadata={"help": "glob patterns of parameters that are not trained."}
    )
    seeds: int = option(1, "number of runs, with the seeds from --seed on.")
    license: str | None = option(None, "of the model, for its card.")


def main() -> None:
    """Fine-tune from each seed, and report the accuracy."""
    args, training = parse_arguments()
    output = Path(str(training.output_dir))
    make_folder(output)
    data = load_images(args)
    say(describe_head(args.checkpoint, data.names))
    if training.load_best_model_at_end:
        say(
            f"The best weights are chosen on {data.eval_split}, so their score there is too high: test the saved "
            f"model on images that chose nothing. --eval_split names those that choose."
        )
    results = []
    for seed in range(training.seed, training.seed + args.seeds):
        folder = output
        if args.seeds > 1:
            folder = output / f"seed-{seed}"
        try:
            results.append(fine_tune(args, replace(training, seed=seed, output_dir=str(folder)), data))
            finish_tracking()
        except ImageError as error:
            # A worker process adds its traceback before the message.
            raise SystemExit(str(error).rpartition("ImageError: ")[2].strip()) from error
        except TrActError as error:
            stop(str(error))
        except HfHubHTTPError as error:
            stop(f"--push_to_hub: {one_line(error)}")
    if not IS_MAIN_PROCESS:
        return
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print_accuracy(results)
    print(f"The model is in {folder}, with its card.")
    print(f"To publish it: python push_to_hub.py {folder} --repo_id OWNER/NAME")


def fine_tune(args: Arguments, training: TrainingArguments, data: ImageData) -> dict[str, float]:
    """Train from one seed, save the model with its card, push it when asked to, and return its scores."""
    training.remove_unused_columns = False
    set_seed(training.seed)
    processor = load_processor(args.checkpoint)
    if training.resume_from_checkpoint:
        model = load_given("--resume_from_checkpoint", training.resume_from_checkpoint, data.names)
    else:
        model = load_given("--checkpoint", args.checkpoint, data.names)
    freeze(model, args.freeze)
    train, test = make_images(args, processor, data, training.seed)
    callbacks: list[TrainerCallback] = [EpochCallback(train)]
    if not args.no_tract:  # This is all that TrAct needs.
        # By name, so that a frozen first layer is an error.
        layers = [layer.name for layer in find_first_layers(model)]
        callbacks.append(TrActCallback(lam=args.lam, layers=layers))
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=test,
        processing_class=processor,
        data_collator=collate,
        compute_metrics=compute_top_k,
        callbacks=callbacks,
    )
    base = without_prefix(args.checkpoint)
    use_model_card(trainer, dataset=args.dataset, base_model=base, license=args.license, split=data.eval_split)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    if training.load_best_model_at_end:
        load_best_weights(trainer, data.names)
    scores = score_weights(trainer)
    folder = str(training.output_dir)
    if training.push_to_hub:
        with uploading(folder, training.hub_model_id or Path(folder).name):
            trainer.push_to_hub()  # which saves before
    else:
        trainer.save_model()
        trainer.create_model_card()
    return {"seed": training.seed, **scores}


def load_best_weights(trainer: Trainer, names: list[str]) -> None:
    """Load the best checkpoint by its model's class, which knows the older names of parameters.

    The Trainer of transformers 5.24 saves a ViT under such names, and then passes over them when it loads the best
    weights.
    """
    folder = trainer.state.best_model_checkpoint
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if folder and not is_sharded:
        best = load_checkpoint(folder, names)
        trainer.accelerator.unwrap_model(trainer.model).load_state_dict(best.state_dict())


def score_weights(trainer: Trainer) -> dict[str, float]:
    """Return the scores of the weights that are saved, which may be others than were tested last."""
    tested = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    is_last = bool(tested) and tested[-1]["step"] == trainer.state.global_step
    if is_last and not trainer.args.load_best_model_at_end:
        return tested[-1]
    trainer.evaluate()
    return trainer.state.log_history[-1]


def finish_tracking() -> None:
    """End the run of wandb, if it is used: its callback does not, and the next training would go into the same run."""
    wandb = sys.modules.get("wandb")
    if wandb is not None:
        wandb.finish()


class EpochCallback(TrainerCallback):
    """Tells the training images which epoch it is, which accelerate's loaders do in some cases only."""

    def __init__(self, images: AugmentedImages) -> None:
        self.images = images

    def on_epoch_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the epoch, also where a run is resumed within one."""
        self.images.set_epoch(int(state.epoch))


def print_accuracy(results: list[dict[str, float]]) -> None:
    """Print the accuracy, from several seeds with the 95 % interval of their mean."""
    accuracy = 100 * np.array([result["eval_top1"] for result in results])
    text = f"Test accuracy: top-1 {accuracy.mean():.1f} %"
    if len(accuracy) > 1:
        half = stats.sem(accuracy) * stats.t.ppf(0.975, len(accuracy) - 1)
        text += f" ± {half:.1f} (95 % interval of the mean), by seed {', '.join(f'{value:.1f}' for value in accuracy)}"
    print(text)


# Options


def parse_arguments() -> tuple[Arguments, TrainingArguments]:
    """Read the command line; each wrong value ends the script with one line."""
    usage = "transfer.py [options]; --help lists them"
    parser = HfArgumentParser([Arguments, TrainingArguments], usage=usage, allow_abbrev=False)  # type: ignore[list-item]
    parser.set_defaults(**DEFAULTS)
    try:
        args, training, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    except (ValueError, ImportError, TypeError) as error:  # from TrainingArguments
        stop(f"These options do not fit: {one_line(error)}")
    if unknown:
        parser.error(f"there is no option {unknown[0]}")
    check_arguments(args, training)
    refuse_useless_options(training)
    check_runs(args, training)
    return args, training


def check_arguments(args: Arguments, training: TrainingArguments) -> None:
    """Refuse what cannot be meant, before anything is loaded."""
    values = {**vars(args), **vars(training)}
    for name in ("lam", "seeds", "crop_scale", "num_train_epochs", "per_device_train_batch_size", "learning_rate"):
        if not 0 < values[name] < math.inf:
            stop(f"--{name} {values[name]}: give a number above 0.")
    for name in ("crop_scale", "flip", "train_samples", "test_samples"):
        if values[name] is not None and values[name] < 0:
            stop(f"--{name} {values[name]}: give 0 or more.")
    if max(args.crop_scale, args.flip or 0) > 1:
        stop(f"--crop_scale {args.crop_scale}, --flip {args.flip}: give at most 1.")
    if args.checkpoint == CHECKPOINT and not Path(CHECKPOINT).exists():
        stop(f"--checkpoint {CHECKPOINT} is not there: run pretrain_vit.py first, or name another --checkpoint.")
    if training.hub_token:
        stop("--hub_token would stand in your shell's history: set HF_TOKEN or run `hf auth login`.")


def refuse_useless_options(training: TrainingArguments) -> None:
    """Refuse options of TrainingArguments that this script would pass over, or that end it after the training."""
    for name in ("do_predict", "prediction_loss_only", "batch_eval_metrics"):
        if getattr(training, name):
            stop(f"--{name} has no use here: this script trains, tests after each epoch, and saves.")


def check_runs(args: Arguments, training: TrainingArguments) -> None:
    """Refuse folders and checkpoints that are not there, and a push without a token."""
    resume = training.resume_from_checkpoint
    folder = Path(str(training.output_dir))
    if folder.is_file():
        stop(f"--output_dir {folder} is a file: name a folder.")
    if args.seeds > 1 and (training.push_to_hub or resume):
        stop("--push_to_hub and --resume_from_checkpoint are for one run: leave --seeds at 1.")
    if resume == "latest":
        training.resume_from_checkpoint = find_last_checkpoint(folder)
    elif resume and not Path(resume).is_dir():
        stop(f"--resume_from_checkpoint {resume}: there is no such folder.")
    if training.push_to_hub:
        repo_id = training.hub_model_id or folder.name
        check_token(repo_id)
        if training.hub_private_repo and IS_MAIN_PROCESS:
            check_private(repo_id)


def check_private(repo_id: str) -> None:
    """Make a private repository, and refuse a public one: Trainer would push the model there."""
    api = HfApi()
    try:
        repo_id = api.create_repo(repo_id, private=True, exist_ok=True).repo_id
        is_public = not api.model_info(repo_id).private
    except Exception as error:  # The errors of the Hub's client and of its connections have no common class.
        stop(f"--push_to_hub: {repo_id} cannot be written to: {one_line(error)}")
    if is_public:
        stop(f"--hub_private_repo: {repo_id} exists and is public. Change it on the Hub, or name another.")


def find_last_checkpoint(folder: Path) -> str:
    """Return the last checkpoint in a folder that Trainer has finished."""
    # What Trainer writes last: without it, saving was cut off.
    found = [state.parent for state in folder.glob("checkpoint-*/trainer_state.json")]
    complete = [path for path in found if re.fullmatch(r"checkpoint-\d+", path.name)]
    if not complete:
        stop(f"--resume_from_checkpoint latest: there is no checkpoint in {folder}.")
    return str(max(complete, key=lambda path: int(path.name.partition("-")[2])))


# Models


def describe_head(checkpoint: str, names: list[str]) -> str:
    """Return what becomes of a checkpoint's head, in words."""
    try:
        config = AutoConfig.from_pretrained(without_prefix(checkpoint))
    except (OSError, ValueError) as error:
        stop(f"--checkpoint {checkpoint} is no folder and no model that the Hub gives: {one_line(error)}")
    if config.num_labels != len(names):
        return f"The head is new: {checkpoint} knows {config.num_labels} classes, the data set has {len(names)}."
    saved = " ".join(config.architectures or ())  # the model's class; for timm's, the model's name
    if saved and config.model_type != "timm_wrapper" and "ForImageClassification" not in saved:
        return f"The head is new: {checkpoint} has none for images."
    if [name for _, name in sorted(config.id2label.items())] == names:
        return f"The head is kept: {len(names)} classes."
    return f"The head is kept, though its {len(names)} classes have other names or another order: it learns them anew."


def load_processor(checkpoint: str) -> Any:
    """Load a checkpoint's image processor."""
    try:
        return AutoImageProcessor.from_pretrained(without_prefix(checkpoint))
    except (OSError, ValueError) as error:
        stop(f"--checkpoint {checkpoint} has no image processor, save one beside it: {one_line(error)}")


def freeze(model: PreTrainedModel, patterns: list[str]) -> None:
    """Exclude the parameters whose names match one of the patterns from training."""
    for pattern in patterns:
        names = fnmatch.filter([name for name, _ in model.named_parameters()], pattern)
        if not names:
            stop(f"--freeze {pattern} matches no parameter of {type(model).__name__}.")
        for name in names:
            model.get_parameter(name).requires_grad = False


def label_settings(names: list[str]) -> dict[str, Any]:
    """Return what a configuration of transformers holds about the classes."""
    numbers = {name: number for number, name in enumerate(names)}
    return {"id2label": dict(enumerate(names)), "label2id": numbers, "num_labels": len(names)}


def load_given(option: str, name: str, names: list[str]) -> PreTrainedModel:
    """Load the checkpoint that an option names."""
    try:
        return load_checkpoint(name, names)
    except (OSError, ValueError, RuntimeError) as error:
        stop(f"{option} {name} cannot be loaded as a classifier of images: {one_line(error)}")


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


def one_line(error: Exception) -> str:
    """Return the beginning of an error's text in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


# The Hub


def check_token(repo_id: str) -> None:
    """Refuse to begin a training whose model could not be pushed for want of a token."""
    if get_token() is None:
        stop(f"{repo_id} cannot be pushed to without a token: set HF_TOKEN or run `hf auth login`.")


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


# Images


def make_images(
    args: Arguments, processor: Any, data: ImageData, seed: int
) -> tuple[AugmentedImages, AugmentedImages]:
    """Return training images, cropped and mirrored at random, and test images, as the image processor makes them."""
    prepare = functools.partial(prepare_image, processor)
    wide = prepare(Image.new("RGB", (48, 32)))
    tall = prepare(Image.new("RGB", (32, 48)))
    if wide.ndim != 3 or wide.shape != tall.shape:
        shapes = f"{tuple(wide.shape)} of a wide one and {tuple(tall.shape)} of a tall one"
        problem = f"its image processor must make images of one size, and makes {shapes}"
        stop(f"--checkpoint {args.checkpoint}: {problem}.")
    flip = args.flip
    if flip is None:
        flip = 0.5 * (args.dataset != "digits")  # A mirrored 2 is no 2.
    crop = v2.RandomResizedCrop(wide.shape[-2:], scale=(args.crop_scale, 1.0))
    normalize = functools.partial(normalize_image, processor)
    augmented = v2.Compose([crop, v2.RandomHorizontalFlip(flip), normalize])
    return AugmentedImages(data.train, augmented, seed), AugmentedImages(data.test, prepare)


def prepare_image(processor: Any, image: Image.Image) -> Tensor:
    """Resize, crop and normalise an image as an image processor of transformers or timm does."""
    batch = processor(image, return_tensors="pt")
    pixels: Tensor = batch["pixel_values"][0]
    return pixels


def normalize_image(processor: Any, image: Image.Image) -> Tensor:
    """Normalise an image that has its size already, as an image processor of transformers or timm does."""
    pixels: Tensor
    by_timm = getattr(processor, "data_config", None)
    if by_timm:
        pixels = v2.functional.pil_to_tensor(image) / 255
        pixels = v2.functional.normalize(pixels, by_timm["mean"], by_timm["std"])
    else:
        batch = processor(image, do_resize=False, do_center_crop=False, return_tensors="pt")
        pixels = batch["pixel_values"][0]
    return pixels


def collate(rows: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
    """Return a batch as the models take it."""
    pixels, labels = zip(*rows, strict=True)
    return {"pixel_values": torch.stack(pixels), "labels": torch.tensor(labels)}


# Digits: a small data set without a download


def digits() -> datasets.DatasetDict:
    """Make a data set of scikit-learn's handwritten digits: 1797 grey images of 8x8 pixels, a quarter for testing."""
    pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = (pixels.reshape(-1, 8, 8) * 255 / 16).round().astype(np.uint8)
    parts = train_test_split(np.arange(len(labels)), test_size=0.25, stratify=labels, random_state=0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("0123456789"))})
    splits = datasets.DatasetDict()
    for split, part in zip(("train", "test"), parts, strict=True):
        columns = {"image": [Image.fromarray(image) for image in images[part]], "label": labels[part].tolist()}
        splits[split] = datasets.Dataset.from_dict(columns, features=features)
    return splits


# Images of your own

BUILT_IN: dict[str, Callable[[], datasets.DatasetDict]] = {"digits": digits}
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
