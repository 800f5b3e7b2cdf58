"""Holds images in memory: decoded once, cropped and flipped by the batch, so that a small model need not wait."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset as Rows
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from benchmarks.training.image_data import Images, Splits
from benchmarks.training.models import Preprocessing

Batch = tuple[Tensor, Tensor]


class CachedImages(Dataset[Batch]):
    """Rows as whole batches of (pixels, labels), for a loader whose `collate_fn` leaves them as they are.

    An image's crop and flip depend on `seed`, the epoch and its index alone, and so not on where a run was resumed.
    """

    def __init__(
        self,
        rows: Rows,
        splits: Splits,
        to_size: Callable[[Any], Tensor],
        look: Preprocessing,
        padding: int = 0,
        flip: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Decodes the images.

        Args:
            rows: what to read.
            splits: whose columns they have.
            to_size: makes an image uint8 (3, side, side).
            look: how the pixels are normalised.
            padding: zeros on each side before a random crop of the image's own size.
            flip: probability of a mirrored image.
            seed: of crops and flips.
        """
        images = Images(rows, splits, to_size)
        pixels, labels = zip(
            *(images[index] for index in tqdm(range(len(images)), "reading images", leave=False)), strict=True
        )
        self.pixels, self.labels = torch.stack(pixels), torch.tensor(labels)
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (look.mean, look.std))
        self.padding, self.flip, self.seed = padding, flip, seed
        self.set_epoch(0)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        """A batch of one."""
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Pixels (b, 3, side, side), float32 and normalised, and labels (b,)."""
        pixels, side = self.pixels[indices], self.pixels.shape[-1]
        if self.padding:
            windows = F.pad(pixels, [self.padding] * 4).unfold(2, side, 1).unfold(3, side, 1)
            down, across = self.offsets[indices].T
            pixels = windows[torch.arange(len(pixels)), :, down, across]
        pixels = torch.where(self.flips[indices].view(-1, 1, 1, 1), pixels.flip(-1), pixels)
        return (pixels / 255 - self.mean) / self.std, self.labels[indices]

    def set_epoch(self, epoch: int) -> None:
        """Draws the crops and flips of an epoch."""
        random = np.random.default_rng([self.seed, epoch])
        self.offsets = torch.from_numpy(random.integers(0, 2 * self.padding + 1, (len(self), 2)))
        self.flips = torch.from_numpy(random.random(len(self)) < self.flip)


def as_it_is(batch: Any) -> Any:
    """The `collate_fn` of these images."""
    return batch
