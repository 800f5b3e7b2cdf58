"""What autograd is asked for in a pass: a second derivative, a gradient that is returned and not added to `.grad`."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from hf_tract.precondition import DampedInverse

_call_numbers = itertools.count()


class ForwardCall:
    """What autograd's node and the operation's output share of one forward call."""

    def __init__(self) -> None:
        self.number = next(_call_numbers)
        self.task = torch._C._current_graph_task_id()  # a reentrant checkpoint runs a forward inside of a backward
        self.handed_on_differentiably = False
        self.output_grad: Tensor | None = None
        self._second_order = False

    def keep_output_grad(self, grad: Tensor) -> None:
        """Keeps the output's gradient for the weight's, unless the weight's has second-order parts too."""
        self._second_order = self._second_order or torch.is_grad_enabled()
        self.output_grad = None if self._second_order else grad


class LinearInGrad(torch.autograd.Function):
    """A gradient that was handed on, as a linear function of the ordinary one; what C depends on is left out."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, handed_on: list[Tensor], inverse: DampedInverse) -> Tensor:
        """Returns the one entry of `handed_on`, which was made of `grad` by `inverse`."""
        ctx.inverse = inverse
        return handed_on[0]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None, None]:
        """Returns v inv(C + lam I): the matrix is symmetric."""
        with torch.no_grad():
            out = ctx.inverse(v.to(torch.promote_types(v.dtype, torch.float32))).to(v.dtype)
        if torch.is_grad_enabled() and v.requires_grad:
            return LinearInGrad.apply(v, [out], ctx.inverse), None, None
        return out, None, None


def adds_to_grad(node: Any) -> bool:
    """Says whether the running pass adds to the `.grad` of the leaf behind `node`.

    `torch.autograd.grad` returns a gradient instead. Of what is no leaf it is assumed.
    """
    if node is None or node.name() != "torch::autograd::AccumulateGrad":
        return True
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # how the engine says that it was asked for this leaf by `torch.autograd.grad`
        return False
