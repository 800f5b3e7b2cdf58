# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf-tract",
#     "accelerate>=1.10",
#     "datasets>=4.8",
#     "matplotlib>=3.9",
#     "numpy",
#     "pillow>=11",
#     "pycocotools>=2.0.8",
#     "rich>=13",
#     "scikit-learn>=1.5",
#     "scipy>=1.11",
#     "torch>=2.8",
#     "torchmetrics>=1.4",
#     "torchvision>=0.23",
#     "tqdm>=4.66",
#     "transformers>=5.0",
# ]
# ///
"""Trains Faster R-CNN with a VGG-16 backbone without and with TrAct, and compares their mean average precision.

    python detect_voc.py                               # scenes of digits, no download, minutes on two cores
    python detect_voc.py --seeds 3                     # means with their 95 % intervals
    python detect_voc.py --paper --dataset FOLDER      # the paper's table 5; FOLDER holds VOCdevkit/VOC2007
    accelerate launch detect_voc.py                    # on several devices

Both arms train every layer, also the first ones, which detectors usually freeze. Finished runs are stored in
OUTPUT_DIR/records.jsonl and not run again; an interrupted run goes on from its last epoch.
"""

import glob
import json
import math
import os
import platform
import shlex
import shutil
import sys
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import datasets
import matplotlib as mpl
import numpy as np
import sklearn.datasets
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, broadcast, gather_object, set_seed
from matplotlib.ticker import MaxNLocator
from PIL import Image
from rich.console import Console
from rich.table import Table
from scipy import stats
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchmetrics.detection import MeanAveragePrecision
from torchvision.datasets import VOCDetection
from torchvision.models import VGG16_Weights, vgg16
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.vgg import make_layers
from torchvision.ops import MultiScaleRoIAlign
from torchvision.transforms.v2 import functional as transforms
from tqdm.auto import tqdm
from transformers import HfArgumentParser, get_scheduler

from hf_tract import apply_tract

mpl.use("Agg")
from matplotlib import pyplot as plt

VANILLA = "vanilla"
TRACT = "TrAct"
STYLES = {VANILLA: ("#555555", "s"), TRACT: ("#0072b2", "o")}
MEASURES = {
    "map_50": "mAP at IoU .5",
    "map": "mAP, mean over IoU .5 to .95",
    "map_voc07": "mAP, VOC 2007's 11 points",
}
IS_MAIN_PROCESS = os.environ.get("RANK", "0") == "0"
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
VGG16: list[int | str] = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512]
VOC_NAMES = [
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]
# The names that data sets on the Hub give to what they know about an object.
BOX_KEYS = ("bbox", "bboxes")
CATEGORY_KEYS = ("category", "categories", "category_id", "classes", "label")

# Table 5 of the paper (arXiv 2410.23970). It tells the data, the model, that all layers are trained, and two seeds;
# the rest is usual for Faster R-CNN on VOC.
PAPER: dict[str, Any] = {
    "width": 1.0,
    "batch_norm": False,
    "imagenet": True,
    "head_size": 4096,
    "min_size": 600,
    "max_size": 1000,
    "anchor_sizes": [128, 256, 512],
    "proposals": 2000,
    "regions": 128,
    "epochs": 14,
    "batch_size": 2,
    "optimizer": "sgd",
    "weight_decay": 5e-4,
    "warmup_steps": 500,
    "flip": 0.5,
    "mixed_precision": "bf16",
    "seeds": 2,
}
# These options make no difference to a single run, so they are not among a record's settings.
NOT_SETTINGS = ("seeds", "first_seed", "output_dir", "num_workers", "cpu", "lam", "paper")


def option(default: Any, text: str) -> Any:
    """Return the field of an option, with its help."""
    return field(default=default, metadata={"help": text})


@dataclass
class DetectionOptions:
    """Says what is trained, on what, and how long. The defaults suit the scenes of digits."""

    dataset: str = option(
        "digit_scenes", "digit_scenes, a folder with VOCdevkit in it, a Hub id, or a folder of parquet"
    )
    paper: bool = option(False, "change the other defaults to those of the paper's table 5")
    train_split: str = option("", "by default train, of a VOC folder trainval")
    eval_split: str = option("", "by default test, else validation")
    voc_year: str = option("2007", "of a VOC folder")
    bbox_format: Literal["coco", "pascal_voc"] = option("coco", "on the Hub: x, y, width, height; or corners")
    train_samples: int = option(0, "use that many training images; 0 for all")
    test_samples: int = option(0, "use that many test images; 0 for all")
    width: float = option(0.125, "of the backbone's layers; VGG-16 has 1")
    batch_norm: bool = option(True, "in the backbone; VGG-16 has none")
    head_size: int = option(128, "of the head's two hidden layers; VGG-16 has 4096")
    imagenet: bool = option(False, "start from torchvision's VGG-16, a download")
    min_size: int = option(160, "pixels to which an image's shorter side is resized")
    max_size: int = option(240, "pixels that its longer side does not exceed")
    anchor_sizes: list[int] = field(
        default_factory=lambda: [27, 40, 64], metadata={"help": "in pixels of the resized image"}
    )
    proposals: int = option(100, "of the first stage, for an image")
    regions: int = option(32, "of an image, from which the second stage learns")
    epochs: int = option(4, "passes over the training images")
    batch_size: int = option(4, "images in a step of one process")
    optimizer: Literal["sgd", "adamw"] = option("adamw", "sgd has a momentum of 0.9")
    learning_rate: float = option(1e-3, "after the warm-up, with a cosine schedule")
    weight_decay: float = option(1e-4, "of all parameters")
    warmup_steps: int = option(50, "over which the learning rate rises")
    clip_grad_norm: float = option(10.0, "clipping, which sees TrAct's gradient; 0 for none")
    flip: float = option(0.0, "share of training images that are mirrored")
    mixed_precision: Literal["no", "bf16", "fp16"] = option(
        "no", "of the model's operations; what `accelerate launch` is told is the default"
    )
    lam: float = option(0.1, "TrAct's damping")
    seeds: int = option(1, "number of runs of each arm")
    first_seed: int = option(0, "seed of the first run; the others follow")
    num_workers: int = option(0, "processes that load images")
    cpu: bool = option(False, "train on the CPU")
    output_dir: str = option("outputs/detect_voc", "folder of records, models and the plot")


class Example(NamedTuple):
    """Holds an image and its objects."""

    image: Image.Image
    boxes: Tensor  # (objects, 4): left, top, right, bottom in pixels
    labels: Tensor  # (objects,), from 0
    difficult: Tensor  # (objects,), which neither count as a hit nor as a miss


class Detections(NamedTuple):
    """Holds training and test examples, and the names of the classes."""

    train: Any
    test: Any
    names: Sequence[str]


class Progress:
    """Holds what a run has come to; accelerate saves and restores it."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the figures of the finished epochs."""
        return {"epochs": self.epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the figures of the finished epochs."""
        self.epochs = state["epochs"]


Record = dict[str, Any]  # of a finished run: arm, seed, settings, epochs, command, versions, hardware


def main() -> None:
    """Train what has not been trained yet, and report."""
    options = parse_detection_options()
    folder = Path(options.output_dir)
    make_folder(folder)
    data = load_detections(options)
    images = options.batch_size * PROCESSES
    if images > len(data.train):
        stop(f"--batch_size {options.batch_size}: all processes need {images} images, of {len(data.train)}.")
    shared = {name: value for name, value in asdict(options).items() if name not in NOT_SETTINGS}
    shared |= {"train_images": len(data.train), "test_images": len(data.test)}
    if PROCESSES > 1:
        shared["processes"] = PROCESSES
    if Path(options.dataset).is_dir():
        shared["checksum"] = checksum_of_files(options.dataset, options.output_dir)
    arms = {VANILLA: shared, TRACT: {**shared, "lam": options.lam}}
    records = read_records(folder)
    found: dict[str, list[dict[str, Any]]] = {VANILLA: [], TRACT: []}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for arm, settings in arms.items():
            record = find_record(records, arm, seed, settings)
            if record is None:
                record = train_detector(arm, seed, settings, data, options)
                add_record(folder, record)
            found[arm].append(record)
    if IS_MAIN_PROCESS:
        report_precision(found, options)


def parse_detection_options() -> DetectionOptions:
    """Read the command line; each wrong value ends the script with one line."""
    usage = "detect_voc.py [options]; --help lists them"
    parser = HfArgumentParser(DetectionOptions, usage=usage, allow_abbrev=False)  # type: ignore[arg-type]
    parser.set_defaults(mixed_precision=os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))
    if parser.parse_args().paper:
        parser.set_defaults(**PAPER)
    (options,) = parser.parse_dict(vars(parser.parse_args()))
    check_numbers(options)
    check_combinations(options)
    return options


def check_numbers(options: DetectionOptions) -> None:
    """Refuse numbers that cannot be meant."""
    for name in ("head_size", "min_size", "max_size", "proposals", "regions", "epochs", "batch_size", "seeds"):
        if getattr(options, name) < 1:
            stop(f"--{name} {getattr(options, name)}: give 1 or more.")
    for name in ("width", "lam", "learning_rate"):
        if not 0 < getattr(options, name) < math.inf:
            stop(f"--{name} {getattr(options, name)}: give a number above 0.")
    for name in ("train_samples", "test_samples", "first_seed", "warmup_steps", "weight_decay", "clip_grad_norm"):
        if not 0 <= getattr(options, name) < math.inf:
            stop(f"--{name} {getattr(options, name)}: give 0 or more.")
    if min(options.anchor_sizes) < 1:
        stop(f"--anchor_sizes {options.anchor_sizes}: give sizes of 1 or more.")


def check_combinations(options: DetectionOptions) -> None:
    """Refuse a share above 1, and options that do not go together."""
    if not 0 <= options.flip <= 1:
        stop(f"--flip {options.flip}: give a share from 0 to 1.")
    if options.imagenet and (options.width, options.batch_norm, options.head_size) != (1, False, 4096):
        stop("--imagenet: VGG-16's weights need --width 1 --batch_norm False --head_size 4096.")
    if options.mixed_precision == "fp16" and (options.cpu or not torch.accelerator.is_available()):
        stop("--mixed_precision fp16 needs an accelerator: use no or bf16.")
    if options.paper and options.dataset == "digit_scenes":
        stop("--paper needs --dataset FOLDER, which holds VOCdevkit/VOC2007.")


# Training


def train_detector(
    arm: str, seed: int, settings: dict[str, Any], data: Detections, options: DetectionOptions
) -> dict[str, Any]:
    """Train one arm from one seed, from its last finished epoch if there is one, and return its record."""
    # Another run of the same arm and seed, with other settings, has a folder of its own.
    folder = Path(options.output_dir) / f"{arm}-{seed}-{zlib.crc32(json.dumps(settings).encode()):08x}"
    accelerator = make_run_accelerator(folder, seed, options)
    set_seed(seed)
    model: Any = faster_rcnn(len(data.names), options)
    say(f"\n{arm}, seed {seed}")
    if arm == TRACT:
        say(apply_tract(model, options.lam).summary())
    images = TrainingImages(data.train, options.flip, seed)
    workers = options.num_workers
    loader: Any = DataLoader(
        images, options.batch_size, shuffle=True, drop_last=True, collate_fn=list, num_workers=workers
    )
    model, optimizer, loader = accelerator.prepare(model, make_optimizer(model, options), loader)
    steps = options.epochs * len(loader)
    schedule = get_scheduler("cosine", optimizer, options.warmup_steps, steps)
    progress = Progress()
    accelerator.register_for_checkpointing(schedule, progress)
    resume(accelerator, folder)
    begin = len(progress.epochs)
    bar = tqdm(total=steps, initial=begin * len(loader), desc="training", disable=not IS_MAIN_PROCESS)
    for epoch in range(begin, options.epochs):
        images.epoch = epoch
        loader.set_epoch(epoch)
        model.train()
        for batch in loader:
            train_step(model, batch, optimizer, accelerator, options.clip_grad_norm)
            schedule.step()
            bar.update()
        figures = measure_precision(accelerator.unwrap_model(model), data.test, accelerator, options.batch_size)
        progress.epochs.append(figures)
        bar.set_postfix(figures)
        accelerator.save_state()
    bar.close()
    accelerator.save_model(model, folder / "model")
    accelerator.free_memory()
    return {"arm": arm, "seed": seed, "settings": settings, "epochs": progress.epochs, **describe_run()}


def make_run_accelerator(folder: Path, seed: int, options: DetectionOptions) -> Accelerator:
    """Make the accelerator of one run, whose checkpoints go into its folder."""
    try:
        return Accelerator(
            cpu=options.cpu or not torch.accelerator.is_available(),
            mixed_precision=options.mixed_precision,
            project_config=ProjectConfiguration(str(folder), automatic_checkpoint_naming=True, total_limit=2),
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed),
            step_scheduler_with_optimizer=False,
        )
    except ValueError as error:
        stop(f"--mixed_precision {options.mixed_precision}: {error}")


def train_step(
    model: Any,
    batch: list[tuple[Tensor, dict[str, Tensor]]],
    optimizer: Any,
    accelerator: Accelerator,
    max_norm: float,
) -> None:
    """Take one optimizer step."""
    pixels, targets = zip(*batch, strict=True)
    losses = model(list(pixels), list(targets))
    accelerator.backward(sum(losses.values()))
    if max_norm:
        accelerator.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    optimizer.zero_grad()


def faster_rcnn(classes: int, options: DetectionOptions) -> FasterRCNN:
    """Build Faster R-CNN on VGG-16 without its last pooling; VGG-16's two hidden layers are the head; all train."""
    widths = list(VGG16)
    for index, width in enumerate(VGG16):
        if not isinstance(width, str):
            widths[index] = max(1, round(options.width * width))
    features = make_layers(widths, batch_norm=options.batch_norm)
    features.out_channels = widths[-1]
    head = TwoMLPHead(7 * 7 * int(widths[-1]), options.head_size)
    if options.imagenet:
        source = vgg16(weights=VGG16_Weights.IMAGENET1K_V1)
        features.load_state_dict(source.features[:-1].state_dict())
        head.fc6.load_state_dict(source.classifier[0].state_dict())
        head.fc7.load_state_dict(source.classifier[3].state_dict())
    return FasterRCNN(
        features,
        None,
        options.min_size,
        options.max_size,
        rpn_anchor_generator=AnchorGenerator((tuple(options.anchor_sizes),), ((0.5, 1.0, 2.0),)),
        box_head=head,
        rpn_post_nms_top_n_train=options.proposals,
        rpn_post_nms_top_n_test=options.proposals,
        box_batch_size_per_image=options.regions,
        box_roi_pool=MultiScaleRoIAlign(["0"], 7, 2),
        box_predictor=FastRCNNPredictor(options.head_size, classes + 1),  # 0 is the background
    )


def make_optimizer(model: torch.nn.Module, options: DetectionOptions) -> torch.optim.Optimizer:
    """Make the optimizer of all parameters."""
    rate, decay = options.learning_rate, options.weight_decay
    if options.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=decay)
    return torch.optim.AdamW(model.parameters(), rate, weight_decay=decay)


def resume(accelerator: Accelerator, folder: Path) -> None:
    """Load the newest checkpoint that was written to its end, and remove those that were not."""
    found = list(folder.glob("checkpoints/checkpoint_*"))
    accelerator.wait_for_everyone()
    for path in sorted(found, key=checkpoint_number, reverse=True):
        if (path / "custom_checkpoint_1.pkl").exists():  # which is written last
            accelerator.load_state(str(path))
            accelerator.project_configuration.iteration = checkpoint_number(path) + 1
            say(f"Resumed from {path}.")
            break
        if IS_MAIN_PROCESS:
            shutil.rmtree(path)
    accelerator.wait_for_everyone()


def checkpoint_number(folder: Path) -> int:
    """Return the number in the name of a checkpoint's folder."""
    return int(folder.name.rpartition("_")[2])


def share_buffers(model: torch.nn.Module) -> None:
    """Give each process the buffers of the first, which are saved: each has seen other images."""
    for buffer in model.buffers():
        broadcast(buffer)


class TrainingImages(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Yields images and targets as torchvision's detectors take them, mirrored by seed, epoch and index alone."""

    def __init__(self, examples: Any, flip: float, seed: int) -> None:
        self.examples = examples
        self.flip = flip
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image, boxes, labels, difficult = self.examples[index]
        # torchvision refuses boxes without an area, which annotations may hold.
        is_used = ~difficult & have_area(boxes)
        pixels = to_pixels(image)
        if np.random.default_rng([self.seed, self.epoch, index]).random() < self.flip:
            left, top, right, bottom = boxes.unbind(1)
            pixels = pixels.flip(-1)
            boxes = torch.stack([image.width - right, top, image.width - left, bottom], 1)
        return pixels, {"boxes": boxes[is_used], "labels": labels[is_used] + 1}


def have_area(boxes: Tensor) -> Tensor:
    """Return for each box, (objects, 4), whether it has an area."""
    return (boxes[:, 2:] > boxes[:, :2]).all(1)


def to_pixels(image: Image.Image) -> Tensor:
    """Return (3, height, width) from 0 to 1, which the model normalises itself."""
    pixels: Tensor = transforms.to_dtype(transforms.pil_to_tensor(image), torch.float32, scale=True)
    return pixels


# Mean average precision


class Seen(NamedTuple):
    """Holds what a model finds in an image and what is there, in torchmetrics' form."""

    found: dict[str, Tensor]
    wanted: dict[str, Tensor]


@torch.no_grad()
def measure_precision(model: FasterRCNN, examples: Any, accelerator: Accelerator, batch_size: int) -> dict[str, float]:
    """Return the mean average precisions on all test images, of which each process looks at its share."""
    model.eval()
    share_buffers(model)
    mine = range(accelerator.process_index, len(examples), accelerator.num_processes)
    seen: list[Seen] = []
    for first in range(0, len(mine), batch_size):
        batch = [examples[index] for index in mine[first : first + batch_size]]
        pixels = [to_pixels(example.image).to(accelerator.device) for example in batch]
        for example, found in zip(batch, model(pixels), strict=True):
            boxes, scores = found["boxes"].float().cpu(), found["scores"].float().cpu()
            labels = found["labels"].cpu() - 1
            seen.append(Seen({"boxes": boxes, "scores": scores, "labels": labels}, wanted_of(example)))
    return mean_average_precision(gather_object(seen))


def wanted_of(example: Example) -> dict[str, Tensor]:
    """Return an image's objects; the difficult ones are COCO's crowds, which count neither as hits nor as misses."""
    # Nothing can hit a box without an area.
    can_be_hit = have_area(example.boxes)
    crowds = example.difficult.int()
    return {"boxes": example.boxes[can_be_hit], "labels": example.labels[can_be_hit], "iscrowd": crowds[can_be_hit]}


def mean_average_precision(seen: Sequence[Seen]) -> dict[str, float]:
    """Compute the figures of MEASURES.

    VOC's own program measures boxes one pixel larger, and matches difficult objects by IoU.
    """
    coco = MeanAveragePrecision(backend="pycocotools")
    recalls = np.linspace(0, 1, 11).round(1).tolist()
    voc = MeanAveragePrecision(iou_thresholds=[0.5], rec_thresholds=recalls, backend="pycocotools")
    for metric in (coco, voc):
        metric.warn_on_many_detections = False
        for found, wanted in seen:
            metric.update([found], [wanted])
    figures = coco.compute()
    map_voc07 = voc.compute()["map"]
    return {"map_50": figures["map_50"].item(), "map": figures["map"].item(), "map_voc07": map_voc07.item()}


# Records and report


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


def checksum_of_files(folder: str, output_dir: str) -> int:
    """Return a number that is another one if the name or the content of a file changes, but for what is written."""
    written = Path(output_dir).resolve()
    checksum = 0
    voc = glob.glob("VOCdevkit/**", root_dir=folder, recursive=True)
    for name in sorted(voc or glob.glob("**", root_dir=folder, recursive=True)):
        file = Path(folder, name)
        if file.is_file() and not file.resolve().is_relative_to(written):
            checksum = zlib.crc32(name.encode() + file.read_bytes(), checksum)
    return checksum


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


def report_precision(records: dict[str, list[dict[str, Any]]], options: DetectionOptions) -> None:
    """Print the table of mean average precisions and the gain of each seed, and save the plot."""
    curves = {arm: curves_of(records[arm], "map_50") for arm in records}
    console = Console(soft_wrap=True)
    over = ""
    if options.seeds > 1:
        over = f", mean and 95 % interval (t distribution) over {options.seeds} seeds"
    console.print(f"\n{MEASURES['map_50']} on {options.dataset}, in per cent{over}")
    table = Table("", *curves)
    for epoch in range(options.epochs):
        cells = [with_interval(curve[:, epoch]) for curve in curves.values()]
        table.add_row(f"epoch {epoch + 1}", *cells)
    table.add_section()
    for name in ("map", "map_voc07"):
        cells = [with_interval(curves_of(found, name)[:, -1]) for found in records.values()]
        table.add_row(MEASURES[name], *cells)
    console.print(table)
    gains = curves[TRACT][:, -1] - curves[VANILLA][:, -1]
    by_seed = ", ".join(f"{gain:+.1f}" for gain in gains)
    console.print(f"{TRACT}: {with_interval(gains, sign='+')} points at IoU .5 at the end; by seed {by_seed}.")
    console.print(f"Plot: {plot_precision(curves, options)}")


def curves_of(records: list[dict[str, Any]], name: str) -> np.ndarray:
    """Return a figure in per cent, (seeds, epochs)."""
    curves = []
    for record in records:
        curves.append([epoch[name] for epoch in record["epochs"]])
    return 100 * np.array(curves)


def with_interval(values: np.ndarray, sign: str = "") -> str:
    """Return the mean and, for several seeds, half the width of its 95 % interval."""
    text = f"{values.mean():{sign}.1f}"
    if len(values) > 1:
        text += f" ± {half_width(values):.1f}"
    return text


def half_width(values: np.ndarray) -> Any:
    """Return half the width of the mean's 95 % interval by the t distribution, over the first dimension."""
    count = len(values)
    if count == 1:
        return np.zeros(values.shape[1:])
    factor = stats.t.ppf(0.975, count - 1)
    return factor * values.std(0, ddof=1) / math.sqrt(count)


def plot_precision(curves: dict[str, np.ndarray], options: DetectionOptions) -> Path:
    """Draw the mean average precision of both arms over the epochs, with its interval as a band."""
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    epochs = np.arange(1, options.epochs + 1)
    for arm, (color, marker) in STYLES.items():
        mean, half = curves[arm].mean(0), half_width(curves[arm])
        axes.plot(epochs, mean, color=color, marker=marker, markersize=4, label=f"{arm}: {mean[-1]:.1f} %")
        axes.fill_between(epochs, mean - half, mean + half, color=color, alpha=0.2, linewidth=0)
    title = f"Faster R-CNN on {Path(options.dataset).name.replace('_', ' ')} with and without TrAct"
    if options.seeds > 1:
        title += f"\nmean over {options.seeds} seeds; the band is the mean's 95 % interval"
    axes.set(xlabel="epoch", ylabel=f"{MEASURES['map_50']} in per cent", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.2)
    figure.legend(loc="outside right center", title="after the last epoch", frameon=False)
    file = Path(options.output_dir) / "comparison.png"
    figure.savefig(file, dpi=150)
    plt.close(figure)
    return file


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


# Images with boxes


def load_detections(options: DetectionOptions) -> Detections:
    """Load the scenes of digits, a VOC folder, or a data set of the Hub's form."""
    if options.dataset == "digit_scenes":
        train: Any = digit_scenes(1000, "train")
        test: Any = digit_scenes(200, "test")
        names = list("0123456789")
    elif Path(options.dataset, "VOCdevkit").is_dir():
        train = VocFolder(options, options.train_split or "trainval")
        test = VocFolder(options, options.eval_split or "test")
        names = VOC_NAMES
    else:
        train_rows, test_rows = read_rows(options)
        names = class_names_of_objects(train_rows, options)
        train = Rows(train_rows, options.bbox_format)
        test = Rows(test_rows, options.bbox_format)
    return Detections(sample_of(train, options.train_samples), sample_of(test, options.test_samples), names)


def sample_of(examples: Any, count: int) -> Any:
    """Return `count` examples drawn with seed 0, or all for 0."""
    if not count:
        return examples
    order = np.random.default_rng(0).permutation(len(examples))
    return torch.utils.data.Subset(examples, order[:count].tolist())


class VocFolder(Dataset[Example]):
    """Reads a VOCdevkit, whose boxes count pixels from 1 and include both ends."""

    def __init__(self, options: DetectionOptions, split: str) -> None:
        try:
            self.all = VOCDetection(options.dataset, options.voc_year, split)
        except (ValueError, RuntimeError, OSError) as error:
            stop(f"--dataset {options.dataset}, --voc_year {options.voc_year}, split {split}: {error}")

    def __len__(self) -> int:
        return len(self.all)

    def __getitem__(self, index: int) -> Example:
        image, tree = self.all[index]
        boxes, labels, difficult = [], [], []
        for thing in tree["annotation"]["object"]:
            box = thing["bndbox"]
            left, top = float(box["xmin"]) - 1, float(box["ymin"]) - 1
            boxes.append([left, top, float(box["xmax"]), float(box["ymax"])])
            labels.append(VOC_NAMES.index(thing["name"]))
            difficult.append(thing.get("difficult") == "1")
        return Example(image.convert("RGB"), *to_tensors(boxes, labels, difficult))


class Rows(Dataset[Example]):
    """Reads rows with a column of images and one named `objects`, as detection data sets on the Hub have them."""

    def __init__(self, rows: datasets.Dataset, bbox_format: str) -> None:
        self.rows = rows
        self.bbox_format = bbox_format
        self.image = image_column(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        objects = row["objects"]
        labels = objects[key_among(objects, CATEGORY_KEYS)]
        difficult = objects.get("difficult", [False] * len(labels))
        boxes, *others = to_tensors(objects[key_among(objects, BOX_KEYS)], labels, difficult)
        if self.bbox_format == "coco":
            boxes[:, 2:] += boxes[:, :2]
        return Example(row[self.image].convert("RGB"), boxes, *others)


def to_tensors(boxes: Any, labels: Any, difficult: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes, labels and marks of an image's objects, of which there may be none."""
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return corners, torch.tensor(labels, dtype=torch.int64), torch.tensor(difficult, dtype=torch.bool)


def read_rows(options: DetectionOptions) -> list[datasets.Dataset]:
    """Read the training and the test split of a data set on the Hub, or of a folder."""
    try:
        splits = datasets.load_dataset(options.dataset)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        expected = "digit_scenes, a folder with VOCdevkit in it, a Hub id or a folder of parquet files"
        stop(f"--dataset {options.dataset} cannot be read; it must be {expected}. The reason: {reason}")
    wanted = {"train_split": options.train_split or "train", "eval_split": options.eval_split or "test"}
    if not options.eval_split and "test" not in splits:
        wanted["eval_split"] = "validation"
    for name, split in wanted.items():
        if split not in splits:
            stop(f"--{name} {split}: {options.dataset} has the splits {', '.join(splits)}.")
    return [splits[split] for split in wanted.values()]


def image_column(rows: datasets.Dataset) -> str | None:
    """Return the first column of images, or None."""
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            return str(name)
    return None


def key_among(objects: Any, keys: Sequence[str]) -> str | None:
    """Return the first of `keys` that the objects have, or None."""
    for key in keys:
        if key in objects:
            return key
    return None


def class_names_of_objects(rows: datasets.Dataset, options: DetectionOptions) -> list[str]:
    """Return the names of the classes; numbers without names are named by themselves."""
    objects = rows.features.get("objects", {})
    if not isinstance(objects, dict):
        objects = {}
    category, box = key_among(objects, CATEGORY_KEYS), key_among(objects, BOX_KEYS)
    if not image_column(rows) or not category or not box:
        needed = f"a column of images and one named objects with {BOX_KEYS[0]} and {CATEGORY_KEYS[0]}"
        stop(f"--dataset {options.dataset} needs {needed}; it has {rows.features}.")
    feature: Any = getattr(objects[category], "feature", objects[category])
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    if "int" not in getattr(feature, "dtype", ""):
        stop(f"--dataset {options.dataset}: {category} must be numbers or a ClassLabel, and is {feature}.")
    numbers = np.concatenate([each[category] for each in rows["objects"]])
    return [str(number) for number in range(int(numbers.max()) + 1)]


# Scenes of digits: scikit-learn's scans, two to four times as large, in colours of their own on a smooth background


Box = tuple[int, int, int, int]  # left, top, right, bottom


def digit_scenes(count: int, split: str) -> list[Example]:
    """Draw scenes, always the same; no scan of a test scene is in a training scene."""
    pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.25, stratify=labels, random_state=0)
    part = {"train": train, "test": test}[split]
    scans = np.round(pixels[part].reshape(-1, 8, 8) * 255 / 16).astype(np.float32) / 255
    scenes = []
    for index in range(count):
        draw = np.random.default_rng([0, int(split == "test"), index])
        scenes.append(draw_scene(scans, labels[part], draw))
    return scenes


def draw_scene(scans: np.ndarray, labels: np.ndarray, draw: np.random.Generator) -> Example:
    """Draw up to four digits whose boxes do not overlap, on a canvas of 64 to 96 pixels a side, with noise."""
    height, width = draw.choice((64, 80, 96), 2)
    corners = (255 * draw.uniform(0, 1, (2, 2, 3))).astype(np.uint8)
    canvas = enlarge(corners, width, height).astype(np.float32) / 255
    boxes: list[Box] = []
    digits = []
    for _ in range(draw.integers(1, 5)):
        scan = draw.integers(len(scans))
        side = 8 * draw.choice((2, 3, 4))
        ink = crop_to_ink(enlarge(scans[scan], side, side).clip(0, 1))
        box = place_box(ink.shape, canvas.shape, boxes, draw)
        if box is None:
            continue
        left, top, right, bottom = box
        part = canvas[top:bottom, left:right]
        colour = draw.uniform(0, 1, 3)
        while np.abs(colour - part.mean((0, 1))).mean() <= 0.3:  # too like the background
            colour = draw.uniform(0, 1, 3)
        part[:] = (1 - ink[..., None]) * part + ink[..., None] * colour
        boxes.append(box)
        digits.append(int(labels[scan]))
    canvas += draw.normal(0, 0.03, canvas.shape)
    image = Image.fromarray((255 * canvas.clip(0, 1)).astype(np.uint8))
    return Example(image, *to_tensors(boxes, digits, [False] * len(digits)))


def enlarge(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return pixels interpolated to another size."""
    return np.asarray(Image.fromarray(pixels).resize((int(width), int(height)), Image.Resampling.BILINEAR))


def crop_to_ink(mask: np.ndarray) -> np.ndarray:
    """Return the rows and columns between the first and the last that have ink."""
    rows = np.flatnonzero((mask > 0.15).any(1))
    columns = np.flatnonzero((mask > 0.15).any(0))
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def place_box(shape: Sequence[int], canvas: Sequence[int], others: list[Box], draw: np.random.Generator) -> Box | None:
    """Return a place for a box that meets no other, or None if 20 draws find none."""
    for _ in range(20):
        top = int(draw.integers(canvas[0] - shape[0] + 1))
        left = int(draw.integers(canvas[1] - shape[1] + 1))
        box = left, top, left + shape[1], top + shape[0]
        if not any(overlap(box, other) for other in others):
            return box
    return None


def overlap(first: Box, second: Box) -> bool:
    """Return whether two boxes overlap."""
    across = first[0] < second[2] and second[0] < first[2]
    down = first[1] < second[3] and second[1] < first[3]
    return across and down


if __name__ == "__main__":
    main()
