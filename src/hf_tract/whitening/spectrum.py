"""What `lam` is measured against: the eigenvalues of C, over a few batches; and what speaks against a `lam`.

Shape letters as in `moments`: g groups, n columns of `weight.flatten(1)`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_tract.config import TrActConfig
from hf_tract.discovery.first_layer import LayerSelection, find_first_layers
from hf_tract.discovery.wrappers import unwrap
from hf_tract.whitening.batches import to_model_inputs
from hf_tract.whitening.moments import moments_over


class Spectrum(NamedTuple):
    """Of C: mean and largest eigenvalue, its condition number with lam, and how many of n eigenvalues exceed lam."""

    mean: float
    largest: float
    condition: float
    above: int
    n: int


def first_layer_spectrum(
    model: nn.Module, batches: Any, lam: float = 0.1, layers: LayerSelection = "auto"
) -> dict[str, Spectrum]:
    """Measures the eigenvalues of C = (1/b) sum of p p^T over the patches p that the first layer reads of `batches`.

    Their mean is that of the squared pixels, 1 where these are standardised, which is what a `lam` of 0.05 to 0.2 is for.
    Directions whose eigenvalue is far below `lam` are not equalised, only scaled by 1 / lam. The model stays as it is.

    Args:
        model: any model, wrapped or not.
        batches: what training feeds it, normalised: a batch (a tensor, or a mapping of keyword arguments), several, or a
            `DataLoader`, of which the first four are taken. Of a tuple such as (pixels, labels) the first entry counts.
        lam: the damping that the figures are for.
        layers: as in `apply_tract`.

    Returns:
        A `Spectrum` for each layer, by name.

    Raises:
        TrActError: as `find_first_layers`; for a `lam` that is not positive, and batches in which nothing reaches the layer.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(), nn.Linear(128, 10))
        >>> first_layer_spectrum(model, torch.ones(2, 3, 16, 16))["0"].largest
        48.0
    """
    lam = TrActConfig(lam=lam).lam  # checked
    each = to_model_inputs(batches, unwrap(model))
    found = find_first_layers(model, layers, each[0] if each else None)
    moments = moments_over(model, each, found)
    return {layer.name: spectrum_of(moment, lam) for layer, moment in zip(found, moments, strict=True)}


def spectrum_of(moment: Tensor, lam: float) -> Spectrum:
    """Returns the figures of C, (g, n, n), with the damping `lam`."""
    values = torch.linalg.eigvalsh(moment).clamp(min=0)
    condition = (values[:, -1] + lam) / (values[:, 0] + lam)
    above = int((values > lam).sum())
    return Spectrum(float(values.mean()), float(values.max()), float(condition.max()), above, values.numel())
