"""Gives the first layer a whitened start, W0 (C + lam I)^-1/2, for training from scratch.

Shape letters: g groups, n columns of `weight.flatten(1)`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_tract.config import TrActConfig
from hf_tract.core.sharding import gathered_weights, read_weight, write_weight
from hf_tract.discovery.first_layer import FirstLayer, LayerSelection, find_first_layers
from hf_tract.discovery.wrappers import unwrap
from hf_tract.whitening.batches import to_model_inputs
from hf_tract.whitening.fresh import check_fresh, mark_as_whitened
from hf_tract.whitening.moments import second_moments


def whiten_first_layer(  # noqa: PLR0913
    model: nn.Module,
    batches: Any,
    lam: float = 0.1,
    layers: LayerSelection = "auto",
    *,
    match_scale: bool = True,
    force: bool = False,
    process_group: Any = None,
) -> list[FirstLayer]:
    """Multiply the first layer's fresh weight W0 by (C + lam I)^-1/2, the coordinates in which TrAct learns.

    C = (1/b) sum of p p^T is taken over all b patches p of the batches, on every data-parallel rank, so that all ranks
    come to the same weight. The model's mode, its buffers and the random numbers stay as they are. The model may be
    wrapped or sharded (DDP, FSDP1, FSDP2, ZeRO); where it is sharded, each rank needs as many batches as the others.
    Optimizers that copy the weights must be made afterwards, except for DeepSpeed's, whose copy is changed too.

    Args:
        model: any model whose first layer has not been trained.
        batches: as in training, augmented and normalised: one batch (a tensor of pixels, or a mapping of
            keyword arguments), several, or a `DataLoader`, of which the first four batches are read. Where several are
            given, each may also be a list of images, or a tuple such as (pixels, labels), whose first entry is used.
            Where one forward call runs the layer twice, the first time counts.
        lam: the damping, in the units of C's eigenvalues; use the same one as in `apply_tract`.
        layers: as in `apply_tract`.
        match_scale: also scale the weight so that its outputs have the mean square that W0's would have on white
            input; without it they are smaller because of lam.
        force: whiten the weights even if they look trained or were whitened before.
        process_group: the data-parallel ranks; None for the default group.

    Returns:
        The layers whose weights were changed.

    Raises:
        TrActError: for a layer that was whitened before, a model from `from_pretrained`, weights that look trained
            (their rows prefer some directions) or are computed by a hook (pruning, the old weight norm); for batches
            that are not pixels or do not reach the layer, and for a `lam` that is not positive. The model is left as
            it was.

    Source:
        https://hf-tract.github.io/hf-tract/whitening/, equation 2.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 4, 4), nn.Flatten(), nn.Linear(1024, 10))
        >>> whiten_first_layer(model, torch.randn(8, 3, 16, 16).cumsum(-1))[0].name
        '0'
    """
    lam = TrActConfig(lam=lam).lam  # The config checks it.
    inputs = to_model_inputs(batches, unwrap(model))
    found = find_first_layers(model, layers, next(iter(inputs), None))
    modules = [layer.module for layer in found]
    with gathered_weights(model, modules):
        fresh = [read_weight(module).clone() for module in modules]
    # The checks come first, since the moments take time.
    for layer, weight in zip(found, fresh, strict=True):
        check_fresh(model, layer, weight, force)
    moments = second_moments(model, inputs, found, process_group)
    with gathered_weights(model, modules):
        for module, weight, moment in zip(modules, fresh, moments, strict=True):
            write_weight(module, _whitened(weight, moment, lam, match_scale))
            mark_as_whitened(module, weight)
    return found


def _whitened(weight: Tensor, moment: Tensor, lam: float, match_scale: bool) -> Tensor:
    """Return W0 (C + lam I)^-1/2 for the weight W0 and its C, (g, n, n), by eigenvectors in float64."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp(min=0)
    scales = (values + lam).rsqrt()
    root = (vectors * scales.unsqueeze(-2)) @ vectors.mT
    if match_scale:
        # On average over white rows w, the mean square of the outputs is |w|^2 tr(root C root) / n.
        mean_square = (values / (values + lam)).mean(-1).view(-1, 1, 1)
        # A group that reads nothing but zeros keeps its weight.
        identity = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)
        root = torch.where(mean_square > 0, root / mean_square.sqrt(), identity)
    groups, n, _ = root.shape
    # MPS has no float64, and cannot cast on the way.
    rows = weight.cpu().to(root).reshape(groups, -1, n)
    whitened: Tensor = rows @ root
    return whitened.reshape(weight.shape).to(weight)
