"""Reads the images and labels of a recipe by `datasets`."""

import hashlib
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from benchmarks.training.photo_crops import photo_crops
from benchmarks.training.recipe import Recipe

TEST_SPLITS = ("test", "validation")
# The label of test images, in data sets that are competitions.
SECRET = -1
# Mean and deviation are taken from so many images.
MEASURED = 1000
# A fingerprint looks at so many images of each split.
FINGERPRINTED = 100


class Splits(NamedTuple):
    """Holds training and test rows, the names of their columns, and those of the classes."""

    train: datasets.Dataset
    test: datasets.Dataset
    image: str
    label: str
    names: list[str]


class Normalization(NamedTuple):
    """Holds the images' side, and each channel's mean and deviation on the scale 0 to 1."""

    size: int
    mean: list[float]
    std: list[float]


def load_splits(recipe: Recipe) -> Splits:
    """Return the data of a recipe, with the columns that its features tell."""
    data = _load(recipe.dataset)
    train = data["train"]
    image = _column(train, datasets.Image, recipe.dataset)
    label = recipe.label_column or _column(train, datasets.ClassLabel, recipe.dataset)
    test = data[_test_split(data, label, recipe.dataset)]
    if recipe.validation_samples:
        test = _behind(train, recipe)
    train = _some(train, recipe.train_samples)
    test = _some(test, recipe.test_samples)
    return Splits(train, test, image, label, train.features[label].names)


def _load(name: str) -> datasets.DatasetDict:
    if name == "photo_crops":
        return photo_crops()
    return datasets.load_dataset(name)


def _test_split(data: datasets.DatasetDict, label: str, name: str) -> str:
    for split in TEST_SPLITS:
        if split in data and data[split][label][0] != SECRET:
            return split
    raise SystemExit(f"{name} has the splits {', '.join(data)}: it needs labels in one of {', '.join(TEST_SPLITS)}.")


def _some(rows: datasets.Dataset, count: int) -> datasets.Dataset:
    """Return that many rows, the same each time; all for 0."""
    if not count:
        return rows
    return rows.shuffle(seed=0).select(range(min(count, len(rows))))


def _behind(rows: datasets.Dataset, recipe: Recipe) -> datasets.Dataset:
    """Return the rows that follow those that `_some` takes to train on."""
    first, count = recipe.train_samples, recipe.validation_samples
    if not first or first + count > len(rows):
        raise SystemExit(
            f"validation_samples {count}: it needs train_samples, and both together at most the {len(rows)} "
            f"training rows; train_samples is {first}."
        )
    return rows.shuffle(seed=0).select(range(first, first + count))


def _column(rows: datasets.Dataset, kind: type, name: str) -> str:
    for column, feature in rows.features.items():
        if isinstance(feature, kind):
            return str(column)
    raise SystemExit(f"{name} has no column of type {kind.__name__}, it has {', '.join(rows.column_names)}.")


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode as RGB."""
    return image.convert("RGB")


def to_tensor(size: int) -> list[Any]:
    """Return transforms that make an image of any mode and shape uint8 (3, size, size)."""
    return [to_rgb, v2.ToImage(), v2.Resize(size), v2.CenterCrop(size)]


def normalization(recipe: Recipe, splits: Splits) -> Normalization:
    """Return what the recipe says; where it says nothing, what some training images have."""
    size = recipe.image_size
    if recipe.mean and recipe.std:
        return Normalization(size, recipe.mean, recipe.std)
    chosen = np.random.default_rng(0).permutation(len(splits.train))[:MEASURED]
    transform = v2.Compose(to_tensor(size))
    images = [transform(splits.train[int(index)][splits.image]) for index in chosen]
    pixels = torch.stack(images) / 255
    mean = recipe.mean or pixels.mean((0, 2, 3)).tolist()
    std = recipe.std or pixels.std((0, 2, 3)).tolist()
    return Normalization(size, mean, std)


def fingerprint(splits: Splits) -> str:
    """Return a digest of the labels and of some images, which tells copies of a data set apart."""
    digest = hashlib.sha256()
    for rows in (splits.train, splits.test):
        digest.update(np.asarray(rows[splits.label][:], dtype=np.int64).tobytes())
        for row in rows.select(range(min(FINGERPRINTED, len(rows)))):
            digest.update(row[splits.image].tobytes())
    return digest.hexdigest()[:12]
