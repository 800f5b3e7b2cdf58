"""A few images of a data set, for `hf-tract inspect --dataset`."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from torch import Tensor

from hf_tract.config import TrActError


def read_images(name: str, split: str, samples: int, size: tuple[int, int], channels: int) -> list[Tensor]:
    """The first `samples` images, resized to `size`, as values from 0 to 1, (c, H, W).

    Raises:
        TrActError: if the data set has no such split, no image column, or cannot be read.
    """
    try:
        import datasets
    except ImportError as error:
        raise TrActError("`dataset` needs the package datasets: pip install 'hf-tract[cli]'.") from error
    try:
        if Path(name).is_dir():
            rows = datasets.load_dataset("imagefolder", data_dir=name, split=split, streaming=True)
        else:
            rows = datasets.load_dataset(name, split=split, streaming=True)
        taken = list(itertools.islice(rows, samples))
    except Exception as error:  # what a data set's files and the Hub raise has no common class
        raise TrActError(f"`dataset` (={name!r}) cannot be read: {' '.join(str(error).split())[:300]}") from error
    column = next((key for key, value in (taken[0] if taken else {}).items() if hasattr(value, "convert")), None)
    if column is None:
        raise TrActError(
            f"`dataset` (={name!r}) has no column of images; it has {', '.join(taken[0]) if taken else 'no rows'}."
        )
    mode = "L" if channels == 1 else "RGB"
    return [_tensor(row[column].convert(mode).resize(size[::-1])) for row in taken]


def _tensor(image: object) -> Tensor:
    import numpy as np

    values = torch.from_numpy(np.array(image, dtype=np.float32)) / 255
    return values[None] if values.dim() == 2 else values.permute(2, 0, 1)
