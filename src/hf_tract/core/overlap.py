"""Sums p p^T over patches that overlap, by products of input lines that neighbouring patches share.

Shape letters as in core/README.md; o, k and the stride s are those of the one dimension along which lines are shared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_tract.core.patches import PatchSpec
from hf_tract.core.pieces import add_product, chunk_sizes, covered_input, factor_dtype, mirror, windows

# If more than this share of the operations is left, the additional sums cost more than sharing lines saves.
MAX_OVERLAP_COST = 0.75
# At least so many blocks of products, g n panel numbers each, must fit in memory.
MIN_BLOCKS = 4
# Products of fewer columns use the machine poorly, so at least this many are taken at a time if memory allows.
MIN_COLUMNS = 1024


def best_overlap(spec: PatchSpec, positions: tuple[int, ...], entries: int, max_numbers: int) -> int | None:
    """Return the dimension along which overlapping patches share the most work; None if sharing does not pay off.

    Args:
        spec: the patches.
        positions: the numbers of output positions, (*o,).
        entries: of the sums, g n^2.
        max_numbers: how many numbers may be in memory at a time.
    """
    best = None
    lowest_cost = math.inf
    for dim, o in enumerate(positions):
        k, s = spec.kernel[dim], spec.stride[dim]
        cost = (o + (k - 1) // s) * s / (o * k)
        if cost < lowest_cost and spec.dilation[dim] == 1:
            best = dim
            lowest_cost = cost
    if best is None or lowest_cost > MAX_OVERLAP_COST:
        return None
    block = entries * spec.stride[best] // spec.kernel[best]
    return best if MIN_BLOCKS * block <= max_numbers else None


def overlapping_sums(x: Tensor, spec: PatchSpec, dim: int, out: Tensor, max_numbers: int) -> None:
    """Write the sums of p p^T over all patches of (N, c, *size) to `out`, (g, n, n).

    A line S[h] is the position h along `dim`, unfolded along the other dimensions. Block t holds the products of
    lines t s .. t s + k - 1 with the first s of them. For kernel lines i = a s + r, with r < s, and j >= i, the
    entries of the result are the sum over output positions u of S[u s + j] S[u s + i]^T. With t = u + a this is the
    sum over t = a .. a + o - 1 of block t's products of its lines j - a s and r: one block serves every shift a.
    """
    k, s = spec.kernel[dim], spec.stride[dim]
    positions = spec.output_size(x.shape[2:])
    o = positions[dim]
    columns = math.prod(positions) // o
    groups, n, _ = out.shape
    panel = n // k * s
    blocks = o + (k - 1) // s
    step, images = chunk_sizes(
        blocks,
        len(x),
        max_numbers,
        numbers_each=groups * panel * columns,
        numbers_per_line=groups * n * panel,
        min_images=math.ceil(MIN_COLUMNS / columns),
    )
    sums = torch.zeros_like(out)
    for start in range(0, blocks, step):
        chunk = range(start, min(start + step, blocks))
        _add_blocks(sums, x.split(images), spec, dim, chunk)
    mirror(sums, panel)
    _copy_in_weight_order(sums, spec, dim, out)


def _add_blocks(sums: Tensor, chunks: Sequence[Tensor], spec: PatchSpec, dim: int, blocks: range) -> None:
    """Add the products of these blocks to the lower triangle of `sums`, whose patches are ordered by kernel line."""
    k, s = spec.kernel[dim], spec.stride[dim]
    o = spec.output_size(chunks[0].shape[2:])[dim]
    groups, n, _ = sums.shape
    panel = n // k * s
    products = sums.new_zeros((groups, len(blocks), n, panel))
    dtype = factor_dtype(chunks[0], sums.dtype)
    for chunk in chunks:
        _add_line_products(products, _lines(chunk, spec, dim, blocks, dtype))
    for a in range((k - 1) // s + 1):
        first = max(a, blocks.start) - blocks.start
        last = min(a + o, blocks.stop) - blocks.start
        j = a * panel
        if first < last:
            sums[:, j:, j : j + panel] += products[:, first:last, : n - j, : n - j].sum(1)


def _lines(x: Tensor, spec: PatchSpec, dim: int, blocks: range, dtype: torch.dtype) -> Tensor:
    """Return the lines that `blocks` read, from first to last: (g, lines * n / k, N * columns)."""
    covered = covered_input(x, spec, dim, blocks, dtype).movedim(2 + dim, 2)
    others = PatchSpec(
        _without(spec.kernel, dim),
        _without(spec.stride, dim),
        dilation=_without(spec.dilation, dim),
        groups=spec.groups,
    )
    dims = len(others.kernel)
    # (N, g, c / g, h, *o, *k)
    views = windows(covered, others, 3).unflatten(1, (spec.groups, -1))
    positions, kernel = range(4, 4 + dims), range(4 + dims, 4 + 2 * dims)
    lines: Tensor = views.permute(1, 3, 2, *kernel, 0, *positions)
    return lines.flatten(3 + dims).flatten(1, 2 + dims).contiguous()


def _without(values: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return values[:dim] + values[dim + 1 :]


def _add_line_products(products: Tensor, lines: Tensor) -> None:
    """Add, for each block, its lines times its first s lines to (g, blocks, n, panel)."""
    _, blocks, n, panel = products.shape
    for group, rows in enumerate(lines):
        block_lines = rows.unfold(0, n, panel).mT
        first_lines = rows.unfold(0, panel, panel)[:blocks]
        add_product(products[group], block_lines, first_lines)


def _copy_in_weight_order(sums: Tensor, spec: PatchSpec, dim: int, out: Tensor) -> None:
    """Copy `sums`, whose patches are ordered by kernel line along `dim`, to `out`, in the order of the weight."""
    groups, n, _ = out.shape
    channels = n // math.prod(spec.kernel)
    dims = len(spec.kernel)
    lines_first = (spec.kernel[dim], channels, *_without(spec.kernel, dim))
    weight_order = (channels, *spec.kernel)
    # The axes of the kernel line: the first belongs to the rows of the sums, the second to their columns.
    before = (1, 2 + dims)
    after = (2 + dim, 3 + dims + dim)
    moved = sums.view(groups, *lines_first, *lines_first).movedim(before, after)
    out.view(groups, *weight_order, *weight_order).copy_(moved)
