"""Reads images and labels by `datasets`, and transforms them so that no draw depends on which worker makes it when."""

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from tqdm.auto import tqdm

from benchmarks.training.photo_crops import photo_crops

BUILT_IN: dict[str, Callable[[], datasets.DatasetDict]] = {
    "photo_crops": photo_crops,
}  # which need no download
DATASET_HELP = "photo_crops, a Hub id, or a folder of parquet or images"
EVAL_SPLITS = ("test", "validation", "val", "valid", "dev")
LABEL_COLUMNS = ("label", "labels", "class", "category", "target")
HELD_OUT = 0.2  # of a data set that has one split
# What the columns and the names of the splits do not tell.
KNOWN: dict[str, dict[str, str]] = {
    "ILSVRC/imagenet-1k": {"eval_split": "validation"},  # the labels of its test split are not public
    "timm/imagenet-1k-wds": {"eval_split": "validation", "image_column": "jpg", "label_column": "cls"},
}


class Splits(NamedTuple):
    """Training and test rows, their columns, and the names of the classes."""

    train: datasets.Dataset
    test: datasets.Dataset
    image: str
    label: str
    names: list[str]
    eval_split: str = "test"


@dataclass
class DataArguments:
    """Which images, as options of a script."""

    dataset: str = field(default="photo_crops", metadata={"help": DATASET_HELP})
    dataset_config: str | None = None
    train_split: str = "train"
    eval_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    train_samples: int = field(default=0, metadata={"help": "use that many training images; 0 for all"})
    test_samples: int = field(default=0, metadata={"help": "use that many test images; 0 for all"})

    def load(self) -> Splits:
        """The data set."""
        return load_splits(
            self.dataset,
            self.dataset_config,
            self.train_split,
            self.eval_split,
            self.image_column,
            self.label_column,
            self.train_samples,
            self.test_samples,
        )


def load_splits(
    name: str,
    config: str | None = None,
    train_split: str = "train",
    eval_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    train_samples: int = 0,
    test_samples: int = 0,
) -> Splits:
    """A data set's splits, with what is not given found in its features.

    Args:
        name: "photo_crops", a Hub id, or a local folder with parquet files or images by class.
        config: the Hub's name for a variant.
        train_split: to train on.
        eval_split: to test on; by default "test", else "validation", else a share of the training rows, held out.
        image_column: by default the first column of images.
        label_column: by default the first column of class labels, else one of words that is named like a label.
        train_samples: take that many training rows, the same each time; 0 for all.
        test_samples: the same for the test rows.
    """
    data = BUILT_IN[name]() if name in BUILT_IN else datasets.load_dataset(name, config)
    known = KNOWN.get(name, {})
    if not eval_split and set(data) == {train_split}:
        data = hold_out(data[train_split], train_split, name)
    eval_split = eval_split or known.get("eval_split") or next((each for each in EVAL_SPLITS if each in data), "test")
    if missing := [split for split in (train_split, eval_split) if split not in data]:
        raise ValueError(
            f"{name!r} has no split {missing[0]!r}, it has {list(data)}: name one by --train_split or --eval_split."
        )
    train, test = data[train_split], data[eval_split]
    image = image_column or known.get("image_column") or _column(train, datasets.Image, "image", name)
    label = label_column or known.get("label_column") or _label_column(train, name)
    if _is_words(train, label):
        train, test = _with_classes(train, test, label, name)
    for split, rows in {train_split: train, eval_split: test}.items():
        if not len(rows) or any(value is None or value == -1 for value in rows[label]):
            raise ValueError(
                f"{name!r} has rows without a label in split {split!r}: name another split or label column."
            )
    if train_samples:
        train = train.shuffle(seed=0).select(range(min(train_samples, len(train))))
    if test_samples:
        test = test.shuffle(seed=0).select(range(min(test_samples, len(test))))
    feature = train.features[label]
    names = (
        feature.names
        if isinstance(feature, datasets.ClassLabel)
        else [str(value) for value in sorted(train.unique(label))]
    )
    return Splits(train, test, image, label, names, eval_split)


def _column(rows: datasets.Dataset, kind: type, what: str, name: str) -> str:
    found: str | None = next((column for column, feature in rows.features.items() if isinstance(feature, kind)), None)
    if found is None:
        raise ValueError(
            f"{name!r} has no column of type {kind.__name__}; name one of {rows.column_names} by --{what}_column."
        )
    return found


def _label_column(rows: datasets.Dataset, name: str) -> str:
    """The column of class labels, or of words, as in a metadata.csv beside images."""
    for column in LABEL_COLUMNS:
        if column in rows.features and _is_words(rows, column):
            return column
    return _column(rows, datasets.ClassLabel, "label", name)


def _is_words(rows: datasets.Dataset, column: str) -> bool:
    return rows.features[column] in (datasets.Value("string"), datasets.Value("large_string"))


def _with_classes(
    train: datasets.Dataset, test: datasets.Dataset, label: str, name: str
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Both with numbers in place of words; the classes are those of the training rows."""
    words = {word for word in train[label] if word is not None}
    if unknown := set(test[label]) - words - {None}:
        raise ValueError(
            f"{name!r} has labels to test on that are not among those to train on: {sorted(unknown)[:5]}."
        )
    classes = datasets.ClassLabel(names=sorted(words))
    return train.cast_column(label, classes), test.cast_column(label, classes)


def hold_out(rows: datasets.Dataset, split: str, name: str) -> datasets.DatasetDict:
    """Splits off a share to test on, the same each time, and says so."""
    parts = rows.train_test_split(HELD_OUT, seed=0)
    print(
        f"{name} has images in one split ({split}) alone: {len(parts['test'])} of {len(rows)}, drawn with seed 0, are "
        f"held out to test on. To choose them yourself, make folders train and test, or name --eval_split."
    )
    return datasets.DatasetDict({split: parts["train"], "test": parts["test"]})


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB; PIL's own way cuts off what is above 255 of 16-bit and of float images.

    Raises:
        ValueError: for numbers whose scale nobody can tell.
    """
    if not image.mode.startswith(("I", "F")):
        return image.convert("RGB")
    values = np.asarray(image, dtype=np.float64)
    low, high = values.min(), values.max()
    top = 1.0 if image.mode == "F" else 65535.0
    if low < 0 or high > top or not np.isfinite(values).all():
        raise ValueError(
            f"an image of mode {image.mode} has values from {low:g} to {high:g}: integers from 0 to 65535 and floats "
            f"from 0 to 1 can be read; scale others before."
        )
    return Image.fromarray((values * 255 / top).round().astype(np.uint8)).convert("RGB")


def to_tensor(size: int) -> list[Any]:
    """Transforms that make an image of any mode and shape uint8 (3, size, size)."""
    return [to_rgb, v2.ToImage(), v2.Resize(size), v2.CenterCrop(size)]


def normalization(splits: Splits, size: int, sample: int = 1000) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over some training images, on the scale 0 to 1."""
    some = np.random.default_rng(0).permutation(len(splits.train))[:sample]
    transform = v2.Compose(to_tensor(size))
    pixels = torch.stack([transform(splits.train[int(index)][splits.image]) for index in some]) / 255
    return pixels.mean((0, 2, 3)).tolist(), pixels.std((0, 2, 3)).tolist()


class Images(Dataset[tuple[Tensor, int]]):
    """Yields rows as (pixels, label), transformed at random by `seed`, the epoch, the image's index and copy alone.

    So nothing depends on the number of workers and processes, nor on where a run was stopped and resumed.
    """

    def __init__(
        self, rows: datasets.Dataset, splits: Splits, transform: Callable[[Any], Tensor], seed: int = 0
    ) -> None:
        self.rows, self.splits, self.transform, self.seed, self.epoch = rows, splits, transform, seed, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, int]:
        index, copy = index if isinstance(index, tuple) else (index, 0)
        try:
            row = self.rows[index]
        except (OSError, SyntaxError) as error:  # what pillow says of a broken file
            raise ValueError(f"image {_file(self.rows, index, self.splits.image)} cannot be read: {error}") from error
        with drawn_from(self.seed, self.epoch, index, copy):
            return self.transform(to_rgb(row[self.splits.image])), row[self.splits.label]

    def set_epoch(self, epoch: int) -> None:
        """What the random transforms depend on beside the image; accelerate's loaders, and so Trainer's, call it."""
        self.epoch = epoch


def without_corrupt(rows: datasets.Dataset, column: str) -> tuple[datasets.Dataset, list[str]]:
    """The rows whose images can be read, and the names of the others."""
    corrupt = {}
    for index in tqdm(range(len(rows)), desc="reading images", leave=False):
        try:
            rows[index][column].load()
        except (OSError, SyntaxError):
            corrupt[index] = _file(rows, index, column)
    return rows.select([index for index in range(len(rows)) if index not in corrupt]), list(corrupt.values())


def _file(rows: datasets.Dataset, index: int, column: str) -> str:
    path = rows.cast_column(column, datasets.Image(decode=False))[index][column].get("path")
    return f"{index} ({path})" if path else str(index)


@contextlib.contextmanager
def drawn_from(*entropy: int) -> Iterator[None]:
    """Random numbers of torch, numpy and `random` come from these integers inside, and go on as before outside."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # timm draws from all three
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # which alone transforms draw from; torch.manual_seed takes 0.1 ms
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
