"""Runs a layer's operation, so that the gradient of its weight is preconditioned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils._expanded_weights.expanded_weights_impl import ExpandedWeight

from hf_tract.core.autograd import KeepOutputGrad, PreconditionFromOutput, PreconditionWeightGrad
from hf_tract.core.notices import warn_once
from hf_tract.core.ops import has_autocast
from hf_tract.core.patches import PATCH_OPS
from hf_tract.core.per_example import is_per_example
from hf_tract.core.preconditioner import LayerPreconditioner
from hf_tract.core.step import ForwardCall

_warned: set[str] = set()
NESTED = (
    "TrAct: for nested tensors the first layer has its ordinary gradient. Give it their values, or a padded tensor."
)
TRANSFORMED = (
    "TrAct: inside of torch.func's transforms (grad, vmap, vjp, ...) and of "
    "forward-mode differentiation the first layer has its ordinary gradient. "
    "Use a backward of torch.autograd for a preconditioned one."
)
PER_EXAMPLE = (
    "TrAct: where gradients are taken example by example, as Opacus does "
    "for differential privacy, the first layer has its ordinary gradient, "
    "since C would tell of pixels without noise."
)


def run_preconditioned(
    preconditioner: LayerPreconditioner | None,
    op: Callable[..., Tensor],
    input: Any,
    weight: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Return `op(input, weight, *args, **kwargs)`, and have the weight's gradient preconditioned where TrAct acts.

    Args:
        preconditioner: that of the layer that the weight belongs to; None to run the operation alone.
        op: one of `PATCH_OPS`.
        input: the input of `op`.
        weight: the weight of `op`.
        args: further arguments of `op`.
        kwargs: further arguments of `op`.
    """
    if preconditioner is None or not _acts(preconditioner, weight, input):
        return op(input, weight, *args, **kwargs)
    spec = PATCH_OPS[op](input, weight, *args, **kwargs)
    read = _as_autocast_reads(input)

    def run_with(weight: Tensor) -> Tensor:
        return op(read, weight, *args, **kwargs)

    x = read.detach()
    key = preconditioner.key
    # A compiled graph has no second derivatives, and shares no objects with Python.
    call = None
    if not torch.compiler.is_compiling():
        is_given = preconditioner.steps.has_as_parameter(weight)
        call = ForwardCall(weight, preconditioner, is_given)
    if _is_16_bit(x) and (call is None or not read.requires_grad):
        out = run_with(weight.detach())
        return PreconditionFromOutput.apply(out, weight, x, key, call, spec)
    out = run_with(PreconditionWeightGrad.apply(weight, x, key, call, spec))
    if _is_16_bit(x):
        return KeepOutputGrad.apply(out, call)
    return out


def is_preconditioned(weight: Any) -> bool:
    """Return whether `weight` comes out of `run_preconditioned` of another layer, as far as eager code shows it."""
    if torch.compiler.is_compiling():
        return False
    return isinstance(getattr(weight, "grad_fn", None), PreconditionWeightGrad._backward_cls)


def _acts(preconditioner: LayerPreconditioner, weight: Any, input: Any) -> bool:
    """Return whether this forward call is to give the weight a gradient; not in an export, a trace or a transform."""
    if not torch.is_grad_enabled() or not isinstance(weight, Tensor):
        return False
    if torch.compiler.is_compiling():
        # `is_exporting()` of older torch is true in every compiled graph.
        is_exporting = getattr(torch.compiler, "_is_exporting_flag", False)
        return weight.requires_grad and not input.is_nested and not is_exporting
    if torch._C._get_tracing_state() is not None or not isinstance(input, Tensor):  # a proxy of torch.fx
        return False
    # Expanded weights cannot be asked, and are made of weights that require it.
    if not isinstance(weight, ExpandedWeight) and not weight.requires_grad:
        return False
    reason = _why_ordinary(preconditioner, weight, input)
    if reason:
        warn_once(_warned, reason)
    return not reason


def _why_ordinary(preconditioner: LayerPreconditioner, weight: Tensor, input: Tensor) -> str:
    """Return why this call gives the layer its ordinary gradient, in words; "" if it does not."""
    if is_per_example(preconditioner.layer, weight):
        return PER_EXAMPLE
    if input.is_nested:
        return NESTED
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return TRANSFORMED
    return ""


def _as_autocast_reads(input: Tensor) -> Tensor:
    """Cast the input as autocast does, once for both the operation and C; from the other 16-bit type too."""
    kind = input.device.type
    is_cast = input.dtype == torch.float32 or _is_16_bit(input)
    if is_cast and has_autocast(kind):
        return input.to(torch.get_autocast_dtype(kind))
    return input


def _is_16_bit(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16)
