"""Which patches an operation reads: the one table of operations.

Shape letters as in `moments`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_tract.moments import Window


def _linear_window(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Window:
    return Window()


def _conv_window(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Window:
    kernel = tuple(weight.shape[2:])
    dilations = _per_dimension(dilation, len(kernel))
    if padding == "same":  # the odd zero goes behind, as in torch
        total = [d * (k - 1) for k, d in zip(kernel, dilations, strict=True)]
        pads = [side for t in total for side in (t // 2, t - t // 2)]
    else:
        each = _per_dimension(0 if isinstance(padding, str) else padding, len(kernel))
        pads = [side for side in each for _ in range(2)]
    return Window(kernel, _per_dimension(stride, len(kernel)), tuple(pads), dilations, groups)


def _per_dimension(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


PATCH_OPS: dict[Callable[..., Tensor], Callable[..., Window]] = {
    F.linear: _linear_window,
    torch.conv1d: _conv_window,
    torch.conv2d: _conv_window,
    torch.conv3d: _conv_window,
}


def fits(x: Tensor, weight: Tensor, window: Window) -> bool:
    """Says whether the operation can read `x` at all."""
    if not window.kernel:
        return x.dim() > 0 and x.shape[-1] == weight.shape[-1]
    dims = len(window.kernel)
    return x.dim() in (dims + 1, dims + 2) and x.shape[-dims - 1] == weight.shape[1] * window.groups
