"""Holds the autograd functions around a layer's operation: identities whose backward preconditions.

`PreconditionWeightGrad` is applied to the weight. A 16-bit operation reads the detached weight instead, so that it
does not compute a rounded gradient that nobody uses, and `PreconditionFromOutput` computes the gradient from the
output's. If the input of such an operation requires a gradient, second derivatives need how that depends on the
weight; then the operation reads the weight by `PreconditionWeightGrad`, and `KeepOutputGrad` is applied to the output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_tract.core.notices import warn_once
from hf_tract.core.ops import precondition, precondition_eagerly, without_autocast
from hf_tract.core.patches import PatchSpec
from hf_tract.core.preconditioner import LayerPreconditioner
from hf_tract.core.step import ForwardCall, Step
from hf_tract.core.weight_grad import differentiable_weight_grad

# Stands for the number of a forward call in a compiled graph, whose runs cannot be told apart.
UNTRACKED = -1
BATCHED = (
    "TrAct: in several backwards at once (`is_grads_batched`, vmap) "
    "the first layer has its ordinary gradient. "
    "Run one backward at a time for a preconditioned one."
)


class PreconditionWeightGrad(torch.autograd.Function):
    """Returns a layer's weight unchanged; its backward returns the preconditioned gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor, key: int, call: ForwardCall | None, spec: PatchSpec) -> Tensor:
        """Return `weight`.

        Args:
            ctx: the context of autograd.
            weight: the weight that the operation reads, (m, ...).
            x: the operation's input, detached.
            key: the number of the layer's preconditioner.
            call: the forward call; None in a compiled graph.
            spec: the patches that the operation reads from `x`.
        """
        ctx.save_for_backward(x)
        ctx.key = key
        ctx.call = call
        ctx.spec = spec
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the preconditioned gradient of the weight."""
        (x,) = ctx.saved_tensors
        if _is_compiled(ctx):
            out = precondition(grad, x, None, ctx.key, _number_of(ctx.call), *ctx.spec)
        else:
            out = _eager_backward(ctx, grad, x)
        return out, None, None, None, None


def _is_compiled(ctx: Any) -> bool:
    """Return whether this backward is in a compiled graph, by its forward or by compiled autograd."""
    return ctx.call is None or torch.compiler.is_compiling()


def _is_batched(grad: Tensor) -> bool:
    """Return whether this holds the gradients of several backwards that run at once."""
    functorch = torch._C._functorch
    if functorch.is_legacy_batchedtensor(grad):
        return True
    is_batched: bool = functorch.is_batchedtensor(grad)
    return is_batched


def _number_of(call: ForwardCall | None) -> int:
    if call is None:
        return UNTRACKED
    return call.number


def _eager_backward(ctx: Any, grad: Tensor, x: Tensor) -> Any:
    call: ForwardCall = ctx.call
    preconditioner: LayerPreconditioner = call.preconditioner
    if not preconditioner.active:
        return grad
    if _is_batched(grad):
        warn_once(preconditioner.warned, BATCHED)
        return grad
    if call.was_differentiated:
        # This pass differentiates a preconditioned gradient: `grad` is exact, and is not preconditioned again.
        warn_once(
            preconditioner.warned,
            "TrAct: a backward runs again over a forward whose weight gradient was taken with `create_graph=True`. "
            "What it gives the first layer is the exact derivative of that preconditioned gradient (C held fixed), "
            "and is not preconditioned again. "
            "If the loss itself shares this forward, give it a forward of its own.",
        )
        return grad
    output_grad = call.output_grad
    call.output_grad = None
    call.creates_graph = torch.is_grad_enabled()
    with torch.no_grad():
        out = _operator_for(x)(grad, x, output_grad, ctx.key, call.number, *ctx.spec)
        out = out.to(grad.dtype)
    if torch.is_grad_enabled() and grad.requires_grad:
        call.was_differentiated = True
        return DifferentiablePrecondition.apply(grad, [out], preconditioner.last_step)
    return out


def _operator_for(x: Tensor) -> Callable[..., Tensor]:
    """Return the operator, or its function for an ordinary tensor: that takes less time, and a mode sees inside."""
    if type(x) in (Tensor, nn.Parameter):
        return precondition_eagerly
    # A fake tensor has no values to look at.
    return precondition


class DifferentiablePrecondition(torch.autograd.Function):
    """Returns a preconditioned gradient as a linear function of the ordinary one.

    The derivative of C is left out.
    """

    @staticmethod
    def forward(ctx: Any, grad: Tensor, preconditioned: list[Tensor], step: Step) -> Tensor:
        """Return the one tensor in `preconditioned`, which `step` has computed from `grad`."""
        ctx.step = step
        return preconditioned[0]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None, None]:
        """Return v inv(C + lam I), with the last C of the step; that matrix is its own transpose."""
        with torch.no_grad():
            v_float = v.to(torch.promote_types(v.dtype, torch.float32))
            out = ctx.step.inverse(v_float).to(v.dtype)
        if torch.is_grad_enabled() and v.requires_grad:
            return DifferentiablePrecondition.apply(v, [out], ctx.step), None, None
        return out, None, None


def _same_values(out: Tensor) -> Tensor:
    """Return a tensor that shares the memory of `out` and may be modified in place, as by an activation.

    No convolution or linear operation saves its output. Autograd allows that for no view made in here, unless it is
    detached. To return `out` itself would mark it as modified, and selective checkpoints refuse that.
    """
    return out.detach()


class KeepOutputGrad(torch.autograd.Function):
    """Returns the output of a 16-bit operation unchanged, and keeps the output's gradient, after the user's hooks."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, call: ForwardCall) -> Tensor:
        """Return `out`."""
        ctx.call = call
        return _same_values(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Return `grad`."""
        ctx.call.keep_output_grad(grad)
        return grad, None


class PreconditionFromOutput(torch.autograd.Function):
    """Returns the output of a 16-bit operation unchanged; its backward also returns the weight's gradient.

    The operation itself reads the detached weight.
    """

    @staticmethod
    def forward(  # noqa: PLR0913 an autograd function takes all that it needs
        ctx: Any, out: Tensor, weight: Tensor, x: Tensor, key: int, call: ForwardCall | None, spec: PatchSpec
    ) -> Tensor:
        """Return `out`; the other arguments are those of `PreconditionWeightGrad`."""
        ctx.save_for_backward(x)
        ctx.key = key
        ctx.call = call
        ctx.spec = spec
        ctx.shape = weight.shape
        ctx.dtype = weight.dtype
        if call is None:
            # A compiler cannot return its argument, and fuses this copy with the next operations.
            return out.clone()
        return _same_values(out)

    @staticmethod
    def backward(ctx: Any, output_grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the output's gradient, and the weight's."""
        (x,) = ctx.saved_tensors
        like = output_grad.new_empty(ctx.shape, dtype=torch.float32)
        if _is_compiled(ctx):
            out = precondition(like, x, output_grad, ctx.key, _number_of(ctx.call), *ctx.spec)
        else:
            out = _eager_from_output(ctx, like, x, output_grad)
        return output_grad, out.to(ctx.dtype), None, None, None, None


def _eager_from_output(ctx: Any, like: Tensor, x: Tensor, output_grad: Tensor) -> Any:
    call: ForwardCall = ctx.call
    has_second_order = torch.is_grad_enabled() and output_grad.requires_grad
    if call.was_differentiated or has_second_order or _is_batched(output_grad):
        with without_autocast(x):
            grad = differentiable_weight_grad(x, output_grad, ctx.spec, like)
        return _eager_backward(ctx, grad, x)
    call.creates_graph = torch.is_grad_enabled()
    with torch.no_grad():
        return _operator_for(x)(like, x, output_grad, ctx.key, call.number, *ctx.spec)
