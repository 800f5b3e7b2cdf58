"""What `lam` is measured against: the eigenvalues of C, from the pixels' normalisation or from a few images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_tract.cli.loading import Normalization
from hf_tract.core.moments import patch_moments
from hf_tract.core.patches import PatchSpec
from hf_tract.whitening.spectrum import Spectrum, spectrum_of

# Of ImageNet's training images, values from 0 to 1: what most image processors subtract and divide by.
NATURAL = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def expected_mean(pixels: Normalization) -> float:
    """Mean eigenvalue of C for natural images: trace(C) / n, the mean square of a normalised pixel; zero padding lowers it."""
    squares = []
    for channel, (mean, std) in enumerate(zip(NATURAL.mean, NATURAL.std, strict=True)):
        center, divisor = (values[channel % len(values)] for values in pixels)
        squares.append((std**2 + (mean - center) ** 2) / divisor**2)
    return sum(squares) / len(squares)


def spectrum(images: Tensor, spec: PatchSpec, lam: float) -> Spectrum:
    """Of the patches that `spec` cuts out of normalised images (N, c, H, W)."""
    n = spec.patch_size(images.shape)
    sums = torch.zeros(spec.groups, n, n, dtype=torch.float64)
    count = patch_moments(images.double(), spec, sums)
    return spectrum_of(sums / max(1, count), lam)


def normalised(images: Sequence[Tensor], pixels: Normalization) -> Tensor:
    """Images (c, H, W) of values from 0 to 1, all of one size, as (N, c, H, W) after the image processor's shift and scale."""
    batch = torch.stack(list(images))
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in pixels)
    return (batch - mean) / std
