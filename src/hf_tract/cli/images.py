"""Reads images of a data set as tensors, for `hf-tract inspect --dataset`: any number of channels, any bit depth."""

from __future__ import annotations

import glob
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_tract.cli.loading import one_line
from hf_tract.config import TrActError

BUFFER_SIZE = 1000  # rows of a streamed data set among which samples are drawn
# Modes of PIL whose numbers are not intensities.
OTHER_MODES = ("P", "PA", "1", "CMYK", "YCbCr", "LAB", "HSV")
# Files that hold images and are no .npy arrays.
OTHER_FILES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp", ".parquet", ".arrow")
Row = dict[str, Any]


def read_images(name: str, split: str, samples: int, shape: Sequence[int]) -> Tensor:
    """Draw images from all over a data set and return them resized, (N, c, H, W).

    Integers become values from 0 to 1 by the range of their type (16-bit images by 65535); floats stay as they are.

    Args:
        name: a folder of images (by classes or not), of .npy arrays, or of parquet files; a file of these; what
            `Dataset.save_to_disk` has written; or a Hub id.
        split: the split of the data set; a folder without splits counts as "train".
        samples: how many images to draw, with the seed 0.
        shape: (c, H, W), as the model reads it. One channel is repeated for three, and three are averaged for one,
            as image processors do.

    Raises:
        TrActError: if the data set cannot be read, has no such split, no images, .npy arrays beside other images, or
            images with another number of channels.
    """
    channels, height, width = shape
    rows = _draw_rows(name, split, samples)
    column = _image_column(name, rows)
    images = []
    for row in rows:
        image = _as_channels(_as_floats(row[column]), channels)
        if len(image) != channels:
            raise TrActError(
                f"`dataset` (={name!r}) has images of {len(image)} channels, and the layer reads {channels}."
            )
        resized = F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)
        images.append(resized[0])
    return torch.stack(images)


def _draw_rows(name: str, split: str, samples: int) -> list[Row]:
    path = Path(name)
    try:
        files = _array_files(path)
        if files:
            drawn_files = random.Random(0).sample(files, min(samples, len(files)))
            return [{"array": _load_array(file)} for file in drawn_files]
        rows = _open_dataset(name, split)
        if not path.exists():  # a stream from the Hub
            stream = rows.shuffle(seed=0, buffer_size=BUFFER_SIZE)
            return list(stream.take(samples))
        # Otherwise the order would be noted in the data set's folder, which may be read-only.
        drawn = rows.shuffle(seed=0, keep_in_memory=True).select(range(min(samples, len(rows))))
        return [_decoded(drawn, index) for index in range(len(drawn))]
    except Exception as error:  # what a data set's files and the Hub raise has no common class
        raise TrActError(f"`dataset` (={name!r}) cannot be read: {one_line(error)}") from error


def _array_files(path: Path) -> list[Path]:
    """Return the .npy files of a folder, or such a file alone.

    Raises:
        ValueError: if the folder has other images too, so that either may be meant: masks, or features of the images.
    """
    if path.suffix == ".npy" and path.is_file():
        return [path]
    arrays = sorted(path.rglob("*.npy"))
    if not arrays:
        return []
    # Hidden files are passed over.
    everything = f"{glob.escape(str(path))}/**/*"
    for file in sorted(glob.iglob(everything, recursive=True)):
        if file.lower().endswith(OTHER_FILES):
            raise ValueError(f"it has both {arrays[0]} and {file}: name a folder or a file of one kind")
    return arrays


def _load_array(file: Path) -> np.ndarray:
    """Load the array of an image; an error names the file."""
    try:
        array: np.ndarray = np.load(file)
    except Exception as error:  # EOFError, ValueError, OSError and others
        raise ValueError(f"{file}: {one_line(error)}") from error
    if array.ndim not in (2, 3) or array.dtype.kind not in "biuf":
        raise ValueError(f"{file} is an array of {array.dtype} and shape {array.shape}: give one of numbers per image")
    return array


def _decoded(rows: Any, index: int) -> Row:
    """Return a row; an error names the file that cannot be decoded."""
    try:
        row: Row = rows[index]
        return row
    except Exception as error:
        raise ValueError(f"{_file_of(rows, index)}: {one_line(error)}") from error


def _file_of(rows: Any, index: int) -> str:
    """Return the path of a row's image as it is stored."""
    for column, feature in rows.features.items():
        if getattr(feature, "decode", False):
            stored = rows.cast_column(column, type(feature)(decode=False))[index][column]
            return stored["path"] or "an image inside a file of rows"
    return "a row"


def _open_dataset(name: str, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("it needs the package datasets: pip install 'hf-tract[cli]'") from error
    path = Path(name)
    if (path / "dataset_dict.json").exists():
        return datasets.load_from_disk(name)[split]
    if (path / "state.json").exists():
        return datasets.load_from_disk(name)
    if path.is_file():
        return datasets.load_dataset(path.suffix[1:], data_files=name, split=split)
    return datasets.load_dataset(name, split=split, streaming=not path.exists())


def _image_column(name: str, rows: list[Row]) -> str:
    """Return the first column that holds PIL images, or arrays of two or three dimensions."""
    if not rows:
        raise TrActError(f"`dataset` (={name!r}) has no rows.")
    for column, value in rows[0].items():
        is_array = isinstance(value, (list, np.ndarray)) and np.ndim(value) in (2, 3)
        if is_array or hasattr(value, "convert"):
            return column
    raise TrActError(f"`dataset` (={name!r}) has no column of images; it has {', '.join(rows[0])}.")


def _as_floats(value: Any) -> Tensor:
    """Return a PIL image or an array as floats; integers are divided by the largest one of their type."""
    if hasattr(value, "convert") and value.mode in OTHER_MODES:
        value = value.convert("RGB")
    array = np.asarray(value)
    if np.issubdtype(array.dtype, np.integer):
        array = array / _full_scale(array)
    return torch.from_numpy(array.astype(np.float32))


def _full_scale(array: np.ndarray) -> int:
    """Return the largest integer of the type that the numbers had originally.

    PIL and datasets return 16-bit images as 32-bit ones, and lists as 64-bit integers.
    """
    largest = array.max()
    has_lost_type = array.dtype in (np.int32, np.int64) and array.min() >= 0
    if has_lost_type and array.dtype == np.int64 and largest < 2**8:
        return 2**8 - 1
    if has_lost_type and largest < 2**16:
        return 2**16 - 1
    return int(np.iinfo(array.dtype).max)


def _as_channels(image: Tensor, channels: int) -> Tensor:
    """Return an image of (H, W), (c, H, W) or (H, W, c) as (c, H, W), with `channels` channels where possible."""
    if image.dim() == 2:
        image = image[None]
    elif image.shape[0] not in (channels, 1, 3, 4) or image.shape[-1] == channels:
        image = image.movedim(-1, 0)
    if len(image) in (2, 4) and len(image) != channels and channels in (1, 3):
        image = image[:-1]  # transparency
    if len(image) == 1 and channels == 3:
        return image.expand(3, -1, -1)
    if len(image) == 3 and channels == 1:
        return image.mean(0, keepdim=True)
    return image
