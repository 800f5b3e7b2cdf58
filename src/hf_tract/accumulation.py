"""What `.grad` and the engines tell of an optimizer step: whether it has begun anew, and who else adds to it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Of a DTensor, of FSDP1's original parameters, of ZeRO-3's parameters and of those of the other stages.
ENGINE_ATTRIBUTES = ("full_tensor", "_fsdp_flattened", "ds_id", "_hp_mapping")


def weight_parameters(layer: nn.Module | None) -> list[nn.Parameter]:
    """Returns the trainable parameters that make the weight of `layer`: one, or those of a norm or a mask."""
    if layer is None:
        return []
    return [
        parameter
        for name, parameter in layer.named_parameters()
        if parameter.requires_grad and not any(part.startswith("bias") for part in name.split("."))
    ]


def lives_in_grad(parameters: Sequence[nn.Parameter]) -> bool:
    """Says whether `.grad` of these parameters tells what has been accumulated.

    It does not where an engine keeps gradients elsewhere: FSDP1, FSDP2 and ZeRO, whose stages 1 and 2 empty `.grad` after
    each micro-step.
    """
    return bool(parameters) and not any(hasattr(each, name) for each in parameters for name in ENGINE_ATTRIBUTES)


def was_emptied(parameters: Sequence[nn.Parameter]) -> bool:
    """Says whether `.grad` holds nothing, as far as the host can see: zeros on a device are not looked at."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return not any(not on_host(grad) or bool(grad.any()) for grad in grads)


def holds_gradient(parameters: Sequence[nn.Parameter]) -> Tensor | None:
    """Returns whether `.grad` holds more than zeros, told on its device; None where the host has seen that it does."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not lives_in_grad(parameters) or all(on_host(grad) for grad in grads):
        return None
    return torch.stack([grad.any().to(grads[0].device) for grad in grads]).any()


def on_host(tensor: Tensor) -> bool:
    """Says whether looking at a value costs nothing."""
    return tensor.is_cpu


def engine_accumulates() -> bool:
    """Says whether accelerate is in a micro-step that is not the last one; its state is only read."""
    state = sys.modules.get("accelerate.state")
    if state is None or not state.GradientState._shared_state:
        return False
    return not state.GradientState().sync_gradients


def ranks_of(group: Any) -> int:
    """Returns how many ranks share second moments: one without a process group."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(sums: Tensor, group: Any) -> Tensor:
    """Adds up the sums of all ranks, in one precision: each has chosen its own by its own patches."""
    if ranks_of(group) == 1:
        return sums
    sums = sums.double()
    dist.all_reduce(sums, group=group)
    return sums
