"""Runs a layer's operation, so that the gradient of its weight is preconditioned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hf_tract.core.autograd import KeepOutputGrad, PreconditionFromOutput, PreconditionWeightGrad
from hf_tract.core.notices import warn_once
from hf_tract.core.patches import PATCH_OPS, PatchSpec
from hf_tract.core.preconditioner import LayerPreconditioner
from hf_tract.core.step import ForwardCall

_warned: set[str] = set()


def run_preconditioned(
    preconditioner: LayerPreconditioner | None,
    op: Callable[..., Tensor],
    input: Any,
    weight: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Returns what `op` returns; the weight's gradient is preconditioned where TrAct acts.

    Args:
        preconditioner: the layer's; None where the operation runs alone.
        op: one of `PATCH_OPS`.
        input: the first argument of `op`.
        weight: the second argument of `op`.
        args: the other arguments of `op`.
        kwargs: the same, by name.
    """
    if preconditioner is None or not _acts(weight, input):
        return op(input, weight, *args, **kwargs)
    spec = PATCH_OPS[op](input, weight, *args, **kwargs)
    input = _as_autocast_reads(input)
    if torch.compiler.is_compiling():
        return _run_compiled(preconditioner, spec, op, input, weight, *args, **kwargs)
    return _run_eager(preconditioner, spec, op, input, weight, *args, **kwargs)


def _run_eager(
    preconditioner: LayerPreconditioner,
    spec: PatchSpec,
    op: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    call = ForwardCall(weight, preconditioner)
    weight = PreconditionWeightGrad.apply(weight, input.detach(), preconditioner.key, call, spec)
    out = op(input, weight, *args, **kwargs)
    if not _is_16_bit(input):
        return out
    if out._is_view():  # Autograd lets nobody mark a view as changed in place.
        out = out.clone()
    return KeepOutputGrad.apply(out, call)


def _run_compiled(
    preconditioner: LayerPreconditioner,
    spec: PatchSpec,
    op: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if _is_16_bit(input):
        out = op(input, weight.detach(), *args, **kwargs)
        return PreconditionFromOutput.apply(out, weight, input.detach(), preconditioner.key, spec)
    weight = PreconditionWeightGrad.apply(weight, input.detach(), preconditioner.key, None, spec)
    return op(input, weight, *args, **kwargs)


def _acts(weight: Any, input: Any) -> bool:
    """Says whether the weight of this forward is to get a gradient; in an export, a trace or a transform it is not."""
    if not (torch.is_grad_enabled() and isinstance(weight, Tensor) and weight.requires_grad):
        return False
    if torch.compiler.is_compiling():
        # `is_exporting()` of older torch is true in every compiled graph.
        return not torch.compiler._is_exporting_flag
    if torch._C._get_tracing_state() is not None or not isinstance(input, Tensor):  # a proxy of torch.fx
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        warn_once(
            _warned,
            "TrAct: inside of torch.func's transforms (grad, vmap, vjp, ...) and of forward-mode differentiation the "
            "first layer has its ordinary gradient. Use a backward of torch.autograd for a preconditioned one.",
        )
        return False
    return True


def _as_autocast_reads(input: Tensor) -> Tensor:
    """Casts as autocast does, once for the operation and for C."""
    kind = input.device.type
    if input.dtype == torch.float32 and torch.is_autocast_enabled(kind):
        return input.to(torch.get_autocast_dtype(kind))
    return input


def _is_16_bit(input: Tensor) -> bool:
    return input.dtype in (torch.bfloat16, torch.float16)
