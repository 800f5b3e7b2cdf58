"""Finds the parameters that a layer's weight consists of, or is computed from."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def weight_parameters(layer: nn.Module | None) -> list[nn.Parameter]:
    """Return the trainable parameters of the weight of `layer`: itself, or those behind a weight norm or a mask."""
    parameters: list[nn.Parameter] = []
    if layer is None:
        return parameters
    for name, parameter in layer.named_parameters():
        is_bias = name.startswith("bias") or ".bias" in name
        if parameter.requires_grad and not is_bias:
            parameters.append(parameter)
    return parameters


def mask_of(layer: nn.Module) -> str:
    """Return the name of a buffer that seems to mask entries of the weight of `layer`, or ""; this may wait.

    One that hides whole rows does no harm, since TrAct mixes the entries of a row.
    """
    shapes = [parameter.shape for parameter in weight_parameters(layer)]
    for name, buffer in layer.named_buffers():
        if buffer.dim() < 2 or buffer.shape not in shapes:
            continue
        rows = buffer.flatten(1)
        is_cut = (rows == 0).any(1) & (rows == 1).any(1)
        is_mask = (rows == 0) | (rows == 1)
        if bool(is_mask.all() & is_cut.any()):
            return name
    return ""


def weight_like(layer: nn.Module) -> Tensor:
    """Return a tensor of the weight's device and dtype.

    The weight itself is not read: computing it, where it is parametrized, may change buffers.
    """
    tensor: Tensor = next(layer.parameters(), layer.__dict__.get("weight"))  # type: ignore[assignment]
    return tensor


def is_frozen(layer: nn.Module) -> bool:
    """Return whether no parameter of the weight of `layer` requires a gradient."""
    if weight_parameters(layer):
        return False
    # FSDP1 may have replaced the parameter by a view of its own.
    weight = layer.weight
    return not (isinstance(weight, Tensor) and weight.requires_grad)


def is_weight_of(layer: nn.Module, weight: Any) -> bool:
    """Return whether an operation inside of `layer` has its weight, or a computed one, and no other tensor of it."""
    for module in layer.modules():
        # Replicas of DataParallel's have plain tensors among their attributes.
        for tensors in (module._parameters, module._buffers, module.__dict__):
            for name, tensor in tensors.items():
                if tensor is weight:
                    return module is layer and name == "weight"
    return not isinstance(weight, nn.Parameter)
