"""Defines the operator by which a backward pass reaches the preconditioner of a layer.

The operator is opaque, so `torch.compile` neither traces nor freezes what happens inside: accumulation, ranks and
settings may change from call to call of one graph. `torch.library.custom_op` would cost more time on the host than the
work inside.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from hf_tract.core.patches import PatchSpec
from hf_tract.core.preconditioner import PRECONDITIONERS
from hf_tract.core.step import FORWARD_CALLS
from hf_tract.core.weight_grad import weight_grad

_library = torch.library.Library("hf_tract", "DEF")
_library.define(
    "precondition(Tensor grad, Tensor x, Tensor? output_grad, int key, SymInt call, "
    "int[] kernel, int[] stride, int[] padding, int[] dilation, int groups) -> Tensor",
    # A replayed CUDA graph would not call the operator, which has side effects.
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe),
)


def precondition_eagerly(
    grad: Tensor, x: Tensor, output_grad: Tensor | None, key: int, call: int, *spec: Any
) -> Tensor:
    """Return what `LayerPreconditioner.precondition` returns, or the ordinary gradient if the layer no longer exists.

    Args:
        grad: the ordinary gradient of the weight, (m, ...).
        x: the input of the layer's operation.
        output_grad: the gradient of a 16-bit operation's output, from which the weight's is recomputed in float32:
            the operation rounds the weight's to 16 bits, and inv(C + lam I) enlarges that error.
        key: the number of the preconditioner.
        call: the number of the forward call.
        spec: the entries of the `PatchSpec`.
    """
    if grad.is_meta:
        return torch.empty_like(grad)
    *sizes, groups = spec
    kernel, stride, padding, dilation = map(tuple, sizes)
    patches = PatchSpec(kernel, stride, padding, dilation, groups)
    forward_call = FORWARD_CALLS.get(call)
    preconditioner = PRECONDITIONERS.get(key)
    if forward_call is not None:
        # The layer may have another one by now.
        preconditioner = forward_call.preconditioner
    with without_autocast(grad):
        if output_grad is not None:
            grad = weight_grad(x, output_grad, patches, grad)
        if preconditioner is None:
            return grad.clone()
        return preconditioner.precondition(grad, x, patches, forward_call)


def _fake_precondition(grad: Tensor, *_: Any) -> Tensor:
    return grad.new_empty(grad.shape)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which autocast is off for the device of `x`."""
    kind = x.device.type
    if has_autocast(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def has_autocast(kind: str) -> bool:
    """Return whether autocast is on for devices of this kind; the meta device has none, and torch raises an error."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


_library.impl("precondition", precondition_eagerly, "CompositeExplicitAutograd")
torch.library.register_fake("hf_tract::precondition", _fake_precondition, lib=_library)
precondition = torch.ops.hf_tract.precondition.default
