"""Yields images as tensors, so that no random draw depends on which worker makes it when."""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset as Rows
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from benchmarks.training.data import Normalization, Splits, to_rgb

Batch = tuple[Tensor, Tensor]
ToPixels = Callable[[Any], Tensor]


class Images(Dataset[tuple[Tensor, int]]):
    """Yields rows as (pixels, label), transformed at random by seed, epoch, and the image's index and copy alone.

    So nothing depends on the number of workers and processes, nor on where a run was stopped and resumed.
    """

    def __init__(self, rows: Rows, splits: Splits, transform: ToPixels, seed: int = 0) -> None:
        self.rows = rows
        self.splits = splits
        self.transform = transform
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, int]:
        copy = 0
        if isinstance(index, tuple):
            index, copy = index
        row = self.rows[index]
        with drawn_from(self.seed, self.epoch, index, copy):
            pixels = self.transform(to_rgb(row[self.splits.image]))
        return pixels, row[self.splits.label]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that random transforms depend on; accelerate's loaders call it."""
        self.epoch = epoch


@contextlib.contextmanager
def drawn_from(*entropy: int) -> Iterator[None]:
    """Draw the random numbers of torch, numpy and `random` from these integers inside, and go on as before outside."""
    # All three are saved, since timm draws from all of them.
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    # Transforms draw from this generator alone, and torch.manual_seed would take 0.1 ms.
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class CachedImages(Dataset[Batch]):
    """Holds images in memory and yields whole batches, cropped and flipped, so that a small model need not wait.

    An image's crop and flip depend on the seed, the epoch and its index alone.
    """

    def __init__(
        self, rows: Rows, splits: Splits, to_size: ToPixels, normalization: Normalization, seed: int = 0
    ) -> None:
        """Decode the images.

        Args:
            rows: what to read.
            splits: whose columns they have.
            to_size: makes an image uint8 (3, side, side).
            normalization: of the pixels.
            seed: of crops and flips.
        """
        images = Images(rows, splits, to_size)
        pixels, labels = [], []
        for index in tqdm(range(len(images)), "reading images", leave=False):
            image, label = images[index]
            pixels.append(image)
            labels.append(label)
        self.pixels = torch.stack(pixels)
        self.labels = torch.tensor(labels)
        self.mean = torch.tensor(normalization.mean).view(3, 1, 1)
        self.std = torch.tensor(normalization.std).view(3, 1, 1)
        self.seed = seed
        self.augment(padding=0, flip=0.0)

    def augment(self, padding: int, flip: float) -> None:
        """Crop at random from images with `padding` zeros on each side, and mirror them with probability `flip`."""
        self.padding = padding
        self.flip = flip
        self.set_epoch(0)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        """Return a batch of one."""
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return pixels (b, 3, side, side), float32 and normalised, and labels (b,)."""
        pixels = self.pixels[indices]
        side = pixels.shape[-1]
        if self.padding:
            windows = F.pad(pixels, [self.padding] * 4).unfold(2, side, 1).unfold(3, side, 1)
            down, across = self.offsets[indices].T
            pixels = windows[torch.arange(len(pixels)), :, down, across]
        flipped = self.flips[indices].view(-1, 1, 1, 1)
        pixels = torch.where(flipped, pixels.flip(-1), pixels)
        return (pixels / 255 - self.mean) / self.std, self.labels[indices]

    def set_epoch(self, epoch: int) -> None:
        """Draw the crops and flips of an epoch."""
        generator = np.random.default_rng([self.seed, epoch])
        offsets = generator.integers(0, 2 * self.padding + 1, (len(self), 2))
        self.offsets = torch.from_numpy(offsets)
        self.flips = torch.from_numpy(generator.random(len(self)) < self.flip)


def as_it_is(batch: Any) -> Any:
    """Return the batch; the `collate_fn` of cached images, which come as batches."""
    return batch
