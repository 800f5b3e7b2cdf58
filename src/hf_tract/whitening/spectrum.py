"""Measures the eigenvalues of C over a few batches, which is what `lam` is compared with."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_tract.config import TrActConfig
from hf_tract.discovery.first_layer import LayerSelection, find_first_layers
from hf_tract.discovery.wrappers import unwrap
from hf_tract.whitening.batches import to_model_inputs
from hf_tract.whitening.moments import second_moments


class Spectrum(NamedTuple):
    """Describes C: its mean and largest eigenvalue, the condition number of C + lam I, how many of n exceed lam."""

    mean: float
    largest: float
    condition: float
    above: int
    n: int


def first_layer_spectrum(
    model: nn.Module, batches: Any, lam: float = 0.1, layers: LayerSelection = "auto"
) -> dict[str, Spectrum]:
    """Measure the eigenvalues of C = (1/b) sum of p p^T over the patches p that the first layer reads of `batches`.

    Their mean is the mean square of the pixels, 1 where these are standardised; a `lam` of 0.05 to 0.2 is meant for
    that. Directions whose eigenvalue is far below `lam` are not equalised, only scaled by 1 / lam. The model stays
    as it is.

    Args:
        model: any model, wrapped or not.
        batches: as in training, normalised, in any form that `whiten_first_layer` takes.
        lam: the damping to compare with.
        layers: as in `apply_tract`.

    Returns:
        A `Spectrum` for each layer, by name.

    Raises:
        TrActError: as `find_first_layers`; for a `lam` that is not positive, and batches that do not reach the layer.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(), nn.Linear(128, 10))
        >>> first_layer_spectrum(model, torch.ones(2, 3, 16, 16))["0"].largest
        48.0
    """
    lam = TrActConfig(lam=lam).lam  # The config checks it.
    inputs = to_model_inputs(batches, unwrap(model))
    found = find_first_layers(model, layers, next(iter(inputs), None))
    moments = second_moments(model, inputs, found)
    spectra = {}
    for layer, moment in zip(found, moments, strict=True):
        spectra[layer.name] = spectrum_of(moment, lam)
    return spectra


def spectrum_of(moment: Tensor, lam: float) -> Spectrum:
    """Return the spectrum of C, (groups, n, n), over all groups; `condition` is that of the worst group."""
    values = torch.linalg.eigvalsh(moment).clamp(min=0)
    condition = (values[:, -1] + lam) / (values[:, 0] + lam)
    return Spectrum(
        mean=float(values.mean()),
        largest=float(values.max()),
        condition=float(condition.max()),
        above=int((values > lam).sum()),
        n=values.numel(),
    )
