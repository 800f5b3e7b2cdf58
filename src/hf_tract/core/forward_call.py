"""One forward call of a layer, as its later backward knows it."""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_numbers = itertools.count()
CALLS: WeakValueDictionary[int, ForwardCall] = WeakValueDictionary()


class ForwardCall:
    """What autograd's node, the operation's output and the preconditioner share of one forward call."""

    def __init__(self, weight: Tensor) -> None:
        """Begins with the weight that the operation is about to read."""
        self.number = next(_numbers)
        self.task = torch._C._current_graph_task_id()  # a reentrant checkpoint runs a forward inside of a backward
        self.leaf = (
            weight if weight.is_leaf else None
        )  # the parameter itself, also one that `functional_call` put there
        self.handed_on_differentiably = False
        self.output_grad: Tensor | None = None
        self._second_order = False
        CALLS[self.number] = self

    def keep_output_grad(self, grad: Tensor) -> None:
        """Keeps the output's gradient for the weight's, unless the weight's has second-order parts too."""
        self._second_order = self._second_order or torch.is_grad_enabled()
        self.output_grad = None if self._second_order else grad


class KeepOutputGrad(torch.autograd.Function):
    """Identity on a 16-bit operation's output that keeps its gradient, after all hooks that users put on the output."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, call: ForwardCall) -> Tensor:
        """Returns `out` itself, so that an activation may work on it in place."""
        ctx.mark_dirty(out)
        ctx.call = call
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Returns `grad`."""
        ctx.call.keep_output_grad(grad)
        return grad, None
