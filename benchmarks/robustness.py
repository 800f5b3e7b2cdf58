"""Tests trained models on corrupted images, without training: E5 of docs/results/plan.md.

    uv run --group bench python -m benchmarks.paper run evidence_step_size --keep --dataset uoft-cs/cifar10=FOLDER
    uv run --group bench python -m benchmarks.robustness --dataset FOLDER

The first command leaves the weights of each run, the second adds what each model does with corrupted test images to
--results. The corruptions and their five strengths are in CORRUPTIONS; they are torchvision's and, for JPEG, Pillow's.
"""

import argparse
import io
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_calibration_error
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transforms

from benchmarks import ROOT
from benchmarks.common.options import new_parser
from benchmarks.common.records import RunRecord, add_record, command, environment, key_of, read_records
from benchmarks.paper.evidence import EVIDENCE
from benchmarks.paper.experiment import Job
from benchmarks.paper.train import RUN_FILE
from benchmarks.training.data import Normalization, Splits, fingerprint, load_splits, normalization, to_tensor
from benchmarks.training.models import logits_of, make_model
from benchmarks.training.recipe import Recipe, read_recipe

RESULTS = ROOT / "docs" / "results" / "robustness.jsonl"
ARMS = ("vanilla", "TrAct", "matched start", "matched start, TrAct")
# E0's runs of the seed before were not kept.
SEEDS = range(101, 106)
BINS = 15
# Of top-1: batches of another size may round a close call otherwise.
TOLERANCE = 0.0005
BATCH = 500
NOISE_SEED = 0
CLEAN = "clean"
CORRUPTIONS = {
    # The deviation, where pixels are 0 to 1.
    "gaussian noise": (0.04, 0.06, 0.08, 0.1, 0.12),
    # The deviation in pixels.
    "gaussian blur": (0.4, 0.6, 0.8, 1.0, 1.2),
    # Times the distance from the mean grey.
    "contrast": (0.75, 0.6, 0.45, 0.3, 0.15),
    # Times the value.
    "brightness": (1.2, 1.4, 1.6, 1.8, 2.0),
    # The quality.
    "jpeg": (80, 65, 50, 35, 20),
}


def main() -> None:
    """Test each model that is there, and store what came out."""
    args = parse()
    have = read_records(args.results)
    jobs, missing = [], []
    for job in jobs_of_the_plan():
        if key_of(job.key, CORRUPTIONS) in have:
            continue
        jobs.append(job)
        if not weights_of(job, args.runs):
            missing.append(job)
    if missing:
        raise SystemExit(
            f"--runs {args.runs} lacks the weights of {len(missing)} of {len(jobs)} runs, such as {missing[0].arm} of "
            f"seed {missing[0].seed}: `python -m benchmarks.paper run evidence_step_size --keep` leaves them."
        )
    if not jobs:
        print("All runs are tested already.")
        return
    images = read_images(jobs[0], args)
    for job in track(jobs, "models"):
        add_record(args.results, measure(job, images, args.runs))


class HeldOut(NamedTuple):
    """Holds the test images of a data set, and how models see them."""

    splits: Splits
    # uint8, (N, 3, size, size).
    pixels: Tensor
    # (N,).
    labels: Tensor
    look: Normalization


def jobs_of_the_plan() -> Iterator[Job]:
    """Yield E0's runs that are tested."""
    for job in EVIDENCE["evidence_step_size"].jobs("small"):
        if job.arm in ARMS and job.seed in SEEDS:
            yield job


def weights_of(job: Job, runs: Path) -> Path | None:
    """Return the file of a run's last weights, if there is one."""
    file = runs / job.key / "0" / "checkpoints" / str(job.config["epochs"]) / "model.safetensors"
    return file if file.exists() else None


def recipe_of(job: Job, runs: Path) -> Recipe:
    """Return the recipe that a run was made by."""
    return read_recipe(runs / job.key / "0" / "recipe.yaml")


def read_images(job: Job, args: argparse.Namespace) -> HeldOut:
    """Return the test images of a run's data set."""
    recipe = recipe_of(job, args.runs)
    recipe.dataset = args.dataset
    splits = load_splits(recipe)
    transform = v2.Compose(to_tensor(recipe.image_size))
    pixels = []
    for row in track(splits.test, "images"):
        pixels.append(transform(row[splits.image]))
    labels = torch.tensor(splits.test[splits.label])
    return HeldOut(splits, torch.stack(pixels), labels, normalization(recipe, splits))


def measure(job: Job, images: HeldOut, runs: Path) -> RunRecord:
    """Return the record of a model on clean and on corrupted images."""
    start = time.process_time()
    model = make_model(recipe_of(job, runs), images.splits.names)
    weights = weights_of(job, runs)
    assert weights is not None
    model.load_state_dict(load_file(weights))
    model.eval()
    curve: dict[str, list[float]] = {}
    made = json.loads((weights.parents[2] / RUN_FILE).read_text(encoding="utf-8"))
    told = made["curve"]["top1"][-1]
    for name, corrupt in corruptions():
        top1, error = score(model, images, corrupt)
        if name == CLEAN and abs(top1 - told) > TOLERANCE:
            raise SystemExit(
                f"{job.arm}, seed {job.seed}: top-1 is {top1:.4f} here, and the run's own test says {told}."
            )
        curve.setdefault(name, []).append(top1)
        curve.setdefault(f"{name} ECE", []).append(error)
    seconds = [round(time.process_time() - start, 3)]
    origin = {name: made[name] for name in ("commit", "hardware", "versions")}
    settings = {"run": job.key, "corruptions": CORRUPTIONS, "trained": origin}
    key = key_of(job.key, CORRUPTIONS)
    data = fingerprint(images.splits)
    return RunRecord(key, job.arm, settings, job.seed, curve, seconds, data, command(), **environment())


def corruptions() -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Yield functions of float images from 0 to 1, (B, 3, H, W): none, then each corruption at each strength.

    Each is for one pass over all images in batches, in which every image has noise of its own.
    """
    yield CLEAN, lambda pixels: pixels
    for name, strengths in CORRUPTIONS.items():
        for strength in strengths:
            generator = torch.Generator().manual_seed(NOISE_SEED)
            yield name, partial(corrupted, name=name, strength=strength, generator=generator)


def corrupted(pixels: Tensor, name: str, strength: float, generator: torch.Generator) -> Tensor:
    """Return images with one corruption, which is the same for all models."""
    if name == "gaussian noise":
        noise = torch.randn(pixels.shape, generator=generator)
        return (pixels + strength * noise).clamp(0, 1)
    if name == "jpeg":
        return torch.stack([compressed(image, int(strength)) for image in pixels])
    change: Any = {
        "gaussian blur": partial(transforms.gaussian_blur, kernel_size=[7, 7], sigma=[strength, strength]),
        "contrast": partial(transforms.adjust_contrast, contrast_factor=strength),
        "brightness": partial(transforms.adjust_brightness, brightness_factor=strength),
    }[name]
    result: Tensor = change(pixels)
    return result


def compressed(image: Tensor, quality: int) -> Tensor:
    """Return a float image (3, H, W) as JPEG of that quality shows it."""
    file = io.BytesIO()
    transforms.to_pil_image(image).save(file, "JPEG", quality=quality)
    seen = transforms.pil_to_tensor(Image.open(file))
    result: Tensor = transforms.to_dtype(seen, torch.float32, True)
    return result


@torch.no_grad()
def score(model: nn.Module, images: HeldOut, corrupt: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Return top-1 and the calibration error, from 0 to 1."""
    scores = []
    for batch in images.pixels.split(BATCH):
        pixels = corrupt(transforms.to_dtype(batch, torch.float32, True))
        pixels = transforms.normalize(pixels, images.look.mean, images.look.std)
        scores.append(logits_of(model(pixels)).softmax(-1))
    likely = torch.cat(scores)
    top1 = (likely.argmax(-1) == images.labels).float().mean()
    classes = likely.shape[-1]
    error = multiclass_calibration_error(likely, images.labels, num_classes=classes, n_bins=BINS, norm="l1")
    return float(top1), float(error)


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--dataset", default="uoft-cs/cifar10", help="a Hub id, or a folder")
    add("--runs", type=Path, default=Path("outputs/paper/small"), help="where the runs were kept")
    add("--results", type=Path, default=RESULTS, help="JSON lines")
    return parser.parse_args()


if __name__ == "__main__":
    main()
