"""A whitened start: the first layer begins as W0 (C + lam I)^-1/2, for training from scratch.

Shape letters as in `moments`: g groups, m rows of the weight, n columns of `weight.flatten(1)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from hf_tract.config import TrActError
from hf_tract.input_moments import input_moments
from hf_tract.layers import FirstLayer, Layers, find_first_layers, unwrap
from hf_tract.sharding import is_sharded, read_weight, whole_weights, write_weight
from hf_tract.tap import columns, rows

ROUND = 2.0  # how far the spectrum of fresh weights may be from that of independent entries
_done: WeakSet[nn.Module] = WeakSet()


def whiten_first_layer(
    model: nn.Module,
    batches: Any,
    lam: float = 0.1,
    layers: Layers = "auto",
    *,
    match_scale: bool = True,
    force: bool = False,
    process_group: Any = None,
) -> list[FirstLayer]:
    """Multiplies the first layer's fresh weight W0 by (C + lam I)^-1/2, so that it starts in the coordinates TrAct learns in.

    C = (1/b) sum of p p^T is taken over all b patches of the batches, on every data-parallel rank, so that each rank comes to
    the same weight. The model's mode, its buffers and the random numbers stay as they are. The model may be wrapped or sharded
    (DDP, FSDP1, FSDP2, ZeRO): each rank then gives as many batches as the others. An optimizer that keeps copies of the
    weights, other than DeepSpeed's, is to be made after it.

    Args:
        model: any model whose first layer has not been trained.
        batches: what training feeds it, augmented and normalised: one batch (a tensor or a mapping of keyword arguments)
            or a few.
        lam: damping, in the units of C's eigenvalues; TrAct's own is a good one.
        layers: as in `apply_tract`.
        match_scale: also scale the weight so that its outputs have the mean square that W0's would have on white input;
            without it lam leaves them smaller, by 2 to 3 for photographs.
        force: whiten weights that look trained too.
        process_group: the data-parallel ranks, the default group where None.

    Returns:
        The layers whose weights were changed.

    Raises:
        TrActError: for a layer that was whitened before, a model from `from_pretrained`, or weights that look trained (their
            rows prefer some directions); for batches in which nothing reaches the layer, and for a `lam` that is not
            positive. The model is left as it was.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 4, 4), nn.Flatten(), nn.Linear(1024, 10))
        >>> whiten_first_layer(model, torch.randn(8, 3, 16, 16).cumsum(-1))[0].name
        '0'
    """
    if not lam > 0:
        raise TrActError(f"`lam` (={lam!r}) must be a positive number, such as TrAct's 0.1.")
    found = find_first_layers(model, layers)
    modules = [layer.module for layer in found]
    with whole_weights(model, modules):
        fresh = [read_weight(module).clone() for module in modules]
    for layer, weight in zip(found, fresh, strict=True):
        _check(model, layer, weight, force)
    each = [batches] if isinstance(batches, (Tensor, Mapping)) else batches
    sharded = is_sharded(model)
    moments = input_moments(model if sharded else unwrap(model), each, found, process_group, whole_forward=sharded)
    with whole_weights(model, modules):
        for module, weight, moment in zip(modules, fresh, moments, strict=True):
            root = _inverse_root(moment, lam, match_scale)
            flat = weight.to(root).reshape(len(root), -1, root.shape[-1])
            write_weight(module, (flat @ root).reshape(weight.shape).to(weight))
    _done.update(modules)
    return found


def is_whitened(layer: nn.Module) -> bool:
    """Whether `whiten_first_layer` has changed it, in this process."""
    return layer in _done


def _check(model: nn.Module, layer: FirstLayer, weight: Tensor, force: bool) -> None:
    source = getattr(unwrap(model), "name_or_path", "")
    known = "was whitened before" if is_whitened(layer.module) else f"comes from {source}" if source else ""
    why = known or _trained(layer.module, weight)
    if why and not force:
        raise TrActError(
            f"`model` has a first layer ({layer.name}) that {why}: a whitened start is for training from scratch. "
            f"`force=True` does it all the same."
        )


def _trained(layer: nn.Module, weight: Tensor) -> str:
    """What speaks against fresh weights: the spread of the eigenvalues of W^T W is not that of independent entries."""
    m, n, groups = rows(layer), columns(layer), getattr(layer, "groups", 1)
    flat = weight.double().reshape(groups, m // groups, n)
    gram = flat.mT @ flat
    # 1 for equal eigenvalues; for independent entries 1 + n / m, by Marchenko and Pastur.
    spread = float((n * gram.square().sum((1, 2)) / gram.diagonal(dim1=1, dim2=2).sum(1).square()).max())
    fresh = 1 + n * groups / m
    return (
        ""
        if spread < ROUND * fresh
        else f"looks trained (the spread of its spectrum is {spread:.1f}, of a fresh one {fresh:.1f})"
    )


def _inverse_root(moment: Tensor, lam: float, match_scale: bool) -> Tensor:
    """(C + lam I)^-1/2, (g, n, n), float64; scaled so that the trace of root C root is n, if asked for."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp(min=0)
    root: Tensor = (vectors * (values + lam).rsqrt().unsqueeze(-2)) @ vectors.mT
    if match_scale:
        share = (values / (values + lam)).mean(-1)
        root = root / share.sqrt().view(-1, 1, 1)
    return root
