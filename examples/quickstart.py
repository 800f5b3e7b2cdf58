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
#     "rich>=13",
#     "scikit-image>=0.24",
#     "scikit-learn>=1.5",
#     "scipy>=1.11",
#     "torch>=2.8",
#     "torchvision>=0.23",
#     "tqdm>=4.66",
#     "transformers>=5.0",
# ]
# ///
"""Trains a small vision model without TrAct, with it, and from a whitened start, and shows a table and a plot.

    python quickstart.py                            # masked image modelling on photographs, without a download
    python quickstart.py --seeds 5                  # means with their 95 % intervals
    python quickstart.py --dataset PATH_TO_IMAGES   # classifies them: a folder for each class, parquet, or a Hub id
    python quickstart.py --dataset PATH_TO_IMAGES --task masked   # learns from them without their classes
    python quickstart.py --save_dataset my_crops    # writes crops as a folder of images by class, for other scripts

In masked image modelling a vision transformer sees some patches of an image and predicts the pixels of the others. It
is tested on photographs of which it has seen nothing, and each crop is standardised by the pixels that the model sees.

Finished runs are stored in OUTPUT_DIR/records.jsonl; the same command with more seeds trains only what is missing.
Images of your own that have changed since are trained on again.
"""

import glob
import io
import json
import math
import os
import platform
import shlex
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import datasets
import matplotlib as mpl
import numpy as np
import skimage.data
import sklearn.datasets
import torch
from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageOps
from rich.console import Console
from rich.table import Table
from scipy import stats
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, default_convert
from torchvision.transforms import v2
from tqdm.auto import tqdm
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.integration_utils import get_available_reporting_integrations

from hf_tract import TrActCallback
from hf_tract.metrics import compute_top_k

mpl.use("Agg")
from matplotlib import pyplot as plt

VANILLA = "vanilla"
TRACT = "TrAct"
WHITENED = "TrAct, whitened start"
STYLES = {VANILLA: ("#555555", "s"), TRACT: ("#0072b2", "o"), WHITENED: ("#e69f00", "^")}

SMALL_VIT = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 384,
}
# What transformers raises for settings that are wrong or do not suit each other.
MODEL_ERRORS = (ValueError, TypeError, KeyError, AssertionError, RuntimeError, StrictDataclassError)
MAX_BYTES = 4 * 2**30  # of decoded images, all of which stay in memory
BATCH_SIZES = {"masked": 32, "classify": 128}
IMAGE_SIZES = {"masked": 24, "classify": 32}  # for random weights
PATCH_SIZES = {"masked": 4, "classify": 8}  # of the small vit
HIDDEN_SHARE = 0.5  # of the patches, in masked image modelling
MIN_DEVIATION = 0.1  # on the scale 0 to 1; flatter images are not stretched further
# These options make no difference to a single run, so they are not among a record's settings.
NOT_SETTINGS = ("seeds", "first_seed", "output_dir", "report_to", "save_dataset", "lam")


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


@dataclass
class Options(DataOptions):
    """Says what is trained, and how long."""

    dataset: str = option(
        "photographs", "photographs or photo_crops (no download), a folder of images or of parquet files, or a Hub id."
    )
    task: Literal["auto", "masked", "classify"] = option(
        "auto",
        "masked image modelling, which uses no classes, or classification; auto is masked for photographs alone.",
    )
    model: str = option(
        "vit", "a model type of transformers (vit, convnext, resnet, ...), for random weights, or a checkpoint."
    )
    model_config: str = option("{}", "JSON with settings for random weights; a vit without settings is a small one.")
    image_size: int = option(
        0, "height and width; 0 for 24, for 32 if images are classified, or for what a checkpoint expects."
    )
    lam: float = option(0.1, "TrAct's damping.")
    epochs: int = option(8, "passes over the training images.")
    batch_size: int = option(0, "images of each step; 0 for 32, and for 128 if images are classified.")
    learning_rate: float = option(1e-3, "of AdamW, with a cosine schedule.")
    max_grad_norm: float = option(1.0, "clipping by Trainer, which sees TrAct's gradient; 0 for none.")
    seeds: int = option(1, "number of runs of each arm.")
    first_seed: int = option(0, "seed of the first run, after which they count up.")
    report_to: str = option("none", "none, tensorboard, wandb, trackio, ...")
    output_dir: str = option("outputs/quickstart", "folder of the records and the plot.")
    save_dataset: str | None = option(
        None, "write the photo crops into this folder, as train/CLASS/*.png and test/CLASS/*.png, and end."
    )


class Images(NamedTuple):
    """Holds decoded images, (count, 3, height, width) in 8 bits, and the number of each one's class."""

    pixels: Tensor
    labels: Tensor


class Data(NamedTuple):
    """Holds all images, the names of the classes, and the training images' mean and deviation on the scale 0 to 1."""

    train: Images
    test: Images
    names: list[str]
    mean: Tensor
    std: Tensor


class Measure(NamedTuple):
    """Says what is measured after each epoch, under which key Trainer logs it, and how it is written."""

    name: str
    key: str
    scale: float
    digits: int
    unit: str
    unit_of_change: str
    sign: int  # 1 where more is better, -1 where less is


MEASURES = {
    "masked": Measure("loss", "eval_loss", 1, 4, "", "", -1),
    "classify": Measure("accuracy", "eval_top1", 100, 1, " %", " points", 1),
}
Record = dict[str, Any]  # of a finished run: arm, seed, settings, loss or accuracy, seconds, command, versions


def main() -> None:
    """Train what has not been trained yet, and report."""
    options = parse_options()
    if options.save_dataset:
        save_photo_crops(Path(options.save_dataset))
        return
    folder = Path(options.output_dir)
    make_folder(folder)
    data = load_data(options)
    if options.task == "masked":
        say(f"Predicting the mean of each image's visible pixels: test loss {trivial_loss(data, options):.4f}")
    arms = settings_of_arms(options, data)
    records = read_records(folder)
    measure = MEASURES[options.task]
    curves: dict[str, list[list[float]]] = {arm: [] for arm in arms}
    clocks: dict[str, list[list[float]]] = {arm: [] for arm in arms}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for arm, settings in arms.items():
            record = find_record(records, arm, seed, settings)
            if record is None:
                record = train_arm(arm, seed, settings, data, options)
                add_record(folder, record)
            curves[arm].append(record[measure.name])
            clocks[arm].append(record["seconds"])
    if IS_MAIN_PROCESS:
        results = {}
        for arm in arms:
            results[arm] = Result(measure.scale * np.array(curves[arm]), np.array(clocks[arm]))
        report(results, options)


def parse_options() -> Options:
    """Read the command line; each wrong value ends the script with one line."""
    usage = "quickstart.py [options]; --help lists them"
    parser = HfArgumentParser(Options, usage=usage, allow_abbrev=False)  # type: ignore[arg-type]
    options, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        parser.error(f"there is no option {unknown[0]}")
    check_numbers_of_run(options)
    check_words(options)
    choose_task(options)
    if not options.image_size:
        options.image_size = default_image_size(options)
    return options


def check_numbers_of_run(options: Options) -> None:
    """Refuse numbers that cannot be meant, before anything is loaded."""
    for name in ("epochs", "seeds", "lam", "learning_rate"):
        value = getattr(options, name)
        if not 0 < value < math.inf:
            stop(f"--{name} {value}: give a number above 0.")
    for name in ("train_samples", "test_samples", "image_size", "batch_size", "max_grad_norm", "first_seed"):
        value = getattr(options, name)
        if not 0 <= value < math.inf:
            stop(f"--{name} {value}: give 0 or more.")


def check_words(options: Options) -> None:
    """Refuse a tracker that is not installed, and options that do not go together."""
    tracker = options.report_to
    trackers = get_available_reporting_integrations()
    if tracker not in ("none", "all", *trackers):
        stop(f"--report_to {tracker}: give one of none, all, {', '.join(trackers)}, or install it.")
    if Path(options.output_dir).is_file():
        stop(f"--output_dir {options.output_dir} is a file: name a folder.")
    if options.save_dataset and options.dataset not in BUILT_IN:
        stop(f"--save_dataset writes photo_crops alone: leave --dataset {options.dataset} out.")
    if options.model not in CONFIG_MAPPING and options.model_config != "{}":
        stop(f"--model_config is for random weights, and --model {options.model} is a checkpoint.")


def choose_task(options: Options) -> None:
    """Choose the task where the command leaves it open, and what depends on it."""
    has_classes = options.dataset != "photographs"
    if options.task == "auto":
        options.task = "masked"
        if has_classes:
            options.task = "classify"
    if options.task == "classify" and not has_classes:
        stop("--task classify: photographs have no classes; add --dataset photo_crops, or a folder of your images.")
    if options.task == "masked" and options.label_column:
        stop(f"--label_column {options.label_column}: --task masked uses no classes; leave it out.")
    options.batch_size = options.batch_size or BATCH_SIZES[options.task]


def default_image_size(options: Options) -> int:
    """Return the side of the images that a checkpoint expects, or a small one for random weights."""
    model = options.model
    if model in CONFIG_MAPPING:
        return IMAGE_SIZES[options.task]
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        stop(f"--model {model} must be a model type (vit, ...) or a checkpoint: {one_line(error)}")
    size = getattr(config, "image_size", None)
    if isinstance(size, int):
        return size
    return 224


def settings_of_arms(options: Options, data: Data) -> dict[str, Record]:
    """Return what each arm's result depends on; a checkpoint, whose weights are trained, gets no whitened start."""
    shared = vars(options).copy()
    for name in NOT_SETTINGS:
        del shared[name]
    shared["train_images"] = len(data.train.labels)
    shared["test_images"] = len(data.test.labels)
    if options.dataset not in BUILT_IN:
        shared["checksum"] = checksum_of_images(data)
    if PROCESSES > 1:
        shared["processes"] = PROCESSES
    elif torch.cuda.device_count() > 1:
        shared["gpus"] = torch.cuda.device_count()  # Trainer uses all of them.
    arms = {VANILLA: shared}
    arms[TRACT] = {**shared, "lam": options.lam}
    if options.model in CONFIG_MAPPING:
        arms[WHITENED] = {**arms[TRACT], "whiten_init": True}
    return arms


def checksum_of_images(data: Data) -> int:
    """Return a number that is another one if a pixel or a label changes."""
    checksum = 0
    for numbers in (*data.train, *data.test):
        checksum = zlib.crc32(numbers.numpy().data, checksum)
    return checksum


# Training


def train_arm(arm: str, seed: int, settings: Record, data: Data, options: Options) -> Record:
    """Train one arm from one seed, and return its record."""
    set_seed(seed)
    model = build_model(options, data.names)
    count = model.num_parameters()
    say(f"\n{arm}, seed {seed}: {options.model} with {count:,} parameters")
    clock = Clock()
    callbacks: list[TrainerCallback] = [clock]
    if arm != VANILLA:  # This is all that TrAct needs.
        whiten = arm == WHITENED
        callbacks.append(TrActCallback(lam=options.lam, whiten_init=whiten))
    run = f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
    metrics = None
    if options.task == "classify":
        metrics = compute_top_k
    trainer = Trainer(
        model=model,
        args=training_arguments(options, seed, run),
        train_dataset=make_batches(data.train, data, model, options, train=True),
        eval_dataset=make_batches(data.test, data, model, options, train=False),
        data_collator=default_convert,
        compute_metrics=metrics,
        callbacks=callbacks,
    )
    trainer.train()
    finish_tracking()
    measure = MEASURES[options.task]
    history = trainer.state.log_history
    curve = [entry[measure.key] for entry in history if measure.key in entry]
    record = {"arm": arm, "seed": seed, "settings": settings}
    return {**record, measure.name: curve, "seconds": clock.seconds, **describe_run()}


def finish_tracking() -> None:
    """End the run of wandb, if it is used: its callback does not, and the next training would go into the same run."""
    wandb = sys.modules.get("wandb")
    if wandb is not None:
        wandb.finish()


def training_arguments(options: Options, seed: int, run: str) -> TrainingArguments:
    """Return what Trainer is told of a run, the same for all arms but for its name."""
    labels = ["labels"]
    if options.task == "masked":
        labels = ["bool_masked_pos"]  # Trainer reports a test loss where it finds these in a batch.
    return TrainingArguments(
        output_dir=str(Path(options.output_dir, run)),
        run_name=run,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=2 * options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        max_grad_norm=options.max_grad_norm,
        label_names=labels,
        eval_strategy="epoch",
        logging_strategy="epoch",
        save_strategy="no",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.accelerator.is_available(),
        report_to=options.report_to,
        seed=seed,
    )


class Clock(TrainerCallback):
    """Measures the process time of training up to the end of each epoch: whitening is counted, testing is not."""

    def __init__(self) -> None:
        self.begin = 0.0
        self.total = 0.0
        self.seconds: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start before the first layer is whitened, which TrActCallback does later."""
        self.begin = time.process_time()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """Add an epoch, which ends before its test."""
        self.total += time.process_time() - self.begin
        self.seconds.append(self.total)

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Start again after a test."""
        self.begin = time.process_time()


def build_model(options: Options, names: list[str]) -> Any:
    """Make a model of random weights, or load a checkpoint with a new head, and try it on images of this size."""
    name, size = options.model, options.image_size
    factory: Any = AutoModelForMaskedImageModeling
    labels = {}
    if options.task == "classify":
        factory = AutoModelForImageClassification
        labels = label_settings(names)
    try:
        if name in CONFIG_MAPPING:
            settings = {"image_size": size, **random_model_settings(options)}
            config = AutoConfig.for_model(name, **settings, **labels)
            model = factory.from_config(config)
        else:
            model = factory.from_pretrained(name, ignore_mismatched_sizes=True, **labels)
        batch = {"pixel_values": torch.zeros(1, 3, size, size)}
        if options.task == "masked":
            batch["bool_masked_pos"] = hide_patches(1, patches_per_side(model))
        with torch.no_grad():
            model.eval()(**batch)
    except (*MODEL_ERRORS, OSError) as error:
        stop(f"--model {name} cannot be made for images of --image_size {size}: {one_line(error)}")
    return model


def label_settings(names: list[str]) -> dict[str, Any]:
    """Return what a configuration of transformers holds about the classes."""
    numbers = {name: number for number, name in enumerate(names)}
    return {"id2label": dict(enumerate(names)), "label2id": numbers, "num_labels": len(names)}


def random_model_settings(options: Options) -> dict[str, Any]:
    """Return the settings in `--model_config`; transformers itself would ignore a misspelt one."""
    text = options.model_config
    try:
        settings = dict(json.loads(text))
    except (ValueError, TypeError):
        stop(f"--model_config {text}: give JSON, such as '{json.dumps(SMALL_VIT)}'.")
    known = AutoConfig.for_model(options.model)
    for name in settings:
        if not hasattr(known, name):
            stop(f"--model_config: {options.model} has no setting {name!r}.")
    if options.model == "vit" and not settings:
        patch = PATCH_SIZES[options.task]
        return {**SMALL_VIT, "patch_size": patch, "encoder_stride": patch}
    return settings


def one_line(error: Exception) -> str:
    """Return the beginning of an error's text in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


# Images in batches


class Batches(Dataset[dict[str, Tensor]]):
    """Yields the normalised images of a whole batch at once, which is much faster than one by one."""

    def __init__(
        self,
        images: Images,
        data: Data,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.images = images
        self.mean = data.mean
        self.std = data.std
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return a batch; PyTorch's loader calls this method where there is one."""
        pixels = self.images.pixels[indices]
        labels = self.images.labels[indices]
        if self.transform:
            pixels = self.transform(pixels)
        pixels = (pixels / 255 - self.mean) / self.std
        return {"pixel_values": pixels, "labels": labels}


class MaskedBatches(Batches):
    """Yields batches of images and of the patches that are hidden: other ones each time, but the same for testing."""

    def __init__(self, images: Images, data: Data, patches: int, train: bool) -> None:
        super().__init__(images, data)
        self.patches = patches  # along each side of an image
        self.hidden = None
        if not train:
            draw = torch.Generator().manual_seed(0)
            self.hidden = hide_patches(len(self), patches, draw)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return a batch; PyTorch's loader calls this method where there is one."""
        pixels = self.images.pixels[indices] / 255
        if self.hidden is None:
            pixels = flip_half(pixels)
            hidden = hide_patches(len(indices), self.patches)
        else:
            hidden = self.hidden[indices]
        pixels = standardise_by_visible(pixels, hidden)
        return {"pixel_values": pixels, "bool_masked_pos": hidden}


def make_batches(images: Images, data: Data, model: Any, options: Options, *, train: bool) -> Batches:
    """Return batches for the task, augmented for training."""
    if options.task == "masked":
        return MaskedBatches(images, data, patches_per_side(model), train)
    if train:
        return Batches(images, data, augment)
    return Batches(images, data)


def patches_per_side(model: Any) -> int:
    """Return how many patches a model that can hide them has along each side of an image."""
    config = model.config
    patches: int = config.image_size // config.patch_size
    return patches


def hide_patches(count: int, patches: int, draw: torch.Generator | None = None) -> Tensor:
    """Draw which patches are hidden, as many of each image: (count, patches * patches), true where hidden."""
    total = patches * patches
    order = torch.rand(count, total, generator=draw).argsort(1)
    return order < HIDDEN_SHARE * total


def pixels_of(hidden: Tensor, size: int) -> Tensor:
    """Return the hidden pixels, (count, 1, size, size), of hidden patches."""
    patches = math.isqrt(hidden.shape[1])
    squares = hidden.view(-1, 1, patches, patches).float()
    return F.interpolate(squares, size=(size, size)).bool()


def standardise_by_visible(pixels: Tensor, hidden: Tensor) -> Tensor:
    """Give what is visible of each image mean 0 in each channel, and deviation 1 over all of them.

    The colour and contrast of the visible part then tell nothing of what is hidden; only the structure does.
    """
    visible = (~pixels_of(hidden, pixels.shape[-1])).float()
    count = visible.sum((2, 3), keepdim=True)
    mean = (pixels * visible).sum((2, 3), keepdim=True) / count
    centred = pixels - mean
    squares = (centred.square() * visible).sum((1, 2, 3), keepdim=True)
    deviation = (squares / (3 * count)).sqrt()
    standardised: Tensor = centred / deviation.clamp(min=MIN_DEVIATION)
    return standardised


def trivial_loss(data: Data, options: Options) -> float:
    """Return the loss of predicting each test image's visible mean, which is 0, on at most 1000 of them."""
    model = build_model(options, data.names)
    batches = make_batches(data.test, data, model, options, train=False)
    some = range(min(len(batches), 1000))
    batch = batches.__getitems__(list(some))
    pixels = batch["pixel_values"]
    hidden = pixels_of(batch["bool_masked_pos"], options.image_size).expand_as(pixels)
    return pixels[hidden].abs().mean().item()


def augment(pixels: Tensor) -> Tensor:
    """Shift, flip and jitter 8-bit images, each by draws of its own; the result is float, from 0 to 255."""
    count, _, height, width = pixels.shape
    margin = height // 8
    padded = F.pad(pixels, [margin] * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    top, left = torch.randint(0, 2 * margin + 1, (2, count))
    each = torch.arange(count)
    shifted = windows[each, :, top, left].float()
    flipped = flip_half(shifted)
    brightness, contrast = 0.7 + 0.6 * torch.rand(2, count, 1, 1, 1)
    brighter = (brightness * flipped).clamp(0, 255)
    mean = brighter.mean((1, 2, 3), keepdim=True)
    contrasted: Tensor = mean + contrast * (brighter - mean)
    return contrasted.clamp(0, 255)


def flip_half(pixels: Tensor) -> Tensor:
    """Flip each image from left to right with probability one half."""
    flip = torch.rand(len(pixels), 1, 1, 1) < 0.5
    return torch.where(flip, pixels.flip(-1), pixels)


def load_data(options: Options) -> Data:
    """Decode all images once, and measure the training images' mean and deviation."""
    loaders = {"masked": load_unlabelled, "classify": load_images}
    found = loaders[options.task](options)
    try:
        train = decode(found.train, options)
        test = decode(found.test, options)
    except ImageError as error:
        stop(str(error))
    text = f"{options.dataset}: {len(train.labels)} training images, {len(test.labels)} test images"
    if options.task == "classify":
        text += f", {len(found.names)} classes"
    say(text)
    chosen = np.random.default_rng(0).permutation(len(train.labels))[:1000]
    pixels = train.pixels[chosen] / 255
    mean = pixels.mean((0, 2, 3), keepdim=True)
    std = pixels.std((0, 2, 3), keepdim=True)
    std = std.clamp(min=1e-3)  # for images of one colour
    return Data(train, test, found.names, mean, std)


def decode(rows: datasets.Dataset, options: Options) -> Images:
    """Decode images, resize their shorter side to `--image_size`, and crop their centre."""
    count, size = len(rows), options.image_size
    if 3 * size * size * count > MAX_BYTES:
        stop(
            f"--image_size {size}: {count} images of that size do not fit into memory; "
            f"give a smaller one, or --train_samples and --test_samples."
        )
    transform = v2.Compose(to_tensor(size))
    pixels = torch.empty(count, 3, size, size, dtype=torch.uint8)
    quiet = not IS_MAIN_PROCESS
    for index in tqdm(range(count), "decoding images", leave=False, disable=quiet):
        pixels[index] = transform(read_image(rows, index))
    return Images(pixels, torch.tensor(rows["label"]))


def to_tensor(size: int) -> list[Any]:
    """Return transforms that make an image of any shape uint8 (3, size, size)."""
    return [v2.ToImage(), v2.Resize(size, v2.InterpolationMode.BICUBIC), v2.CenterCrop(size)]


# Records of finished runs


def describe_run() -> Record:
    """Return the command, the versions and the hardware that a result depends on."""
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    hardware = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    device = PartialState().device  # the one that the run has used
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    elif device.type != "cpu":
        hardware = f"{platform.machine()}, {device.type}"
    return {"command": command, "versions": library_versions(), "hardware": hardware}


def library_versions() -> dict[str, str]:
    """Return the versions that a result depends on, before accelerate has chosen a device."""
    names = ("hf-tract", "torch", "transformers", "accelerate", "datasets")
    return {name: version(name) for name in names}


def read_records(folder: Path) -> list[Record]:
    """Read the finished runs of earlier commands."""
    file = folder / "records.jsonl"
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines()
    say(f"{file} holds {len(lines)} finished runs; those with the same settings and images are not trained again.")
    records = [json.loads(line) for line in lines]
    versions = library_versions()
    if any(record.get("versions", versions) != versions for record in records):
        say("Some of them were made with other versions of libraries; with another --output_dir all are trained anew.")
    return records


def find_record(records: list[Record], arm: str, seed: int, settings: Record) -> Record | None:
    """Return the record of the run with just these settings, or None."""
    wanted = (arm, seed, settings)
    for record in records:
        if (record["arm"], record["seed"], record["settings"]) == wanted:
            return record
    return None


def add_record(folder: Path, record: Record) -> None:
    """Write a record as soon as its run is finished, so that a later interruption does not lose it."""
    if IS_MAIN_PROCESS:
        line = json.dumps(record) + "\n"
        with (folder / "records.jsonl").open("a", encoding="utf-8") as file:
            file.write(line)


# Report


class Result(NamedTuple):
    """Holds what an arm has measured, (seeds, epochs), and the seconds of process time until then."""

    curve: np.ndarray
    clock: np.ndarray


def report(results: dict[str, Result], options: Options) -> None:
    """Print the table of accuracies or losses and what follows from it, and save the plot."""
    measure = MEASURES[options.task]
    console = Console(soft_wrap=True)
    console.print(f"\nTest {measure.name} on {options.dataset}{in_unit(measure)}{means_over(options)}")
    table = Table("epoch", *results)
    for epoch in range(options.epochs):
        cells = [format_mean(result.curve[:, epoch], measure) for result in results.values()]
        table.add_row(str(epoch + 1), *cells)
    cells = [f"{result.clock[:, -1].mean():.1f}" for result in results.values()]
    table.add_row("seconds", *cells)
    console.print(table)
    console.print("Seconds are of process time in training, all threads together, testing not counted.")
    if torch.get_num_threads() > 1:
        console.print(
            "Threads that wait count too: compare seconds of runs with OMP_NUM_THREADS=1, or of a quiet machine."
        )
    for arm in results:
        if arm != VANILLA:
            console.print(compare(arm, results, measure))
    if options.seeds == 1:
        console.print("One seed shows little: with --seeds 5, four more are trained, and intervals shown.")
    console.print(f"Plot: {plot(results, options)}")
    console.print("On your own images: the same command with --dataset FOLDER.")


def in_unit(measure: Measure) -> str:
    """Return in words which unit figures have that stand alone."""
    return measure.unit.replace("%", "in per cent")


def means_over(options: Options) -> str:
    """Return in words what the figures are, where there are several seeds."""
    if options.seeds == 1:
        return ""
    return f", mean ± 95 % interval (t distribution) over {options.seeds} seeds"


def format_mean(values: np.ndarray, measure: Measure, sign: str = "") -> str:
    """Return the mean and, for several seeds, half the width of its 95 % interval."""
    text = f"{values.mean():{sign}.{measure.digits}f}"
    if len(values) > 1:
        text += f" ± {half_width(values):.{measure.digits}f}"
    return text


def half_width(values: np.ndarray) -> Any:
    """Return half the width of the mean's 95 % interval by the t distribution, over the first dimension."""
    count = len(values)
    if count == 1:
        return np.zeros(values.shape[1:])
    factor = stats.t.ppf(0.975, count - 1)
    return factor * values.std(0, ddof=1) / math.sqrt(count)


def compare(arm: str, results: dict[str, Result], measure: Measure) -> str:
    """Return in words how an arm ends, and after how many epochs and seconds it reaches vanilla's final figure."""
    vanilla, result = results[VANILLA], results[arm]
    goal = vanilla.curve[:, -1].mean()
    change = format_mean(result.curve[:, -1] - vanilla.curve[:, -1], measure, "+") + measure.unit_of_change
    text = f"{arm}: {change} at the end; reaches vanilla's {goal:.{measure.digits}f}{measure.unit} "
    epochs = result.curve.shape[1]
    first = first_epoch_at(measure.sign * result.curve.mean(0), measure.sign * goal)
    if first is None:
        return f"{text}in none of the {epochs} epochs."
    spent = result.clock[:, first - 1].mean()
    needed = vanilla.clock[:, -1].mean()
    return f"{text}after {first} of {epochs} epochs and {spent:.1f} of vanilla's {needed:.1f} seconds."


def first_epoch_at(curve: np.ndarray, goal: float) -> int | None:
    """Return the first epoch, counted from 1, whose value is at least `goal`."""
    for epoch, value in enumerate(curve, 1):
        if value >= goal:
            return epoch
    return None


def plot(results: dict[str, Result], options: Options) -> Path:
    """Draw the mean of each arm over the epochs, with its interval as a band."""
    measure = MEASURES[options.task]
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    final = {arm: result.curve[:, -1].mean() for arm, result in results.items()}
    for arm in sorted(final, key=final.__getitem__, reverse=True):
        color, marker = STYLES[arm]
        mean, half = results[arm].curve.mean(0), half_width(results[arm].curve)
        epochs = range(1, len(mean) + 1)
        label = f"{arm}: {final[arm]:.{measure.digits}f}{measure.unit}"
        axes.plot(epochs, mean, color=color, marker=marker, markersize=4, label=label)
        axes.fill_between(epochs, mean - half, mean + half, color=color, alpha=0.2, linewidth=0)
    color, _ = STYLES[VANILLA]
    axes.axhline(final[VANILLA], color=color, linewidth=1, linestyle=":", label=f"vanilla's final {measure.name}")
    data = Path(options.dataset).name.replace("_", " ")
    title = f"Test {measure.name} on {data} ({options.model}) with and without TrAct"
    if options.seeds > 1:
        title += f"\nmeans over {options.seeds} seeds, and their 95 % intervals as bands"
    axes.set(xlabel="epoch", ylabel=f"test {measure.name}{in_unit(measure)}", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.2)
    figure.legend(loc="outside right center", title="after the last epoch", frameon=False)
    file = Path(options.output_dir, "comparison.png")
    figure.savefig(file, dpi=150)
    plt.close(figure)
    return file


# Photographs: two small data sets without a download

# Held out are whole photographs: a cat, a temple in its landscape, and a rocket in front of the sky.
TRAIN_PHOTOGRAPHS = ["astronaut", "coffee", "flower", "hubble_deep_field", "ihc", "motorcycle_left", "retina"]
TEST_PHOTOGRAPHS = ["chelsea", "china", "rocket"]


def photographs() -> datasets.DatasetDict:
    """Make a data set of squares of 32 to 96 pixels out of colour photographs, at 24x24 pixels each."""
    splits = datasets.DatasetDict()
    parts = {"train": (TRAIN_PHOTOGRAPHS, 600), "test": (TEST_PHOTOGRAPHS, 300)}
    for split, (names, count) in parts.items():
        images = []
        for name in names:
            images += draw_squares(Image.fromarray(read_photograph(name)), count)
        features = datasets.Features({"image": datasets.Image()})
        splits[split] = datasets.Dataset.from_dict({"image": images}, features=features)
    return splits


def draw_squares(photograph: Image.Image, count: int) -> list[Image.Image]:
    """Draw squares of 32 to 96 pixels anywhere in a photograph, the same at each call, and resize them to 24."""
    draw = np.random.default_rng(0)
    squares = []
    for _ in range(count):
        side = int(draw.integers(32, 97))
        left = int(draw.integers(0, photograph.width - side + 1))
        top = int(draw.integers(0, photograph.height - side + 1))
        box = (left, top, left + side, top + side)
        squares.append(photograph.resize((24, 24), Image.Resampling.BICUBIC, box=box))
    return squares


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


def save_photo_crops(folder: Path) -> None:
    """Write the photo crops as `folder`/train/CLASS/*.png and `folder`/test/CLASS/*.png."""
    is_used = folder.exists() and (folder.is_file() or any(folder.iterdir()))
    if is_used:
        stop(f"--save_dataset {folder} is there already: name a new folder, or remove it.")
    for split, rows in photo_crops().items():
        for number, row in enumerate(rows):
            name = PHOTOGRAPHS[row["label"]]
            file = folder / split / name / f"{number:04}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            row["image"].save(file)
    say(f"The photo crops are in {folder}; other scripts take them by --dataset {folder}.")


# Images of your own

IS_MAIN_PROCESS = os.environ.get("RANK", "0") == "0"
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
BUILT_IN: dict[str, Callable[[], datasets.DatasetDict]] = {
    "photographs": photographs,
    "photo_crops": photo_crops,
}
EVAL_SPLITS = ("test", "validation", "val", "valid", "dev")
LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "cls")
HELD_OUT = 0.2  # of a data set that has no split to test on
NOT_IMAGES = (".arrow", ".csv", ".db", ".ini", ".json", ".jsonl", ".md", ".parquet", ".txt", ".xml", ".yaml")


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


def load_unlabelled(options: DataOptions) -> ImageData:
    """Load images as `load_images` does, but without their classes: all are numbered 0."""
    splits = read_splits(options)
    check_splits(splits, options)
    train = pick_images(splits[options.train_split], options)
    eval_split = options.eval_split
    for split in EVAL_SPLITS:
        if split in splits and not eval_split:
            eval_split = split
    if eval_split:
        test = pick_images(splits[eval_split], options)
    else:
        train, test = hold_out(train, options)
    train = as_asked(train, options.train_samples, options)
    test = as_asked(test, options.test_samples, options)
    return ImageData(train, test, ["image"], eval_split or f"a held-out fifth of {options.train_split}")


def pick_images(rows: datasets.Dataset, options: DataOptions) -> datasets.Dataset:
    """Return the column of images as `image`, and a column `label` of zeros."""
    zero = datasets.ClassLabel(names=["image"])
    if "label" in rows.column_names:
        rows = rows.remove_columns("label")
    rows = rows.add_column("label", [0] * len(rows), feature=zero)
    return pick_columns(rows, replace(options, label_column="label"))


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
