"""The operator between a layer's backward and its preconditioner, and the autograd functions around it.

The operator is opaque, so that `torch.compile` neither traces nor freezes what happens inside: accumulation, ranks and
settings may change from call to call under one graph. It is defined without `custom_op`, whose wrappers cost more on the
host than what they wrap.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from hf_tract.core.forward_call import CALLS, ForwardCall
from hf_tract.core.notices import tell_second_order
from hf_tract.core.patches import PatchSpec
from hf_tract.core.preconditioner import PRECONDITIONERS, LayerPreconditioner
from hf_tract.core.second_order import LinearInGrad
from hf_tract.core.weight_grad import weight_grad

_library = torch.library.Library("hf_tract", "DEF")
_library.define(
    "precondition(Tensor grad, Tensor x, Tensor? output_grad, int key, SymInt call, int[] kernel, int[] stride, "
    "int[] padding, int[] dilation, int groups) -> Tensor",
    # It acts beside computing, so it must run at every call, and a replayed CUDA graph does not call.
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe),
)


def _precondition(grad: Tensor, x: Tensor, output_grad: Tensor | None, key: int, call: int, *spec: Any) -> Tensor:
    """Returns what the preconditioner `key` hands on; the ordinary gradient where its layer is gone.

    Where `output_grad` is given, `grad` is computed again from it: a 16-bit operation rounds its weight's gradient, and
    inv(C + lam I) enlarges that.
    """
    *sizes, groups = spec
    kernel, stride, padding, dilation = map(tuple, sizes)
    patches = PatchSpec(kernel, stride, padding, dilation, groups)
    preconditioner = PRECONDITIONERS.get(key)
    with _full_precision(grad):
        if output_grad is not None:
            grad = weight_grad(x, output_grad, patches, grad)
        if preconditioner is None:
            return grad.clone()
        return preconditioner.precondition(grad, x, patches, CALLS.get(call))


def _full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Switches autocast off where it is on."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


_library.impl("precondition", _precondition, "CompositeExplicitAutograd")
torch.library.register_fake("hf_tract::precondition", lambda grad, *_: grad.new_empty(grad.shape), lib=_library)
precondition = torch.ops.hf_tract.precondition.default
UNTRACKED = -1  # the forward call of a compiled graph, which cannot tell its runs apart


class PreconditionWeightGrad(torch.autograd.Function):
    """Identity on a layer's weight whose backward preconditions.

    Its derivative is that of a linear map, v -> v inv(C + lam I): what C itself depends on is left out.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, x: Tensor, owner: LayerPreconditioner | None, call: Any, key: int, spec: PatchSpec
    ) -> Tensor:
        """Returns `weight`.

        Args:
            ctx: autograd's.
            weight: (m, ...), as the operation is to read it.
            x: what the operation reads, without a gradient of its own.
            owner: kept alive until the backward; None in a compiled graph, which knows it by `key`.
            call: the `ForwardCall`; None in a compiled graph.
            key: of the preconditioner.
            spec: the patches that the operation cuts out of `x`.
        """
        ctx.save_for_backward(x)
        ctx.owner, ctx.call, ctx.key, ctx.spec = owner, call, key, spec
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the preconditioned gradient of the weight."""
        (x,) = ctx.saved_tensors
        if ctx.call is None:
            out = precondition(grad, x, None, ctx.key, UNTRACKED, *ctx.spec)
        elif torch.compiler.is_compiling():  # compiled autograd
            out = precondition(grad, x, None, ctx.key, ctx.call.number, *ctx.spec)
        else:
            out = _eager_backward(ctx, grad, x)
        return out, None, None, None, None, None


def _eager_backward(ctx: Any, grad: Tensor, x: Tensor) -> Tensor:
    call: ForwardCall = ctx.call
    if call.handed_on_differentiably:
        tell_second_order(ctx.owner.told)
        return grad
    output_grad, call.output_grad = call.output_grad, None
    with torch.no_grad():
        out: Tensor = precondition(grad, x, output_grad, ctx.key, call.number, *ctx.spec).to(grad.dtype)
    if torch.is_grad_enabled() and grad.requires_grad:
        call.handed_on_differentiably = True
        return LinearInGrad.apply(grad, [out], ctx.owner.last_step)  # type: ignore[no-any-return]
    return out
