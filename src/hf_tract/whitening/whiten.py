"""A whitened start: the first layer begins as W0 (C + lam I)^-1/2, for training from scratch.

Shape letters as in `moments`: g groups, m rows of the weight, n columns of `weight.flatten(1)`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hf_tract.config import TrActConfig, TrActError
from hf_tract.core.patches import out_features, patch_size
from hf_tract.core.sharding import gathered_weights, read_weight, write_weight
from hf_tract.discovery.first_layer import FirstLayer, LayerSelection, find_first_layers
from hf_tract.discovery.wrappers import unwrap
from hf_tract.whitening.batches import to_model_inputs
from hf_tract.whitening.fresh import checkpoint_of
from hf_tract.whitening.moments import moments_over

MAX_SPREAD_RATIO = 2.0  # how far the spectrum of fresh weights may be from that of independent entries
_WHITENED = "_tract_whitened"  # in a layer's `__dict__`, so that copies have it: the digest of its fresh weight
COMPUTED_WEIGHTS = (
    "weight_g",
    "weight_orig",
)  # from which weight norm, spectral norm and pruning make the weight in a hook


def whiten_first_layer(
    model: nn.Module,
    batches: Any,
    lam: float = 0.1,
    layers: LayerSelection = "auto",
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
        batches: what training feeds it, augmented and normalised: one batch (pixels as a tensor, or a mapping of keyword
            arguments) or a few, which may be lists of images too; or a `DataLoader`, of which the first four are taken. Of a
            tuple such as (pixels, labels) the first entry counts, of a layer that one forward calls twice the first call.
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
            rows prefer some directions) or are computed by a hook (pruning, the old weight norm); for batches that are no
            pixels or in which nothing reaches the layer, and for a `lam` that is not positive. The model is left as it was.

    Source:
        docs/beyond.md, equation 2.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 4, 4), nn.Flatten(), nn.Linear(1024, 10))
        >>> whiten_first_layer(model, torch.randn(8, 3, 16, 16).cumsum(-1))[0].name
        '0'
    """
    lam = TrActConfig(lam=lam).lam  # checked
    each = to_model_inputs(batches, unwrap(model))
    found = find_first_layers(model, layers, each[0] if each else None)
    modules = [layer.module for layer in found]
    with gathered_weights(model, modules):
        fresh = [read_weight(module).clone() for module in modules]
    for layer, weight in zip(found, fresh, strict=True):
        _check(model, layer, weight, force)
    moments = moments_over(model, each, found, process_group)
    with gathered_weights(model, modules):
        for module, weight, moment in zip(modules, fresh, moments, strict=True):
            root = _inverse_root(moment, lam, match_scale)
            flat = weight.to(root).reshape(len(root), -1, root.shape[-1])
            write_weight(module, (flat @ root).reshape(weight.shape).to(weight))
            module.__dict__[_WHITENED] = _digest(weight)
    return found


def were_whitened(model: nn.Module, layers: Iterable[nn.Module]) -> bool:
    """Whether these layers of `model` have been whitened, or their copies' originals, and not been reset since."""
    layers = list(layers)
    with gathered_weights(model, layers):
        return all(_is_whitened(layer, read_weight(layer)) for layer in layers)


def mark_as_whitened(layers: Iterable[nn.Module]) -> None:
    """For layers whose whitened weights come from elsewhere, such as a checkpoint that is resumed."""
    for layer in layers:
        layer.__dict__.setdefault(_WHITENED, "")


def _is_whitened(layer: nn.Module, weight: Tensor) -> bool:
    fresh: str | None = layer.__dict__.get(_WHITENED)
    return fresh is not None and fresh != _digest(weight)


def _digest(weight: Tensor) -> str:
    return hashlib.sha256(weight.cpu().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def _check(model: nn.Module, layer: FirstLayer, weight: Tensor, force: bool) -> None:
    module = layer.module
    if derived := next((name for name in COMPUTED_WEIGHTS if hasattr(module, name)), None):
        raise TrActError(
            f"`model` has a first layer ({layer.name}) whose weight a hook computes from `{derived}`: whiten it before it is "
            f"pruned, or use torch.nn.utils.parametrizations for a norm."
        )
    source = checkpoint_of(unwrap(model), [module.weight])  # type: ignore[list-item]
    known = "was whitened before" if _is_whitened(module, weight) else f"comes from {source}" if source else ""
    why = known or _trained(module, weight)
    if why and not force:
        raise TrActError(
            f"`model` has a first layer ({layer.name}) that {why}: a whitened start is for training from scratch. "
            f"`whiten_first_layer(..., force=True)` does it all the same."
        )


def _trained(layer: nn.Module, weight: Tensor) -> str:
    """What speaks against fresh weights: the spread of the eigenvalues of W^T W is not that of independent entries."""
    m, n, groups = out_features(layer), patch_size(layer), getattr(layer, "groups", 1)
    flat = weight.double().reshape(groups, m // groups, n)
    if not flat.any():
        return "is all zeros"
    gram = flat.mT @ flat
    # 1 for equal eigenvalues; for independent entries 1 + n / m, by Marchenko and Pastur.
    spread = float((n * gram.square().sum((1, 2)) / gram.diagonal(dim1=1, dim2=2).sum(1).square()).max())
    fresh = 1 + n * groups / m
    return (
        ""
        if spread < MAX_SPREAD_RATIO * fresh
        else f"looks trained (the spread of its spectrum is {spread:.1f}, of a fresh one {fresh:.1f})"
    )


def _inverse_root(moment: Tensor, lam: float, match_scale: bool) -> Tensor:
    """(C + lam I)^-1/2, (g, n, n), float64; scaled so that the trace of root C root is n, if asked for."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp(min=0)
    root: Tensor = (vectors * (values + lam).rsqrt().unsqueeze(-2)) @ vectors.mT
    if match_scale:
        share = (values / (values + lam)).mean(-1).view(-1, 1, 1)
        white = torch.eye(root.shape[-1], dtype=root.dtype)
        root = torch.where(
            share > 0, root / share.sqrt(), white
        )  # a group that reads nothing but zeros stays as it is
    return root
