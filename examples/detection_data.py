"""Images with boxes: digit scenes, a Hub data set with an `objects` column, or a VOC folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import datasets
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import VOCDetection

from digit_scenes import digit_scenes

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
# How data sets of the Hub name what belongs to an object.
BOX_KEYS, CATEGORY_KEYS = ("bbox", "bboxes"), ("category", "categories", "category_id", "classes", "label")


class Objects(NamedTuple):
    """What there is in an image."""

    boxes: Tensor  # (k, 4): left, top, right, bottom in pixels
    labels: Tensor  # (k,), from 0
    difficult: Tensor  # (k,), bool: neither a hit nor a miss


class Example(NamedTuple):
    """An image and what there is in it."""

    image: Image.Image
    objects: Objects


class Examples(Protocol):
    """A data set of them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class Detections(NamedTuple):
    """Training and test examples, and the names of the classes."""

    train: Examples
    test: Examples
    names: list[str]


@dataclass
class DetectionArguments:
    """Which images with boxes, as options of a script."""

    dataset: str = field(
        default="digit_scenes",
        metadata={
            "help": "digit_scenes, a folder that holds VOCdevkit, or a Hub id (or folder) with a column of objects"
        },
    )
    dataset_config: str | None = None
    dataset_revision: str | None = field(default=None, metadata={"help": "such as refs/convert/parquet"})
    train_split: str | None = field(
        default=None, metadata={"help": "train, of a VOC folder trainval; or several: train+validation"}
    )
    eval_split: str | None = field(default=None, metadata={"help": "test, else validation"})
    bbox_format: str = field(
        default="coco", metadata={"help": "coco: x, y, width, height; pascal_voc: left, top, right, bottom"}
    )
    voc_year: str = "2007"
    train_samples: int = field(default=0, metadata={"help": "use that many training images; 0 for all"})
    test_samples: int = field(default=0, metadata={"help": "use that many test images; 0 for all"})

    def load(self) -> Detections:
        """The data set."""
        if self.bbox_format not in ("coco", "pascal_voc"):
            raise SystemExit(f"--bbox_format {self.bbox_format}: it must be coco or pascal_voc.")
        if Path(self.dataset, "VOCdevkit").is_dir():
            return self._voc()
        if self.dataset == "digit_scenes":
            data = digit_scenes()
        else:
            data = datasets.load_dataset(self.dataset, self.dataset_config, revision=self.dataset_revision)
        test = self.eval_split or ("test" if "test" in data else "validation")
        train, test = (self._split(data, split) for split in (self.train_split or "train", test))
        names = _names(train, self.dataset)
        return Detections(
            Rows(_some(train, self.train_samples), self.bbox_format),
            Rows(_some(test, self.test_samples), self.bbox_format),
            names,
        )

    def _split(self, data: datasets.DatasetDict, name: str) -> datasets.Dataset:
        parts = name.split("+")
        if missing := [part for part in parts if part not in data]:
            raise SystemExit(
                f"{self.dataset} has no split {missing[0]}, it has {list(data)}: "
                "name one by --train_split or --eval_split."
            )
        return datasets.concatenate_datasets([data[part] for part in parts])

    def _voc(self) -> Detections:
        splits = (self.train_split or "trainval", self.train_samples), (self.eval_split or "test", self.test_samples)
        train, test = (VocFolder(self.dataset, self.voc_year, split, count) for split, count in splits)
        return Detections(train, test, VOC_NAMES)


class Rows(Dataset[Example]):
    """Reads examples from rows with an image and an `objects` column, as detection data sets of the Hub have them."""

    def __init__(self, rows: datasets.Dataset, bbox_format: str) -> None:
        self.rows, self.bbox_format = rows, bbox_format
        self.image = next(name for name, feature in rows.features.items() if isinstance(feature, datasets.Image))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        objects = row["objects"]
        boxes = torch.tensor(objects[_key(objects, BOX_KEYS)], dtype=torch.float32).reshape(-1, 4)
        if self.bbox_format == "coco":
            boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor(objects[_key(objects, CATEGORY_KEYS)], dtype=torch.int64)
        difficult = torch.tensor(objects.get("difficult", [False] * len(labels)), dtype=torch.bool)
        return Example(row[self.image].convert("RGB"), Objects(boxes, labels, difficult))


class VocFolder(Dataset[Example]):
    """Examples from a VOCdevkit, whose boxes count pixels from 1 and hold both ends."""

    def __init__(self, root: str, year: str, split: str, count: int = 0) -> None:
        self.all = VOCDetection(root, year, split)
        self.count = min(count or len(self.all), len(self.all))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        image, tree = self.all[index]
        objects = tree["annotation"]["object"]
        corners = [[float(each["bndbox"][side]) for side in ("xmin", "ymin", "xmax", "ymax")] for each in objects]
        boxes = torch.tensor(corners).reshape(-1, 4) - torch.tensor([1.0, 1.0, 0.0, 0.0])
        labels = torch.tensor([VOC_NAMES.index(each["name"]) for each in objects])
        difficult = torch.tensor([each.get("difficult") == "1" for each in objects])
        return Example(image.convert("RGB"), Objects(boxes, labels, difficult))


def _key(objects: Mapping[str, Any], keys: Sequence[str]) -> str:
    found = next((key for key in keys if key in objects), None)
    if found is None:
        raise ValueError(f"the `objects` of this data set have {list(objects)}, none of {', '.join(keys)}.")
    return found


def _names(rows: datasets.Dataset, dataset: str) -> list[str]:
    objects = rows.features.get("objects")
    if objects is None or not any(isinstance(feature, datasets.Image) for feature in rows.features.values()):
        raise SystemExit(f"{dataset} has no column of images or none named objects; it has {rows.column_names}.")
    objects = getattr(objects, "feature", objects)
    category: Any = objects[_key(objects, CATEGORY_KEYS)]
    category = getattr(category, "feature", category)
    if isinstance(category, datasets.ClassLabel):
        return list(category.names)
    most = max(label for each in rows["objects"] for label in each[_key(each, CATEGORY_KEYS)])
    return [str(label) for label in range(most + 1)]


def _some(rows: datasets.Dataset, count: int) -> datasets.Dataset:
    return rows.shuffle(seed=0).select(range(min(count, len(rows)))) if count else rows
