"""What `lam` is measured against: the eigenvalues of C, from the pixels' normalisation or from a few images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_tract.loading import Pixels
from hf_tract.moments import Window, patch_moments

# Of ImageNet's training images, values from 0 to 1: what most image processors subtract and divide by.
NATURAL = Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Spectrum(NamedTuple):
    """Of C: mean and largest eigenvalue, its condition number with lam, and how many of n eigenvalues exceed lam."""

    mean: float
    largest: float
    condition: float
    above: int
    n: int


def expected_mean(pixels: Pixels) -> float:
    """Mean eigenvalue of C for natural images: trace(C) / n, the mean square of a normalised pixel; zero padding lowers it."""
    squares = []
    for channel, (mean, std) in enumerate(zip(NATURAL.mean, NATURAL.std, strict=True)):
        center, divisor = (values[channel % len(values)] for values in pixels)
        squares.append((std**2 + (mean - center) ** 2) / divisor**2)
    return sum(squares) / len(squares)


def spectrum(images: Tensor, window: Window, lam: float) -> Spectrum:
    """Of the patches that `window` cuts out of normalised images (N, c, H, W)."""
    n = window.columns(images.shape)
    sums = torch.zeros(window.groups, n, n, dtype=torch.float64)
    count = patch_moments(images.double(), window, sums)
    values = torch.linalg.eigvalsh(sums / max(1, count)).clamp(min=0)
    condition = (values[:, -1] + lam) / (values[:, 0] + lam)
    above = int((values > lam).sum())
    return Spectrum(float(values.mean()), float(values.max()), float(condition.max()), above, values.numel())


def normalised(images: Sequence[Tensor], pixels: Pixels) -> Tensor:
    """Images (c, H, W) of values from 0 to 1, all of one size, as (N, c, H, W) after the image processor's shift and scale."""
    batch = torch.stack(list(images))
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in pixels)
    return (batch - mean) / std
