"""Faster R-CNN with a VGG-16 backbone, vanilla and with TrAct from the same seeds, compared by mean average precision.

    accelerate launch examples/detect_voc.py                           # digit scenes, a narrow VGG-16, a few minutes
    accelerate launch examples/detect_voc.py --seeds 3
    accelerate launch examples/detect_voc.py --recipe examples/recipes/detection/voc_faster_rcnn.yaml --dataset FOLDER

Both arms train every layer, the first ones too, which detectors usually freeze. Runs that have finished are kept in
OUTPUT_DIR/records.jsonl and not run again; a run that was killed goes on from its last epoch.
"""

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed, tqdm
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.models import VGG16_Weights
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.vgg import make_layers, vgg16
from torchvision.ops import MultiScaleRoIAlign
from torchvision.transforms.v2 import functional as transforms
from transformers import get_scheduler

from comparison import Record, compare, two_arms
from detection_data import DetectionArguments, Detections, Examples
from detection_metrics import MEASURES, Found, evaluate
from hf_tract import apply_tract
from image_data import drawn_from
from progress import Progress, add_epoch, read_epochs, start
from recipe import parse_with_recipe

RECIPES = Path(__file__).with_name("recipes") / "detection"
VGG16: list[int | str] = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512]


@dataclass
class Recipe(DetectionArguments):
    """What is trained and how: the fields of a recipe file."""

    width: float = field(default=1.0, metadata={"help": "of the backbone's layers, over VGG-16's"})
    batch_norm: bool = field(default=False, metadata={"help": "in the backbone; VGG-16 itself has none"})
    head_size: int = field(default=4096, metadata={"help": "of the two hidden layers that see a region"})
    imagenet: bool = field(
        default=False, metadata={"help": "begin with torchvision's VGG-16 of ImageNet (a download)"}
    )
    min_size: int = field(default=600, metadata={"help": "to which the shorter side of an image is resized"})
    max_size: int = field(default=1000, metadata={"help": "which the longer side does not exceed"})
    anchor_sizes: list[int] = field(
        default_factory=lambda: [128, 256, 512], metadata={"help": "in pixels of resized images"}
    )
    proposals: int = field(default=2000, metadata={"help": "that the first stage makes for an image"})
    regions: int = field(default=512, metadata={"help": "of them that the second stage learns from"})
    epochs: int = 12
    batch_size: int = field(default=8, metadata={"help": "images of one process"})
    optimizer: str = field(
        default="sgd", metadata={"help": "sgd with a momentum of 0.9, or adamw", "choices": ["sgd", "adamw"]}
    )
    learning_rate: float = 1e-3
    weight_decay: float = 5e-4
    schedule: str = field(default="cosine", metadata={"help": "any name of transformers.get_scheduler"})
    warmup_steps: int = 100
    clip_grad_norm: float = field(default=10.0, metadata={"help": "0 for none; it sees TrAct's gradient"})
    flip: float = field(default=0.0, metadata={"help": "share of mirrored training images"})
    mixed_precision: str = field(default="no", metadata={"help": "no, bf16 or fp16"})
    lam: float = field(default=0.1, metadata={"help": "TrAct's damping"})


@dataclass
class Run:
    """Which runs, and where they go."""

    recipe: str | None = field(default=None, metadata={"help": "a YAML file; digit scenes where none is given"})
    seeds: int = field(default=1, metadata={"help": "train each arm from that many seeds"})
    first_seed: int = 0
    num_workers: int = 0
    cpu: bool = False
    output_dir: str = "outputs/detect_voc"


def main() -> None:
    recipe, run = parse_with_recipe("detection/digit_scenes.yaml", Recipe, Run)
    same = {key: value for key, value in vars(recipe).items() if key != "lam"}
    seeds = range(run.first_seed, run.first_seed + run.seeds)
    title = f"{Path(recipe.dataset).name}, Faster R-CNN, lam {recipe.lam:g}"
    run_one = partial(train, data=recipe.load(), recipe=recipe, run=run)
    compare(Path(run.output_dir), two_arms(same, recipe.lam), seeds, run_one, title, MEASURES["map_50"])


def train(arm: str, seed: int, settings: dict[str, Any], data: Detections, recipe: Recipe, run: Run) -> Record:
    """One run of one arm; it goes on from its last epoch where there is one."""
    folder = Path(run.output_dir) / f"{arm}-{seed}"
    accelerator = Accelerator(
        cpu=run.cpu or not torch.accelerator.is_available(),
        mixed_precision=recipe.mixed_precision,
        project_config=ProjectConfiguration(str(folder), automatic_checkpoint_naming=True, total_limit=1),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed),
        step_scheduler_with_optimizer=False,
    )
    set_seed(seed)
    model: Any = faster_rcnn(len(data.names), recipe)
    handle = apply_tract(model, settings["lam"]) if "lam" in settings else None
    accelerator.print(f"\n{arm}, seed {seed}: {handle or 'without TrAct'}")
    images = Augmented(data.train, recipe.flip, seed)
    loader: Any = DataLoader(
        images, recipe.batch_size, shuffle=True, drop_last=True, collate_fn=list, num_workers=run.num_workers
    )
    groups = {"params": model.parameters(), "lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    optimizer = torch.optim.SGD([groups], momentum=0.9) if recipe.optimizer == "sgd" else torch.optim.AdamW([groups])
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps = recipe.epochs * len(loader)
    schedule = get_scheduler(recipe.schedule, optimizer, recipe.warmup_steps, steps)
    progress, history = Progress(), folder / "history.jsonl"
    accelerator.register_for_checkpointing(schedule, progress)
    start(accelerator, "latest", 2, history, progress)
    bar = tqdm(total=steps, initial=progress.step, desc="training", disable=not accelerator.is_main_process)
    for epoch in range(progress.epoch, recipe.epochs):
        images.epoch = epoch
        loader.set_epoch(epoch)
        model.train()
        for batch in loader:
            began = time.perf_counter()
            losses = model([pixels for pixels, _ in batch], [target for _, target in batch])
            accelerator.backward(sum(losses.values()))
            if recipe.clip_grad_norm:
                accelerator.clip_grad_norm_(model.parameters(), recipe.clip_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            progress.step += 1
            progress.seconds += time.perf_counter() - began
            bar.update()
        progress.epoch = epoch + 1
        figures = evaluate(partial(detect, accelerator.unwrap_model(model)), data.test, recipe.batch_size)
        bar.set_postfix({name: f"{value:.3f}" for name, value in figures.items()})
        add_epoch(history, {"epoch": epoch + 1, **figures}, accelerator)
        accelerator.save_state()
    bar.close()
    accelerator.save_model(model, folder / "model")
    accelerator.free_memory()
    rows = read_epochs(history)
    more = {MEASURES[name]: rows[-1][name] for name in MEASURES if name != "map_50"}
    return Record(arm, seed, [row["map_50"] for row in rows], progress.seconds / progress.step, settings, more)


def faster_rcnn(classes: int, recipe: Recipe) -> FasterRCNN:
    """Builds Faster R-CNN on VGG-16 without its last pooling; VGG-16's two hidden layers are the head; all train."""
    widths = [each if isinstance(each, str) else round(recipe.width * each) for each in VGG16]
    features = make_layers(widths, batch_norm=recipe.batch_norm)
    features.out_channels = widths[-1]
    head = TwoMLPHead(7 * 7 * int(widths[-1]), recipe.head_size)
    if recipe.imagenet:
        source = vgg16(weights=VGG16_Weights.IMAGENET1K_V1)
        features.load_state_dict(source.features[:-1].state_dict())
        head.fc6.load_state_dict(source.classifier[0].state_dict())
        head.fc7.load_state_dict(source.classifier[3].state_dict())
    anchors = AnchorGenerator((tuple(recipe.anchor_sizes),), ((0.5, 1.0, 2.0),))
    return FasterRCNN(
        features,
        None,
        recipe.min_size,
        recipe.max_size,
        rpn_anchor_generator=anchors,
        box_head=head,
        rpn_post_nms_top_n_train=recipe.proposals,
        rpn_post_nms_top_n_test=recipe.proposals,
        box_batch_size_per_image=recipe.regions,
        box_roi_pool=MultiScaleRoIAlign(["0"], 7, 2),
        box_predictor=FastRCNNPredictor(recipe.head_size, classes + 1),
    )


class Augmented(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Images and targets as torchvision's detectors take them, mirrored at random by seed, epoch and index alone."""

    def __init__(self, examples: Examples, flip: float, seed: int) -> None:
        self.examples, self.flip, self.seed, self.epoch = examples, flip, seed, 0

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image, (boxes, labels, difficult) = self.examples[index]
        pixels = pixels_of(image)
        with drawn_from(self.seed, self.epoch, index):
            mirrored = bool(torch.rand(()) < self.flip)
        if mirrored:
            left, top, right, bottom = boxes.unbind(1)
            pixels, boxes = pixels.flip(-1), torch.stack([image.width - right, top, image.width - left, bottom], 1)
        return pixels, {"boxes": boxes[~difficult], "labels": labels[~difficult] + 1}  # 0 is the background


def pixels_of(image: Image) -> Tensor:
    """float32 (3, height, width) from 0 to 1, which the model normalises itself."""
    pixels: Tensor = transforms.to_dtype(transforms.pil_to_tensor(image), torch.float32, scale=True)
    return pixels


def detect(model: FasterRCNN, images: list[Image]) -> list[Found]:
    """What a model finds in images."""
    model.eval()
    device = next(model.parameters()).device
    return [
        {**found, "labels": found["labels"] - 1} for found in model([pixels_of(image).to(device) for image in images])
    ]


if __name__ == "__main__":
    main()
