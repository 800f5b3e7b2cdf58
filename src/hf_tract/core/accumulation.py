"""Determines, by `.grad` and by training engines, whether a new optimizer step has begun, and which ranks share it."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_tract.core.moments import PatchSums
from hf_tract.core.solve import on_host, widest_dtype

# Attributes of a DTensor, and of parameters under FSDP1, ZeRO-3 and the other stages of ZeRO.
ENGINE_ATTRIBUTES = ("full_tensor", "_fsdp_flattened", "ds_id", "_hp_mapping")


def lives_in_grad(parameters: Sequence[Tensor]) -> bool:
    """Return whether `.grad` of these parameters holds the gradient that has been accumulated.

    It does not where an engine keeps gradients elsewhere: FSDP1, FSDP2 and ZeRO, whose stages 1 and 2 empty `.grad`
    after each micro-step.
    """
    return len(parameters) > 0 and not has_engine(parameters)


def has_engine(parameters: Sequence[Tensor]) -> bool:
    """Return whether an engine keeps the gradients of these parameters, which do not show it in its backward."""
    names = itertools.product(parameters, ENGINE_ATTRIBUTES)
    return any(hasattr(parameter, name) for parameter, name in names)


class SeenGrads:
    """Remembers which tensors `.grad` of some parameters held, to tell when it holds others."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        # A reference to a parameter would keep it alive, and a weak one would keep `model.to` from swapping tensors.
        self._grads = {}
        for parameter in parameters:
            if parameter.grad is not None:
                self._grads[id(parameter)] = parameter.grad

    def were_replaced(self, parameters: Sequence[Tensor]) -> bool:
        """Return whether one of these parameters has another gradient by now, or none."""
        for parameter in parameters:
            seen = self._grads.get(id(parameter))
            if seen is not None and parameter.grad is not seen:
                return True
        return False


def was_emptied(parameters: Sequence[Tensor]) -> bool:
    """Return whether `.grad` is empty as far as the host can see: values on an accelerator are not checked."""
    return all(on_host(grad) and not grad.any() for grad in _grads(parameters))


def holds_gradient(parameters: Sequence[Tensor]) -> Tensor | None:
    """Return whether `.grad` holds more than zeros, as a tensor on its device; None if the host knows without it.

    This is for parameters whose `.grad` holds what has been accumulated.
    """
    grads = _grads(parameters)
    if all(on_host(grad) for grad in grads):
        return None
    device = grads[0].device
    return torch.stack([grad.any().to(device) for grad in grads]).any()


def has_grad(parameters: Sequence[Tensor]) -> bool:
    """Return whether `.grad` of any of these is a tensor, zeros or not."""
    return len(_grads(parameters)) > 0


def _grads(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def adds_to_grad(parameters: Sequence[Tensor]) -> bool:
    """Return whether the running backward pass adds to `.grad` of any of these; `torch.autograd.grad` does not."""
    if torch._C._current_graph_task_id() < 0:
        return True
    return any(_is_accumulated(parameter) for parameter in parameters)


def _is_accumulated(parameter: Tensor) -> bool:
    if not parameter.requires_grad:  # frozen since the forward
        return False
    node = torch.autograd.graph.get_gradient_edge(parameter).node
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:
        # The engine raises this where `torch.autograd.grad` asks for the gradient of this leaf.
        return False


def engine_accumulates() -> bool:
    """Return whether accelerate is in a micro-step that is not the last one; its state is not changed."""
    state = sys.modules.get("accelerate.state")
    if state is None or not state.GradientState._shared_state:
        return False
    return not state.GradientState().sync_gradients


def ranks_of(group: Any) -> int:
    """Return how many ranks share second moments: one without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size(group)
    return 1


def sum_over_ranks(mine: PatchSums, group: Any) -> PatchSums:
    """Return the sums and counts added up over all ranks, by one all-reduce.

    It is in float64 if the device has that, since each rank chooses a precision by its own patches.
    """
    if ranks_of(group) == 1:
        return mine
    sums, count = mine
    assert isinstance(count, int)
    dtype = widest_dtype(sums.device)
    total = torch.cat([sums.flatten().to(dtype), sums.new_full((1,), count, dtype=dtype)])
    dist.all_reduce(total, group=group)
    if on_host(total):
        return PatchSums(total[:-1].view_as(sums), int(total[-1]))
    return PatchSums(total[:-1].view_as(sums), total[-1])
