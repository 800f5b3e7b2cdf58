"""Images of a data set as tensors, for `hf-tract inspect --dataset`: any number of channels, any bit depth."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_tract.cli.loading import in_a_line
from hf_tract.config import TrActError

BUFFER = 1000  # rows of a streamed data set among which samples are drawn


def read_images(name: str, split: str, samples: int, size: tuple[int, int], channels: int) -> list[Tensor]:
    """Draws images from all over a data set and gives each as (c, H, W), resized.

    Integers become values from 0 to 1 by the range of their type (16-bit images by 65535); floats stay as they are.

    Args:
        name: a folder of images (by classes or not), of .npy arrays, or of parquet files; a file of these; what
            `Dataset.save_to_disk` wrote; or a Hub id.
        split: of the data set; a folder without splits is all "train".
        samples: how many to draw, with the seed 0.
        size: H and W.
        channels: what the model reads. One channel is repeated for three, and three are averaged for one, as image
            processors do.

    Raises:
        TrActError: if the data set cannot be read, has no such split, no images, or images of other channels.
    """
    arrays = [_array(value) for value in _drawn(name, split, samples)]
    return [_resized(_with_channels(array, channels, name), size) for array in arrays]


def _drawn(name: str, split: str, samples: int) -> list[Any]:
    path = Path(name)
    files = sorted(path.rglob("*.npy")) if path.is_dir() else [path] if path.suffix == ".npy" and path.exists() else []
    if files:
        return [np.load(file) for file in random.Random(0).sample(files, min(samples, len(files)))]
    rows = _rows(name, split, samples)
    first = rows[0] if rows else {}
    column = next((key for key, value in first.items() if _is_image(value)), None)
    if column is None:
        raise TrActError(f"`dataset` (={name!r}) has no column of images; it has {', '.join(first) or 'no rows'}.")
    return [row[column] for row in rows]


def _rows(name: str, split: str, samples: int) -> list[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise TrActError("`dataset` needs the package datasets: pip install 'hf-tract[cli]'.") from error
    path = Path(name)
    try:
        if (path / "dataset_dict.json").exists():
            rows: Any = datasets.load_from_disk(name)[split]
        elif (path / "state.json").exists():
            rows = datasets.load_from_disk(name)
        elif path.is_file():
            rows = datasets.load_dataset(path.suffix[1:], data_files=name, split=split)
        elif path.is_dir():
            rows = datasets.load_dataset(name, split=split)
        else:
            stream = datasets.load_dataset(name, split=split, streaming=True).shuffle(seed=0, buffer_size=BUFFER)
            return list(stream.take(samples))
        return list(rows.shuffle(seed=0).select(range(min(samples, len(rows)))))
    except Exception as error:  # what a data set's files and the Hub raise has no common class
        raise TrActError(f"`dataset` (={name!r}) cannot be read: {in_a_line(error)}") from error


def _is_image(value: Any) -> bool:
    """Says whether a value of a row is a PIL image or an array of two or three dimensions."""
    if hasattr(value, "convert"):
        return True
    return isinstance(value, (list, np.ndarray)) and np.ndim(value) in (2, 3)


def _array(value: Any) -> np.ndarray:
    """Returns an image's numbers as floats, (H, W) or with channels first or last."""
    if hasattr(value, "convert"):
        has_palette = value.mode in ("P", "PA", "1", "CMYK", "YCbCr", "LAB", "HSV")
        value = value.convert("RGB") if has_palette else value
        array = np.array(value)
        array = (
            array.astype(np.uint16) if array.dtype == np.int32 and array.min() >= 0 and array.max() < 2**16 else array
        )
    else:
        array = np.asarray(value)
        is_wide = array.dtype == np.int64 and array.min() >= 0  # lists have lost their type
        array = (
            array.astype(np.uint8 if array.max() < 2**8 else np.uint16) if is_wide and array.max() < 2**16 else array
        )
    top = np.iinfo(array.dtype).max if np.issubdtype(array.dtype, np.integer) else 1
    return (array / top).astype(np.float32)


def _with_channels(array: np.ndarray, channels: int, name: str) -> Tensor:
    """Returns (channels, H, W)."""
    image = torch.from_numpy(array)
    if image.dim() == 2:
        image = image[None]
    elif image.shape[0] not in (channels, 1, 3, 4) or image.shape[-1] == channels:
        image = image.movedim(-1, 0)
    if len(image) in (2, 4) and len(image) != channels and channels in (1, 3):
        image = image[:-1]  # transparency
    if len(image) == 1 and channels == 3:
        image = image.expand(3, -1, -1)
    if len(image) == 3 and channels == 1:
        image = image.mean(0, keepdim=True)
    if len(image) != channels:
        raise TrActError(f"`dataset` (={name!r}) has images of {len(image)} channels, and the model reads {channels}.")
    return image


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
