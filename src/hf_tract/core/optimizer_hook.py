"""Calls functions after every step of any optimizer of torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


@functools.cache
def call_after_steps(listener: Callable[[Optimizer], None]) -> None:
    """Call `listener` after optimizer steps from now on, but for compiled ones; a second call does nothing.

    torch cannot remove such a hook from inside itself, so it stays.
    """

    def hook(optimizer: Optimizer, *_: Any) -> None:
        # A graph break here would cut a compiled optimizer in two.
        if not torch.compiler.is_compiling():
            listener(optimizer)

    register_optimizer_step_post_hook(hook)


def updated_by(optimizer: Optimizer, parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return those of the parameters that `optimizer` updates."""
    held: set[int] = set()
    for group in optimizer.param_groups:
        held.update(map(id, group["params"]))
    return [parameter for parameter in parameters if id(parameter) in held]


def has_gradients(parameters: Iterable[Tensor]) -> bool:
    """Return whether `.grad` of a parameter holds anything but zeros, as far as this rank sees it."""
    for parameter in parameters:
        if parameter.grad is None:
            continue
        # A DTensor's own `any` would be a collective.
        grad = getattr(parameter.grad, "_local_tensor", parameter.grad)
        # Meta, fake and sparse tensors cannot be asked.
        can_be_asked = type(grad) is Tensor and not grad.is_meta and not grad.is_sparse
        if not can_be_asked or grad.any():
            return True
    return False
