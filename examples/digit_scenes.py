"""Digit scenes: a small detection data set that needs no download.

scikit-learn's scans of handwritten digits (8x8), two to four times as large, in colours of their own, on a canvas of
smooth colours and noise. Every digit is an object; the boxes of two do not overlap. No scan of a test scene is in a
training scene.
"""

from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
from PIL import Image

from digits import digits

SIDES = (64, 80, 96)  # of the canvas, drawn for each direction
ZOOMS = (2, 3, 4)
MOST = 4  # digits in a scene


def digit_scenes(train: int = 1000, test: int = 200, seed: int = 0) -> datasets.DatasetDict:
    """The data set, the same for the same arguments.

    Args:
        train: scenes for training.
        test: scenes for testing.
        seed: of everything that is drawn.

    Returns:
        Splits "train" and "test" with the columns `image` (RGB, of several sizes) and `objects`: `bbox` as (x, y,
        width, height) in pixels, and `category`.
    """
    label = datasets.ClassLabel(names=list("0123456789"))
    objects = {"bbox": datasets.List(datasets.List(datasets.Value("float32"), 4)), "category": datasets.List(label)}
    features = datasets.Features({"image": datasets.Image(), "objects": objects})
    scans = digits(seed)
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_list(list(_scenes(scans[split], count, [seed, number])), features=features)
            for number, (split, count) in enumerate({"train": train, "test": test}.items())
        }
    )


def _scenes(scans: datasets.Dataset, count: int, seed: list[int]) -> Iterator[dict[str, Any]]:
    images, labels = [np.asarray(image, dtype=np.float32) / 255 for image in scans["image"]], scans["label"]
    for index in range(count):
        random = np.random.default_rng([*seed, index])
        canvas = _background(random)
        boxes: list[tuple[int, int, int, int]] = []
        categories: list[int] = []
        for _ in range(random.integers(1, MOST + 1)):
            scan = int(random.integers(len(images)))
            side = 8 * int(random.choice(ZOOMS))
            mask = np.asarray(Image.fromarray(images[scan]).resize((side, side), Image.Resampling.BILINEAR)).clip(0, 1)
            box = _place(mask, canvas.shape, boxes, random)
            if box is None:
                continue
            x, y, width, height = box
            ink = mask[_extent(mask)][..., None]
            part = canvas[y : y + height, x : x + width]
            part[:] = (1 - ink) * part + ink * _colour_against(part.mean((0, 1)), random)
            boxes.append(box)
            categories.append(labels[scan])
        canvas += random.normal(0, 0.03, canvas.shape)
        image = Image.fromarray((255 * canvas.clip(0, 1)).astype(np.uint8))
        yield {"image": image, "objects": {"bbox": boxes, "category": categories}}


def _background(random: np.random.Generator) -> np.ndarray:
    """A canvas (height, width, 3), its colours between those of its four corners."""
    height, width = (int(side) for side in random.choice(SIDES, 2))
    corners = Image.fromarray((255 * random.uniform(0, 1, (2, 2, 3))).astype(np.uint8))
    return np.asarray(corners.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32) / 255


def _extent(mask: np.ndarray, least: float = 0.15) -> tuple[slice, slice]:
    rows, columns = (np.flatnonzero((mask > least).any(axis)) for axis in (1, 0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _place(
    mask: np.ndarray, shape: tuple[int, ...], others: list[tuple[int, int, int, int]], random: np.random.Generator
) -> tuple[int, int, int, int] | None:
    """A box of the digit's extent that meets no other, if one is found."""
    rows, columns = _extent(mask)
    height, width = rows.stop - rows.start, columns.stop - columns.start
    for _ in range(20):
        y, x = int(random.integers(shape[0] - height + 1)), int(random.integers(shape[1] - width + 1))
        if all(x >= a + w or a >= x + width or y >= b + h or b >= y + height for a, b, w, h in others):
            return x, y, width, height
    return None


def _colour_against(background: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A colour that differs from what is behind it."""
    while True:
        colour = random.uniform(0, 1, 3)
        if np.abs(colour - background).mean() > 0.3:
            return colour
