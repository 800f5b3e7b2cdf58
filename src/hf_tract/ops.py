"""The operator between a layer's backward and its preconditioner, and the autograd functions around it.

The operator is opaque, so that `torch.compile` neither traces nor freezes what happens inside: accumulation, ranks and
settings may change from call to call under one graph. It is defined without `custom_op`, whose wrappers cost more on the
host than what they wrap.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hf_tract.moments import Window
from hf_tract.patches import PATCH_OPS, fits
from hf_tract.precondition import DampedInverse
from hf_tract.preconditioner import PRECONDITIONERS, UNTRACKED, LayerPreconditioner
from hf_tract.weight_grad import weight_grad

logger = logging.getLogger(__name__)

_library = torch.library.Library("hf_tract", "DEF")
_library.define(
    "precondition(Tensor grad, Tensor x, Tensor? output_grad, int key, SymInt call, SymInt task, bool adds, int[] kernel, "
    "int[] stride, int[] padding, int[] dilation, int groups) -> Tensor",
    # It acts beside computing, so it must run at every call, and a replayed CUDA graph does not call.
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe),
)
_call_numbers = itertools.count()


def _precondition(
    grad: Tensor,
    x: Tensor,
    output_grad: Tensor | None,
    key: int,
    call: int,
    task: int,
    adds: bool,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Returns what the preconditioner `key` hands on; the ordinary gradient where its layer is gone.

    Where `output_grad` is given, `grad` is computed again from it: a 16-bit operation rounds its weight's gradient, and
    inv(C + lam I) enlarges that.
    """
    window = Window(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), groups)
    preconditioner = PRECONDITIONERS.get(key)
    with _full_precision(grad):
        if output_grad is not None:
            grad = weight_grad(x, output_grad, window, grad)
        if preconditioner is None:
            return grad.clone()
        return preconditioner.precondition(grad, x, window, call, task, adds)


def _full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Switches autocast off where it is on."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


_library.impl("precondition", _precondition, "CompositeExplicitAutograd")
torch.library.register_fake("hf_tract::precondition", lambda grad, *_: grad.new_empty(grad.shape), lib=_library)
precondition = torch.ops.hf_tract.precondition.default


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


class PreconditionWeightGrad(torch.autograd.Function):
    """Identity on a layer's weight whose backward preconditions.

    Its derivative is that of a linear map, v -> v inv(C + lam I): what C itself depends on is left out.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, x: Tensor, owner: LayerPreconditioner | None, call: Any, key: int, window: Window
    ) -> Tensor:
        """Returns `weight`.

        Args:
            ctx: autograd's.
            weight: (m, ...), as the operation is to read it.
            x: what the operation reads, without a gradient of its own.
            owner: kept alive until the backward; None in a compiled graph, which knows it by `key`.
            call: the `ForwardCall`; None in a compiled graph.
            key: of the preconditioner.
            window: the patches that the operation cuts out of `x`.
        """
        ctx.save_for_backward(x)
        ctx.owner, ctx.call, ctx.key, ctx.window = owner, call, key, window
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the preconditioned gradient of the weight."""
        (x,) = ctx.saved_tensors
        if ctx.call is None:
            out = precondition(grad, x, None, ctx.key, UNTRACKED, -1, True, *ctx.window)
        elif torch.compiler.is_compiling():  # compiled autograd
            out = precondition(grad, x, None, ctx.key, ctx.call.number, ctx.call.task, True, *ctx.window)
        else:
            out = _eager_backward(ctx, grad, x)
        return out, None, None, None, None, None


def _eager_backward(ctx: Any, grad: Tensor, x: Tensor) -> Tensor:
    call: ForwardCall = ctx.call
    if call.handed_on_differentiably:
        ctx.owner.tell_second_order()
        return grad
    output_grad, call.output_grad = call.output_grad, None
    adds = _adds_to_grad(ctx.next_functions[0][0])
    with torch.no_grad():
        out = precondition(grad, x, output_grad, ctx.key, call.number, call.task, adds, *ctx.window).to(grad.dtype)
    if torch.is_grad_enabled() and grad.requires_grad:
        call.handed_on_differentiably = True
        return _LinearInGrad.apply(grad, [out], ctx.owner.last_inverse(adds))  # type: ignore[no-any-return]
    return out


class PreconditionFromOutput(torch.autograd.Function):
    """Identity on a 16-bit operation's output whose backward also gives the weight its gradient.

    For compiled graphs, which have no second derivative and share no `ForwardCall`: the operation itself reads a weight
    without a gradient.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, weight: Tensor, x: Tensor, key: int, window: Window) -> Tensor:
        """Returns the values of `out`; the other arguments are those of `PreconditionWeightGrad`."""
        ctx.save_for_backward(x)
        ctx.key, ctx.window, ctx.shape, ctx.dtype = key, window, weight.shape, weight.dtype
        return out.clone()  # a view could not be changed in place; the compiler merges the copy with what follows

    @staticmethod
    def backward(ctx: Any, output_grad: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the output's gradient, and the weight's."""
        (x,) = ctx.saved_tensors
        like = output_grad.new_zeros(ctx.shape, dtype=torch.float32)
        out = precondition(like, x, output_grad, ctx.key, UNTRACKED, -1, True, *ctx.window)
        return output_grad, out.to(ctx.dtype), None, None, None


class _LinearInGrad(torch.autograd.Function):
    """A gradient that was handed on, as a linear function of the ordinary one."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, handed_on: list[Tensor], inverse: DampedInverse) -> Tensor:
        """Returns the one entry of `handed_on`."""
        ctx.inverse = inverse
        return handed_on[0]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None, None]:
        """Returns v inv(C + lam I): the matrix is symmetric."""
        with torch.no_grad():
            out = ctx.inverse(v.to(torch.promote_types(v.dtype, torch.float32))).to(v.dtype)
        if torch.is_grad_enabled() and v.requires_grad:
            return _LinearInGrad.apply(v, [out], ctx.inverse), None, None
        return out, None, None


def _adds_to_grad(node: Any) -> bool:
    """Says whether the running pass adds the weight's gradient to `.grad`; `torch.autograd.grad` returns it instead."""
    if node is None or node.name() != "torch::autograd::AccumulateGrad":
        return True
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # how the engine says that it was asked for this leaf by `torch.autograd.grad`
        return False


def run(
    preconditioner: LayerPreconditioner, op: Callable[..., Tensor], input: Tensor, weight: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Runs a convolution or linear operation whose weight's gradient is preconditioned.

    Args:
        preconditioner: the layer's.
        op: one of `PATCH_OPS`.
        input: what `op` reads.
        weight: what `op` reads.
        args: of `op`.
        kwargs: of `op`.
    """
    window = PATCH_OPS[op](input, weight, *args, **kwargs)
    if not fits(input, weight, window):
        return op(input, weight, *args, **kwargs)  # torch itself says what is wrong
    input = _as_autocast_reads(input)
    x, is_half = input.detach(), input.dtype in (torch.bfloat16, torch.float16)
    if torch.compiler.is_compiling():
        if is_half:
            out = op(input, weight.detach(), *args, **kwargs)
            return PreconditionFromOutput.apply(out, weight, x, preconditioner.key, window)  # type: ignore[no-any-return]
        weight = PreconditionWeightGrad.apply(weight, x, None, None, preconditioner.key, window)
        return op(input, weight, *args, **kwargs)
    call = ForwardCall()
    weight = PreconditionWeightGrad.apply(weight, x, preconditioner, call, preconditioner.key, window)
    out = op(input, weight, *args, **kwargs)
    if is_half and out.requires_grad:
        out.register_hook(call.keep_output_grad)
    return out


def acts(weight: Tensor, input: Any) -> bool:
    """Says whether a forward is one whose gradient is to be preconditioned, and no export, trace or transform."""
    if not (torch.is_grad_enabled() and isinstance(weight, Tensor) and weight.requires_grad):
        return False
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting()
    if torch.jit.is_tracing() or not isinstance(input, Tensor):  # a symbolic trace by torch.fx has no tensors
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        _tell_transform()
        return False
    return True


def _tell_transform() -> None:
    global _transform_was_told
    if not _transform_was_told:
        _transform_was_told = True
        logger.warning(
            "TrAct: inside of torch.func's transforms (grad, vmap, vjp, ...) and of forward-mode differentiation the first "
            "layer has its ordinary gradient. Use a backward of torch.autograd for a preconditioned one. This is said once."
        )


_transform_was_told = False


def _as_autocast_reads(input: Tensor) -> Tensor:
    """Casts what autocast would cast, once for the operation and for C."""
    kind = input.device.type
    if input.dtype == torch.float32 and torch.is_autocast_enabled(kind):
        return input.to(torch.get_autocast_dtype(kind))
    return input
