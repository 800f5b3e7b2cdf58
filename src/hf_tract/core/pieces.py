"""Cuts an input into pieces of bounded size, views their patches, and adds products of them to the sums of p p^T.

Shape letters as in core/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_tract.core.patches import PatchSpec

# Largest number of patches in one product: with more, float32 would lose the last ones.
MAX_PRODUCT_LENGTH = 2**16
# Patches in each part of a longer product on an accelerator: with few parts, few of its cores would work.
PART_LENGTH = 2**12
# For a product of up to this many entries on a CPU, torch's `baddbmm_` is slow: it adds one patch at a time.
FEW_ENTRIES = 256


def as_images(x: Tensor, spec: PatchSpec) -> Tensor:
    """Return a convolution's input or output with a batch dimension, which a single image may lack."""
    if x.dim() == len(spec.kernel) + 1:
        return x.unsqueeze(0)
    return x


def chunk_sizes(
    lines: int,
    images: int,
    max_numbers: int,
    numbers_each: int,
    numbers_per_line: int = 0,
    min_images: int = 1,
) -> tuple[int, int]:
    """Return how many of the `lines` of how many of the `images` to take at a time.

    A line takes up `numbers_each` numbers in memory for each image, and `numbers_per_line` once; in all, `max_numbers`
    are allowed. To stay within them, fewer lines are taken before fewer than `min_images` images are.
    """
    fewest_images = min(images, min_images)
    numbers = fewest_images * numbers_each + numbers_per_line
    fitting = max_numbers // max(1, numbers)
    lines_taken = max(1, min(lines, fitting))
    left = max_numbers - lines_taken * numbers_per_line
    most_images = min(images, left // max(1, lines_taken * numbers_each))
    chunks = math.ceil(images / max(1, most_images))
    # All chunks get about the same size.
    return lines_taken, math.ceil(images / chunks)


def pad_argument(padding: Sequence[int]) -> list[int]:
    """Return a `PatchSpec`'s padding in the order of `F.pad`, which begins at the last dimension."""
    sides: list[int] = []
    for first in reversed(range(0, len(padding), 2)):
        sides += padding[first : first + 2]
    return sides


def covered_input(x: Tensor, spec: PatchSpec, dim: int, outputs: range, dtype: torch.dtype) -> Tensor:
    """Return the part of (N, c, *size) that the patches at `outputs` along `dim` cover, with its zero padding."""
    stride, size = spec.stride[dim], x.shape[2 + dim]
    start = outputs.start * stride - spec.padding[2 * dim]
    stop = (outputs.stop - 1) * stride - spec.padding[2 * dim] + spec.extent[dim]
    first = min(max(start, 0), size)
    last = max(first, min(stop, size))
    padding = list(spec.padding)
    padding[2 * dim] = max(0, min(stop, 0) - start)
    padding[2 * dim + 1] = max(0, stop - max(start, size))
    covered = x.narrow(2 + dim, first, last - first).to(dtype)
    if not any(padding):
        return covered
    return F.pad(covered, pad_argument(padding))


def windows(x: Tensor, spec: PatchSpec, first: int) -> Tensor:
    """Return a view of (..., *size) as (..., *o, *k), where `size` begins at dimension `first` of `x`."""
    for dim, extent in enumerate(spec.extent):
        x = x.unfold(first + dim, extent, spec.stride[dim])
        if spec.dilation[dim] > 1:
            x = x[..., :: spec.dilation[dim]]
    return x


def factor_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the precision in which to multiply parts of `x` for a product of precision `dtype`."""
    # Older versions for AMD's GPUs have no product of 16-bit numbers in float32.
    if not x.is_cuda or torch.version.hip or dtype != torch.float32:
        return dtype
    # Tensor cores multiply 16-bit numbers exactly and sum in float32, unless they are told to sum in float16.
    sums_in_half = torch.backends.cuda.matmul.allow_fp16_accumulation
    if x.dtype == torch.bfloat16 or (x.dtype == torch.float16 and not sums_in_half):
        return x.dtype
    return dtype


def patch_rows(x: Tensor, spec: PatchSpec, outputs: range, dtype: torch.dtype) -> Tensor:
    """Return the patches of (N, c, *size) at `outputs` along its first dimension, as (g, b, n)."""
    dims = len(spec.kernel)
    covered = covered_input(x, spec, 0, outputs, dtype)
    # (N, g, c / g, *o, *k)
    views = windows(covered, spec, 2).unflatten(1, (spec.groups, -1))
    positions, kernel = range(3, 3 + dims), range(3 + dims, 3 + 2 * dims)
    rows: Tensor
    # The longer of the last output and kernel dimensions goes innermost, so that the copy reads and writes long runs.
    if x.is_cpu and views.shape[2 + dims] >= views.shape[-1]:
        columns = views.permute(1, 2, *kernel, 0, *positions)
        rows = columns.flatten(2 + dims).flatten(1, 1 + dims).mT
    else:
        rows = views.permute(1, 0, *positions, 2, *kernel).flatten(2 + dims).flatten(1, 1 + dims)
    return rows


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `left` @ `right` in precision `dtype`, for batches of matrices in that precision or a lower one."""
    if left.dtype == dtype:
        return torch.bmm(left, right)
    return torch.bmm(left, right, out_dtype=dtype)


def add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left` @ `right` to `out`, each a batch of matrices."""
    is_small = out.is_cpu and out.shape[-1] * out.shape[-2] <= FEW_ENTRIES
    if left.dtype != out.dtype or is_small:
        out += product(left, right, out.dtype)
    else:
        out.baddbmm_(left, right)


def long_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum over b patches of `left`^T `right`, of (g, b, m) and (g, b, n), as (g, m, n), for any b."""
    groups, b, m = left.shape
    if b <= MAX_PRODUCT_LENGTH:
        return product(left.mT, right, dtype)
    parts, rest = divmod(b, PART_LENGTH)
    left_parts = left[:, : b - rest].reshape(groups * parts, PART_LENGTH, m)
    right_parts = right[:, : b - rest].reshape(groups * parts, PART_LENGTH, -1)
    products = product(left_parts.mT, right_parts, dtype)
    total: Tensor = products.unflatten(0, (groups, parts)).sum(1)
    if rest:
        total += product(left[:, b - rest :].mT, right[:, b - rest :], dtype)
    return total


def mirror(out: Tensor, panel: int) -> None:
    """Fill the upper triangle of `out` from its lower one, which was filled in panels of this many columns."""
    for j in range(panel, out.shape[-1], panel):
        out[:, :j, j : j + panel] = out[:, j : j + panel, :j].mT
