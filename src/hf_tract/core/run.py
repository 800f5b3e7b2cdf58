"""Runs a layer's operation with a weight whose gradient is preconditioned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hf_tract.core.compiled_half import PreconditionFromOutput
from hf_tract.core.forward_call import ForwardCall, KeepOutputGrad
from hf_tract.core.notices import tell_once
from hf_tract.core.ops import PreconditionWeightGrad
from hf_tract.core.patches import PATCH_OPS, fits
from hf_tract.core.preconditioner import LayerPreconditioner

_told: set[str] = set()


def run_where_acting(
    preconditioner: LayerPreconditioner | None,
    op: Callable[..., Tensor],
    input: Any,
    weight: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Does what `run` does where TrAct acts, and else runs the operation alone."""
    if preconditioner is None or not acts(weight, input):
        return op(input, weight, *args, **kwargs)
    return run(preconditioner, op, input, weight, *args, **kwargs)


def run(
    preconditioner: LayerPreconditioner,
    op: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Runs a convolution or linear operation whose weight's gradient is preconditioned.

    Args:
        preconditioner: the layer's.
        op: one of `PATCH_OPS`.
        input: what `op` reads.
        weight: what `op` reads.
        args: of `op`.
        kwargs: of `op`.
    """
    spec = PATCH_OPS[op](input, weight, *args, **kwargs)
    if not fits(input, weight, spec):
        return op(input, weight, *args, **kwargs)  # torch itself says what is wrong
    input = _as_autocast_reads(input)
    x, is_half = input.detach(), input.dtype in (torch.bfloat16, torch.float16)
    if torch.compiler.is_compiling():
        if is_half:
            out = op(input, weight.detach(), *args, **kwargs)
            return PreconditionFromOutput.apply(out, weight, x, preconditioner.key, spec)
        weight = PreconditionWeightGrad.apply(weight, x, None, None, preconditioner.key, spec)
        return op(input, weight, *args, **kwargs)
    call = ForwardCall(weight)
    weight = PreconditionWeightGrad.apply(weight, x, preconditioner, call, preconditioner.key, spec)
    out = op(input, weight, *args, **kwargs)
    if is_half:
        return KeepOutputGrad.apply(out.clone() if out._is_view() else out, call)
    return out


def acts(weight: Any, input: Any) -> bool:
    """Says whether a forward is one whose gradient is to be preconditioned, and no export, trace or transform."""
    if not (torch.is_grad_enabled() and isinstance(weight, Tensor) and weight.requires_grad):
        return False
    if torch.compiler.is_compiling():
        return not torch.compiler._is_exporting_flag  # older torch's `is_exporting()` is true in every compiled graph
    if torch._C._get_tracing_state() is not None or not isinstance(input, Tensor):  # torch.fx
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        tell_once(
            _told,
            "TrAct: inside of torch.func's transforms (grad, vmap, vjp, ...) and of forward-mode differentiation the first "
            "layer has its ordinary gradient. Use a backward of torch.autograd for a preconditioned one.",
        )
        return False
    return True


def _as_autocast_reads(input: Tensor) -> Tensor:
    """Casts what autocast would cast, once for the operation and for C."""
    kind = input.device.type
    if input.dtype == torch.float32 and torch.is_autocast_enabled(kind):
        return input.to(torch.get_autocast_dtype(kind))
    return input
