"""The weight's gradient of a 16-bit operation in a compiled graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_tract.core.ops import UNTRACKED, precondition
from hf_tract.core.patches import PatchSpec


class PreconditionFromOutput(torch.autograd.Function):
    """Identity on a 16-bit operation's output whose backward also gives the weight its gradient.

    For compiled graphs, which have no second derivative and share no `ForwardCall`: the operation itself reads a weight
    without a gradient.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, weight: Tensor, x: Tensor, key: int, spec: PatchSpec) -> Tensor:
        """Returns the values of `out`; the other arguments are those of `PreconditionWeightGrad`."""
        ctx.save_for_backward(x)
        ctx.key, ctx.spec, ctx.shape, ctx.dtype = key, spec, weight.shape, weight.dtype
        return out.clone()  # a view could not be changed in place; the compiler merges the copy with what follows

    @staticmethod
    def backward(ctx: Any, output_grad: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the output's gradient, and the weight's."""
        (x,) = ctx.saved_tensors
        like = output_grad.new_zeros(ctx.shape, dtype=torch.float32)
        out = precondition(like, x, output_grad, ctx.key, UNTRACKED, *ctx.spec)
        return output_grad, out.to(ctx.dtype), None, None, None
