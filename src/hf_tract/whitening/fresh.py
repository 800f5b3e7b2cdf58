"""Decides whether a layer's weights are fresh: not loaded, not trained and not whitened before."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hf_tract.config import TrActError
from hf_tract.core.patches import groups_of, out_features, patch_size
from hf_tract.core.sharding import gathered_weights, read_weight
from hf_tract.discovery.first_layer import FirstLayer
from hf_tract.discovery.wrappers import unwrap

# How many times the spread of a weight's spectrum may exceed that of independent entries.
MAX_SPREAD_RATIO = 2.0
# Weight norm (the old one), spectral norm and pruning compute the weight from these parameters in a hook.
COMPUTED_WEIGHTS = ("weight_g", "weight_orig")
# The attribute that holds the digest of a layer's weight before whitening; in `__dict__`, so that copies have it.
_WHITENED = "_tract_whitened"


def check_fresh(model: nn.Module, layer: FirstLayer, weight: Tensor, force: bool = False) -> None:
    """Raise an error where the weight of a layer cannot be whitened, or should not be.

    Args:
        model: wrapped or not.
        layer: one of its layers.
        weight: the whole weight of the layer, even if `model` is sharded.
        force: accept weights that are not fresh.

    Raises:
        TrActError: for weights that a hook computes, and without `force` for those that are not fresh.
    """
    module = layer.module
    subject = f"`model` has a first layer ({layer.name})"
    for name in COMPUTED_WEIGHTS:
        if hasattr(module, name):
            raise TrActError(
                f"{subject} whose weight a hook computes from `{name}`: whiten "
                "it before it is pruned, or use "
                "torch.nn.utils.parametrizations for a norm."
            )
    if force:
        return
    problem = _problem_with(unwrap(model), module, weight)
    if problem:
        raise TrActError(
            f"{subject} that {problem}: a whitened start is for training from "
            "scratch. `whiten_first_layer(..., force=True)` does it all the "
            "same."
        )


def were_whitened(model: nn.Module, layers: Iterable[nn.Module]) -> bool:
    """Return whether all these layers of `model` were whitened and have not been reset to their fresh weights."""
    layers = list(layers)
    with gathered_weights(model, layers):
        return all(_was_whitened(layer, read_weight(layer)) for layer in layers)


def mark_as_whitened(layer: nn.Module, fresh: Tensor | None = None) -> None:
    """Mark a layer as whitened.

    Args:
        layer: the layer.
        fresh: the weight that was whitened; None where it is unknown, as in a run that resumes from a checkpoint.
    """
    if fresh is not None:
        layer.__dict__[_WHITENED] = _digest(fresh)
    else:
        layer.__dict__.setdefault(_WHITENED, "")


def were_loaded(parameters: Iterable[Any]) -> bool:
    """Return whether transformers loaded any of these parameters from a checkpoint."""
    return any(getattr(parameter, "_is_hf_initialized", False) for parameter in parameters)


def checkpoint_name(model: nn.Module) -> str:
    """Return the checkpoint that the config of `model` names, or "".

    The name alone proves nothing: `from_config` with the config of a checkpoint draws random weights.
    """
    config = getattr(model, "config", None)
    return getattr(config, "_name_or_path", "") or ""


def _problem_with(model: nn.Module, layer: nn.Module, weight: Tensor) -> str:
    """Return why a weight is not fresh, or "" if it is."""
    if _was_whitened(layer, weight):
        return "was whitened before"
    if were_loaded([layer.weight]):
        # The config of a module that holds a loaded model names nothing.
        return f"comes from {checkpoint_name(model) or 'a checkpoint'}"
    return _trained(layer, weight)


def _was_whitened(layer: nn.Module, weight: Tensor) -> bool:
    before: str | None = layer.__dict__.get(_WHITENED)
    # Equal digests mean that the fresh weights were loaded again.
    return before is not None and before != _digest(weight)


def _digest(weight: Tensor) -> str:
    data = weight.cpu().flatten().view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()


def _trained(layer: nn.Module, weight: Tensor) -> str:
    """Return why a weight looks trained, or "" if it does not.

    Training makes rows prefer some directions. The spread n tr(S^2) / tr(S)^2 of the eigenvalues of S = W^T W is 1
    where they are equal; for m rows of n independent entries it is 1 + n / m, by Marchenko and Pastur.
    """
    groups = groups_of(layer)
    m = out_features(layer) // groups
    n = patch_size(layer)
    # MPS has no float64.
    rows = weight.cpu().double().reshape(groups, m, n)
    if not rows.any():
        return "is all zeros"
    gram = rows.mT @ rows
    trace = gram.diagonal(dim1=1, dim2=2).sum(1)
    trace_of_square = gram.square().sum((1, 2))
    spread = float((n * trace_of_square / trace.square()).max())
    fresh_spread = 1 + n / m
    if spread < MAX_SPREAD_RATIO * fresh_spread:
        return ""
    return f"looks trained (the spread of its spectrum is {spread:.1f}, of a fresh one {fresh_spread:.1f})"
