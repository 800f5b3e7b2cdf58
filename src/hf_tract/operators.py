"""The two operators between a layer and its step, and the autograd function that holds them.

Forward gathers, backward releases. Both are opaque custom operators, so that `torch.compile` neither traces nor freezes
what happens inside: accumulation, ranks and settings may change from call to call under one graph. They are defined without
`custom_op`, whose wrappers cost more on the host than what they wrap.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from hf_tract.moments import Window, patch_moments
from hf_tract.step import LAYERS

_library = torch.library.Library("hf_tract", "DEF")
# What they do beside computing must happen at every call, and a replayed CUDA graph does not call.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
_library.define(
    "gather(Tensor x, Tensor(a!) calls, int key, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, "
    "bool wide) -> Tensor",
    tags=_TAGS,
)
_library.define("release(Tensor grad, Tensor payload, int key) -> Tensor", tags=_TAGS)


def _gather(
    x: Tensor,
    calls: Tensor,
    key: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    wide: bool,
) -> Tensor:
    """Payload of one call of layer `key` on its input `x`; the integers are those of `Window`.

    That it counts `calls` is what keeps it in forward: a compiler may move what changes nothing into backward, and would.
    """
    window = Window(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), groups)
    n = window.columns(x.shape)
    payload = x.new_zeros((groups * n * n + 1,), dtype=torch.float64 if wide else torch.float32)
    step = LAYERS[key]
    if step.takes_moment():
        scratch = step.config.scratch_mib * 2**20
        with _full_precision(x):
            count = patch_moments(x, window, payload[:-1].view(groups, n, n), scratch)
        payload[-1:].fill_(count)
    calls += 1
    step.open(payload)
    return payload


def _gather_fake(
    x: Tensor, calls: Tensor, key: int, kernel: Any, stride: Any, padding: Any, dilation: Any, groups: int, wide: bool
) -> Tensor:
    n = Window(tuple(kernel), groups=groups).columns(x.shape)
    return x.new_empty((groups * n * n + 1,), dtype=torch.float64 if wide else torch.float32)


def _release(grad: Tensor, payload: Tensor, key: int) -> Tensor:
    """The gradient that layer `key` hands on for the ordinary gradient `grad`."""
    with _full_precision(grad):
        out = LAYERS[key].close(grad, payload)
    return out.clone() if out is grad else out.contiguous()


def _full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast off, where it is on."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


_library.impl("gather", _gather, "CompositeExplicitAutograd")
_library.impl("release", _release, "CompositeExplicitAutograd")
torch.library.register_fake("hf_tract::gather", _gather_fake, lib=_library)
torch.library.register_fake("hf_tract::release", lambda grad, payload, key: grad.new_empty(grad.shape), lib=_library)
gather, release = torch.ops.hf_tract.gather.default, torch.ops.hf_tract.release.default


class Precondition(torch.autograd.Function):
    """Identity on the weight whose gradient is `release`d."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, payload: Tensor, key: int) -> Tensor:
        """`weight` itself."""
        ctx.save_for_backward(payload)
        ctx.key = key
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """The preconditioned gradient of the weight."""
        (payload,) = ctx.saved_tensors
        return release(grad, payload, ctx.key), None, None
