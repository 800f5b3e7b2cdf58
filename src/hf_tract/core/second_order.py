"""Passes whose gradients are differentiated again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
