"""What autograd is asked for in a pass: a second derivative, a gradient that is returned and not added to `.grad`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
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
        self.leaf = weight if weight.is_leaf else None  # the parameter itself, also one that `functional_call` put there
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


class LinearInGrad(torch.autograd.Function):
    """A gradient that was handed on, as a linear function of the ordinary one; what C depends on is left out."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, handed_on: list[Tensor], step: Any) -> Tensor:
        """Returns the one entry of `handed_on`, which is made of `grad` in `step`."""
        ctx.step = step
        return handed_on[0]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None, None]:
        """Returns v inv(C + lam I), by the C that the pass ended with: the matrix is symmetric."""
        with torch.no_grad():
            out = ctx.step.inverse(v.to(torch.promote_types(v.dtype, torch.float32))).to(v.dtype)
        if torch.is_grad_enabled() and v.requires_grad:
            return LinearInGrad.apply(v, [out], ctx.step), None, None
        return out, None, None


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
