"""The two operators between a layer and its step, and the autograd function that holds them.

Forward gathers, backward releases. Both are opaque custom operators, so that `torch.compile` neither traces nor freezes
what happens inside: accumulation, ranks and settings may change from call to call under one graph.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hf_tract.moments import Window, patch_moments
from hf_tract.step import LAYERS


@torch.library.custom_op("hf_tract::gather", mutates_args=("calls",))
def gather(
    x: Tensor,
    calls: Tensor,
    key: int,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    wide: bool,
) -> Tensor:
    """Payload of one call of layer `key` on its input `x`; the integers are those of `Window`.

    That it counts `calls` is what keeps it in forward: a compiler may move what changes nothing into backward, and would.
    """
    window = Window(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), groups)
    sums, count = patch_moments(x, window, torch.float64 if wide else torch.float32)
    payload = torch.cat([sums.flatten(), sums.new_full((1,), count)])
    calls += 1
    LAYERS[key].open(payload)
    return payload


@gather.register_fake
def _(
    x: Tensor, calls: Tensor, key: int, kernel: Any, stride: Any, padding: Any, dilation: Any, groups: int, wide: bool
) -> Tensor:
    n = x.shape[-1] if not kernel else x.shape[-len(kernel) - 1] // groups * math.prod(kernel)
    return x.new_empty((groups * n * n + 1,), dtype=torch.float64 if wide else torch.float32)


@torch.library.custom_op("hf_tract::release", mutates_args=())
def release(grad: Tensor, payload: Tensor, key: int) -> Tensor:
    """The gradient that layer `key` hands on for the ordinary gradient `grad`."""
    out = LAYERS[key].close(grad, payload)
    return out.clone() if out is grad else out.contiguous()


@release.register_fake
def _(grad: Tensor, payload: Tensor, key: int) -> Tensor:
    return grad.new_empty(grad.shape)


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
