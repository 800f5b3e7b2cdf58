"""What `.grad` and the engines tell of an optimizer step: whether it has begun anew, and who else adds to it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_tract.core.solve import on_host

# Of a DTensor, of FSDP1's original parameters, of ZeRO-3's parameters and of those of the other stages.
ENGINE_ATTRIBUTES = ("full_tensor", "_fsdp_flattened", "ds_id", "_hp_mapping")


def lives_in_grad(parameters: Sequence[nn.Parameter]) -> bool:
    """Says whether `.grad` of these parameters tells what has been accumulated.

    It does not where an engine keeps gradients elsewhere: FSDP1, FSDP2 and ZeRO, whose stages 1 and 2 empty `.grad` after
    each micro-step.
    """
    return bool(parameters) and not any(hasattr(each, name) for each in parameters for name in ENGINE_ATTRIBUTES)


def was_emptied(parameters: Sequence[nn.Parameter]) -> bool:
    """Says whether `.grad` holds nothing, as far as the host can see: zeros on a device are not looked at."""
    return not any(not on_host(grad) or bool(grad.any()) for grad in _grads(parameters))


def holds_gradient(parameters: Sequence[nn.Parameter]) -> Tensor | None:
    """Returns whether `.grad` holds more than zeros, told on its device; None where the host has seen that it does."""
    grads = _grads(parameters)
    if not lives_in_grad(parameters) or all(on_host(grad) for grad in grads):
        return None
    return torch.stack([grad.any().to(grads[0].device) for grad in grads]).any()


def _grads(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def adds_to_grad(parameters: Sequence[Tensor]) -> bool:
    """Says whether the running pass adds to the `.grad` of any of `parameters`.

    `torch.autograd.grad` returns gradients instead.
    """
    if torch._C._current_graph_task_id() < 0:
        return True
    return any(_is_accumulated(parameter) for parameter in parameters)


def _is_accumulated(parameter: Tensor) -> bool:
    node = torch.autograd.graph.get_gradient_edge(parameter).node
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # how the engine says that `torch.autograd.grad` asks for this leaf
        return False


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
