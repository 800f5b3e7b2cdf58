"""Estimates the scale of a model's pixels, which `lam` is compared with, by their normalisation or a few images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_tract.config import TrActError
from hf_tract.core.moments import patch_moments
from hf_tract.core.patches import PatchSpec
from hf_tract.whitening.spectrum import Spectrum, spectrum_of


class Normalization(NamedTuple):
    """Describes what an image processor does to values from 0 to 1: minus `mean`, over `std`, by channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def apply(self, images: Tensor) -> Tensor:
        """Return images of values from 0 to 1, (N, c, H, W), normalised."""
        channels = images.shape[1]
        return (images - _by_channel(self.mean, channels)) / _by_channel(self.std, channels)

    def expected_mean_eigenvalue(self) -> float:
        """Return the mean eigenvalue of C for natural images: trace(C) / n, the mean square of a normalised pixel.

        Zero padding lowers it, which is not counted here.
        """
        total = 0.0
        for channel, (mean, std) in enumerate(zip(IMAGENET.mean, IMAGENET.std, strict=True)):
            center = self.mean[channel % len(self.mean)]
            divisor = self.std[channel % len(self.std)]
            total += (std**2 + (mean - center) ** 2) / divisor**2
        return total / len(IMAGENET.mean)


def _by_channel(values: tuple[float, ...], channels: int) -> Tensor:
    """Return (c, 1, 1), or (1, 1, 1) with the average where the values are of another number of channels."""
    if len(values) != channels:
        values = (sum(values) / len(values),)
    return torch.tensor(values).view(-1, 1, 1)


# The mean and deviation of ImageNet's training images, which stand for natural images.
IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
UNCHANGED = Normalization((0.0,), (1.0,))


def spectrum_of_images(images: Tensor, spec: PatchSpec, lam: float) -> Spectrum:
    """Return the spectrum of C over the patches that `spec` cuts out of normalised images (N, c, H, W).

    Raises:
        TrActError: for pixels that are not finite.
    """
    n = spec.patch_size(images.shape)
    sums = torch.zeros(spec.groups, n, n, dtype=torch.float64)
    count = patch_moments(images.double(), spec, sums)
    if not sums.isfinite().all():
        raise TrActError("`dataset` has pixels that are not finite: set empty ones to a number.")
    return spectrum_of(sums / max(1, count), lam)
