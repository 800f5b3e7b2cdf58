"""Second moments of the patches that a layer's operation reads: pure functions, no state.

Shape letters: N images, c input channels, g groups, m outputs, o output positions along a dimension, k kernel size along
a dimension, n = (c / g) * prod(k) inputs of one output (`weight[0].numel()`), b patches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SCRATCH_BYTES = 128 * 2**20


class Window(NamedTuple):
    """How an operation cuts its input into patches; `kernel == ()` stands for a linear layer.

    `padding` holds zeros before and after each dimension, first dimension first: (top, bottom, left, right) in 2-D.
    """

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @property
    def span(self) -> tuple[int, ...]:
        """Input positions that one patch covers, holes of the dilation included."""
        return tuple(d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True))

    def positions(self, size: Sequence[int]) -> tuple[int, ...]:
        """Output positions per dimension for an input of spatial `size`."""
        before, after = self.padding[::2], self.padding[1::2]
        return tuple(
            max(0, (length + lo + hi - span) // stride + 1)
            for length, lo, hi, span, stride in zip(size, before, after, self.span, self.stride, strict=True)
        )


def patch_moments(x: Tensor, window: Window, dtype: torch.dtype, scratch_bytes: int = SCRATCH_BYTES) -> tuple[Tensor, int]:
    """Sums p p^T over all patches p of `x`, in the order of `weight.flatten(1)`.

    Args:
        x: a convolution's input, (N, c, *size) or (c, *size), or a linear layer's, (..., n).
        window: the patches to take.
        dtype: of the products and their sums; float32 or float64.
        scratch_bytes: bound on the patch matrix that exists at a time; at least one row of output positions is taken.

    Returns:
        The sums, (g, n, n), and the number of patches b. The moment of PAPER eq. (C = x x^T / b) is their quotient.
    """
    groups = window.groups
    n = x.shape[-1] if not window.kernel else x.shape[-len(window.kernel) - 1] // groups * math.prod(window.kernel)
    sums = x.new_zeros((groups, n, n), dtype=dtype)
    count = 0
    with torch.autocast(x.device.type, enabled=False):
        for patches in _patches(x, window, dtype, scratch_bytes):
            sums.baddbmm_(patches.mT, patches)
            count += patches.shape[1]
    return sums, count


def _patches(x: Tensor, window: Window, dtype: torch.dtype, scratch_bytes: int) -> Iterator[Tensor]:
    """The patch matrix in pieces of (g, rows, n), each piece at most `scratch_bytes` large where a row allows it."""
    budget = max(1, scratch_bytes // dtype.itemsize)
    if not window.kernel:
        rows = x.reshape(-1, x.shape[-1])
        step = len(rows) if rows.dtype == dtype else budget // max(1, rows.shape[1])
        for piece in rows.split(max(1, step)):
            yield piece.to(dtype).unsqueeze(0)
        return
    dims = len(window.kernel)
    x = x if x.dim() == dims + 2 else x.unsqueeze(0)
    out = window.positions(x.shape[2:])
    row = x.shape[1] * math.prod(window.kernel) * math.prod(out[1:])  # one output position along the first dimension
    if not (row and out[0] and len(x)):
        return
    images, lines = max(1, budget // (row * out[0])), max(1, budget // row)
    for chunk in x.split(images):
        views = _windows(chunk.to(dtype), window)
        for piece in views.split(lines, dim=2) if lines < out[0] else (views,):
            yield _rows(piece, window)


def _windows(x: Tensor, window: Window) -> Tensor:
    """A view of zero-padded (N, c, *size) as (N, c, *o, *k)."""
    if any(window.padding):
        last_first = [p for i in reversed(range(len(window.kernel))) for p in window.padding[2 * i : 2 * i + 2]]
        x = F.pad(x, last_first)
    for dim, (span, stride, dilation) in enumerate(zip(window.span, window.stride, window.dilation, strict=True)):
        x = x.unfold(2 + dim, span, stride)[..., ::dilation]
    return x


def _rows(views: Tensor, window: Window) -> Tensor:
    """(N, c, *o, *k) as the patch matrix (g, N * prod(o), n)."""
    dims, groups = len(window.kernel), window.groups
    views = views.unflatten(1, (groups, -1))
    out, kernel = range(3, 3 + dims), range(3 + dims, 3 + 2 * dims)
    views = views.permute(1, 0, *out, 2, *kernel)
    return views.reshape(groups, -1, math.prod(views.shape[-dims - 1 :]))
