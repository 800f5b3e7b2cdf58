"""Which parameters make a layer's weight."""

from __future__ import annotations

from torch import Tensor, nn


def weight_parameters(layer: nn.Module | None) -> list[nn.Parameter]:
    """Returns the trainable parameters that make the weight of `layer`: one, or those of a norm or a mask."""
    if layer is None:
        return []
    return [
        parameter
        for name, parameter in layer.named_parameters()
        if parameter.requires_grad and not any(part.startswith("bias") for part in name.split("."))
    ]


def weight_like(layer: nn.Module) -> Tensor:
    """Returns a tensor of the weight's device and dtype; to read a computed weight may change buffers, as spectral norm's."""
    tensor: Tensor = next(layer.parameters(), layer.__dict__.get("weight"))  # type: ignore[assignment]
    return tensor


def is_frozen(layer: nn.Module) -> bool:
    """Says whether nothing that the weight of `layer` is made of can be trained."""
    if weight_parameters(layer):
        return False
    weight = layer.weight  # FSDP1 may have replaced the parameter by a view of its own
    return not (isinstance(weight, Tensor) and weight.requires_grad)
