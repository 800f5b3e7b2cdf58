"""Sums p p^T over the patches p that a layer's operation reads: pure functions, without state.

Shape letters as in core/README.md. Every method fills the lower triangle of the sums, in panels of columns, and
mirrors it at the end.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hf_tract.core.neighbours import MAX_WIDENING, sums_by_neighbours
from hf_tract.core.overlap import best_overlap, overlapping_sums
from hf_tract.core.patches import PatchSpec
from hf_tract.core.pieces import (
    MAX_PRODUCT_LENGTH,
    add_product,
    as_images,
    chunk_sizes,
    factor_dtype,
    long_product,
    mirror,
    patch_rows,
)
from hf_tract.core.solve import max_trace, widest_dtype

# Bytes. The first layer's backward is the last, when the activations of all others have been freed.
MEMORY_LIMIT = 512 * 2**20
# On a CPU, pieces of this many bytes stay in the cache, and below the size that malloc maps and unmaps each time.
CPU_MEMORY_LIMIT = 8 * 2**20
# Up to this many numbers in all patches, an accelerator computes their products faster than the host could launch the
# steps by which overlapping patches share work.
FEW_NUMBERS = 2**25
# Of `max_trace`, what C's trace may be for each patch of the sums in float32.
SHARE_PER_PATCH = 0.03
# Columns of the triangle that one product fills on a CPU.
PANEL = 128


class PatchSums(NamedTuple):
    """Holds the sum of p p^T over b patches, (g, n, n) in float32 or float64, and b.

    The count is a scalar tensor where the host could not know it without waiting for an accelerator.
    """

    sums: Tensor
    patch_count: int | Tensor


def patch_moments(x: Tensor, spec: PatchSpec, out: Tensor, memory_limit: int = MEMORY_LIMIT) -> int:
    """Write the sums of p p^T over all patches p of `x` to `out`, in the order of `weight.flatten(1)`.

    Autocast must be off.

    Args:
        x: a convolution's input, (N, c, *size) or (c, *size), or a linear layer's, (..., n).
        spec: the patches to take.
        out: zeros for the sums, (g, n, n), float32 or float64: the precision of the products too.
        memory_limit: bytes that may be allocated at a time, not counting one more matrix of `out`'s size; one line of
            output positions of one image is always taken, even if it needs more.

    Returns:
        The number of patches, b; C is `out` / b.
    """
    # A padded or converted copy of the input may exist along with its patches: each gets half.
    memory_limit //= 2
    if x.is_cpu:
        memory_limit = min(memory_limit, CPU_MEMORY_LIMIT)
    max_numbers = max(1, memory_limit // factor_dtype(x, out.dtype).itemsize)
    if not spec.kernel:
        return _linear_sums(x, out, max_numbers)
    x = as_images(x, spec)
    positions = spec.output_size(x.shape[2:])
    count = len(x) * math.prod(positions)
    if count == 0 or x.shape[1] == 0:
        return count
    dim = best_overlap(spec, positions, out.numel(), max_numbers)
    if dim is None or (not x.is_cpu and count * len(out) * out.shape[-1] <= FEW_NUMBERS):
        _patch_products(x, spec, out, max_numbers)
    elif x.is_cpu and MAX_WIDENING * out.numel() <= max_numbers:
        sums_by_neighbours(x, spec, dim, out, max_numbers)
    else:
        overlapping_sums(x, spec, dim, out, max_numbers)
    return count


def patch_sums(x: Tensor, spec: PatchSpec, lam: float, dtype: torch.dtype | None = None) -> PatchSums:
    """Return the sums of p p^T over all patches of `x`, and their number.

    The sums are float32 where that is precise enough to add `lam` to C's diagonal: its rounding error grows with C's
    largest eigenvalue, which the trace bounds. Elsewhere, as for pixels of 0 to 10 000, they are float64.

    Args:
        x: as in `patch_moments`; autocast must be off here too.
        spec: the patches to take.
        lam: the damping that is to be added to C.
        dtype: the precision of the sums; None to choose it by their values, which waits for the device.
    """
    widest = widest_dtype(x.device)
    if torch.float64 in (x.dtype, dtype):
        return _new_sums(x, spec, torch.float64)
    new = _new_sums(x, spec, torch.float32)
    if dtype is None and widest == torch.float64 and _needs_float64(x, lam, new):
        return _new_sums(x, spec, widest)
    return new


def _new_sums(x: Tensor, spec: PatchSpec, dtype: torch.dtype) -> PatchSums:
    n = spec.patch_size(x.shape)
    sums = x.new_zeros((spec.groups, n, n), dtype=dtype)
    count = patch_moments(x, spec, sums)
    return PatchSums(sums, count)


def _needs_float64(x: Tensor, lam: float, new: PatchSums) -> bool:
    """Return whether the rounding error of these float32 sums over `x` is too large for `lam`, or they overflow."""
    squares = new.sums.diagonal(dim1=1, dim2=2)
    trace = float(squares.sum(1).max()) / max(1, int(new.patch_count))
    if not math.isfinite(trace):
        return bool(x.isfinite().all())
    if trace > max_trace(lam):
        return True
    # The gradient lies in the span of the b patches, where C's eigenvalues are about trace / b. Where b is small, the
    # solution is so small that rounding errors outside of the span, which lam alone divides, are large beside it.
    return trace > SHARE_PER_PATCH * max_trace(lam) * int(new.patch_count)


def _linear_sums(x: Tensor, out: Tensor, max_numbers: int) -> int:
    rows = x.reshape(-1, x.shape[-1])
    step = max_numbers // max(1, rows.shape[1])
    if x.is_cpu:
        step = min(step, MAX_PRODUCT_LENGTH)
    for chunk in rows.split(max(1, step)):
        factor = chunk.to(factor_dtype(chunk, out.dtype))
        _add_gram(out, factor.unsqueeze(0))
    mirror(out, _panel_width(out))
    return len(rows)


def _patch_products(x: Tensor, spec: PatchSpec, out: Tensor, max_numbers: int) -> None:
    """Multiply the patch matrix with its own transpose, piece by piece."""
    positions = spec.output_size(x.shape[2:])
    numbers_each = x.shape[1] * math.prod(spec.kernel) * math.prod(positions[1:])
    if x.is_cpu:
        max_numbers = min(max_numbers, out.shape[-1] * len(out) * MAX_PRODUCT_LENGTH)
    lines, images = chunk_sizes(positions[0], len(x), max_numbers, numbers_each)
    for start in range(0, positions[0], lines):
        outputs = range(start, min(start + lines, positions[0]))
        for chunk in x.split(images):
            rows = patch_rows(chunk, spec, outputs, factor_dtype(x, out.dtype))
            _add_gram(out, rows)
            # Two matrices at a time would exceed the limit.
            del rows
    mirror(out, _panel_width(out))


def _panel_width(out: Tensor) -> int:
    """Return how many columns of the lower triangle to fill at a time.

    These are all of them on an accelerator and for a small matrix, where the launches of several products would take
    longer than the operations that they save.
    """
    n = out.shape[-1]
    if out.is_cpu and n >= 2 * PANEL:
        return PANEL
    return max(1, n)


def _add_gram(out: Tensor, rows: Tensor) -> None:
    """Add `rows`^T `rows`, of (g, b, n), to (g, n, n); on a CPU only the lower triangle."""
    if not out.is_cpu:
        out += long_product(rows, rows, out.dtype)
        return
    panel = _panel_width(out)
    for j in range(0, out.shape[-1], panel):
        add_product(out[:, j:, j : j + panel], rows[:, :, j:].mT, rows[:, :, j : j + panel])
