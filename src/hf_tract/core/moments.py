"""Second moments of the patches that a layer's operation reads: pure functions, no state.

Shape letters: N images, c input channels, g groups, m outputs, o output positions along a dimension, k kernel size along
a dimension, n = (c / g) * prod(k) inputs of one output (`weight[0].numel()`), b patches.

Every path fills the lower triangle of the sums, in panels of columns, and mirrors it at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_tract.core.patches import PatchSpec

MEMORY_LIMIT = 128 * 2**20
CACHED_BYTES = (
    8 * 2**20
)  # CPU: pieces that stay in the cache, and below the size that malloc maps and unmaps each time
PANEL = 128  # CPU: columns of the triangle that one product fills
MAX_ROUNDING = 1e-2  # float32's rounding of C's trace, in units of lam, above which sums are float64
MAX_PRODUCT_LENGTH = 2**16  # patches that one product sums, so that float32 does not lose the last ones
FEW_ENTRIES = 256  # CPU: of a product, up to which torch adds patch by patch to what is there
MAX_OVERLAP_COST = 0.75  # share of the operations below which row products pay for their sums


def patch_moments(x: Tensor, spec: PatchSpec, out: Tensor, scratch_bytes: int = MEMORY_LIMIT) -> int:
    """Writes the sums of p p^T over all patches p of `x` into zeros, in the order of `weight.flatten(1)`.

    Autocast must be off.

    Args:
        x: a convolution's input, (N, c, *size) or (c, *size), or a linear layer's, (..., n).
        spec: the patches to take.
        out: zeros for the sums, (g, n, n), float32 or float64: the precision of the products too.
        scratch_bytes: bound on what is allocated at a time beside one more matrix of `out`'s size; a line of output
            positions of one image is taken even if it is larger.

    Returns:
        The number of patches b. The moment of PAPER eq. (C = x x^T / b) is the quotient of both.
    """
    # A padded or converted copy of the input may stand beside its patches: each takes half.
    scratch = min(scratch_bytes // 2, CACHED_BYTES if x.is_cpu else scratch_bytes)
    max_numbers = max(1, scratch // out.itemsize)
    if not spec.kernel:
        return _linear(x, out, max_numbers)
    x = x if x.dim() == len(spec.kernel) + 2 else x.unsqueeze(0)
    positions = spec.output_size(x.shape[2:])
    count = len(x) * math.prod(positions)
    if count and x.shape[1]:
        dim, share = best_overlap(spec, positions)
        block = out.numel() * spec.stride[dim] // spec.kernel[dim]
        if share <= MAX_OVERLAP_COST and 4 * block <= max_numbers:
            _overlapping_sums(x, spec, dim, positions, out, max_numbers)
        else:
            _patch_products(x, spec, positions, out, max_numbers)
    return count


def patch_sums(x: Tensor, spec: PatchSpec, lam: float, dtype: torch.dtype | None = None) -> Tensor:
    """Returns the sums of p p^T over all patches of `x` and, as their last entry, the number of patches.

    They are float32 where that is precise enough to add `lam` to C's diagonal: rounding is in proportion to C's largest
    eigenvalue, which its trace bounds. Elsewhere, as for pixels of 0 to 10 000, they are float64. Autocast must be off.

    Args:
        x: a convolution's input, (N, c, *size) or (c, *size), or a linear layer's, (..., n).
        spec: the patches to take.
        lam: the damping that C is to get.
        dtype: of the sums; chosen by looking at them, which waits for the device, where None.

    Returns:
        (g * n * n + 1,), float32 or float64.
    """
    sums = _flat_sums(x, spec, torch.float64 if torch.float64 in (x.dtype, dtype) else torch.float32)
    has_float64 = x.device.type != "mps"
    if dtype is None and has_float64 and sums.dtype == torch.float32 and _loses(sums, spec, lam):
        return _flat_sums(x, spec, torch.float64)
    return sums


def _flat_sums(x: Tensor, spec: PatchSpec, dtype: torch.dtype) -> Tensor:
    n = spec.patch_size(x.shape)
    sums = x.new_zeros((spec.groups * n * n + 1,), dtype=dtype)
    count = patch_moments(x, spec, sums[:-1].view(spec.groups, n, n))
    sums[-1:].fill_(count)
    return sums


def _loses(sums: Tensor, spec: PatchSpec, lam: float) -> bool:
    """Says whether the rounding of float32 `sums` comes near `lam`."""
    n = math.isqrt((len(sums) - 1) // spec.groups)
    squares = sums[:-1].view(spec.groups, n, n).diagonal(dim1=1, dim2=2)
    trace = float(squares.sum(1).max()) / max(1.0, float(sums[-1])) if squares.numel() else 0.0
    return math.isfinite(trace) and torch.finfo(torch.float32).eps * trace > MAX_ROUNDING * lam


def _linear(x: Tensor, out: Tensor, max_numbers: int) -> int:
    rows = x.reshape(-1, x.shape[-1])
    step = min(max_numbers // max(1, rows.shape[1]), MAX_PRODUCT_LENGTH)
    panel = _panel(out)
    for piece in rows.split(max(1, step)):
        _add_gram(out, piece.to(_dtype(piece, out)).mT.unsqueeze(0), panel)
    _mirror(out, panel)
    return len(rows)


def _patch_products(x: Tensor, spec: PatchSpec, positions: tuple[int, ...], out: Tensor, max_numbers: int) -> None:
    """The patch matrix times its own transpose, in pieces: one permuted copy of the input where windows don't overlap."""
    line = x.shape[1] * math.prod(spec.kernel) * math.prod(positions[1:])
    max_numbers = min(max_numbers, out.shape[-1] * len(out) * MAX_PRODUCT_LENGTH)
    lines, images = _chunk_sizes(positions[0], len(x), line, 0, max_numbers, 1)
    panel = _panel(out)
    for start in range(0, positions[0], lines):
        for chunk in x.split(images):
            covered = _lines(chunk, 0, start, min(start + lines, positions[0]), spec, _dtype(x, out))
            _add_gram(out, _patch_matrix(covered, spec), panel)
            del covered
    _mirror(out, panel)


def _patch_matrix(x: Tensor, spec: PatchSpec) -> Tensor:
    """The patches of padded (N, c, *size) as (g, n, b)."""
    dims = len(spec.kernel)
    views = _windows(x, spec, 2).unflatten(1, (spec.groups, -1))  # (N, g, c / g, *o, *k)
    positions, kernel = range(3, 3 + dims), range(3 + dims, 3 + 2 * dims)
    by_column = views.shape[2 + dims] >= views.shape[-1]  # the longer of the two runs innermost
    order = (1, 2, *kernel, 0, *positions) if by_column else (1, 0, *positions, 2, *kernel)
    matrix: Tensor = views.permute(order).flatten(2 + dims).flatten(1, 1 + dims)
    return matrix if by_column else matrix.mT


def best_overlap(spec: PatchSpec, positions: tuple[int, ...]) -> tuple[int, float]:
    """The dimension in which overlapping windows share most, and the share of the operations that `_row_products` leaves."""
    shares = [
        (o + (k - 1) // s) * s / (o * k) if d == 1 else math.inf
        for o, k, s, d in zip(positions, spec.kernel, spec.stride, spec.dilation, strict=True)
    ]
    return shares.index(min(shares)), min(shares)


def _overlapping_sums(
    x: Tensor, spec: PatchSpec, dim: int, positions: tuple[int, ...], out: Tensor, max_numbers: int
) -> None:
    """Products of each line with the lines near it, which all windows over both have in common.

    A line is a position h along `dim`, unfolded along the other dimensions: S[h]. Block t holds the products of lines
    t s .. t s + k - 1 with the first s of them. C's entries for kernel lines i = a s + r and j >= i, the sum over the
    output positions o of S[o s + j] S[o s + i]^T, are the sum over t = a .. a + O - 1 of block t's for lines j - a s and r.
    """
    kernel, stride, count = spec.kernel[dim], spec.stride[dim], positions[dim]
    groups, n = out.shape[:2]
    width, shifts = n // kernel, (kernel - 1) // stride
    panel, blocks = width * stride, count + shifts
    across = math.prod(positions) // count
    kernels, strides, dilations = (part[:dim] + part[dim + 1 :] for part in (spec.kernel, spec.stride, spec.dilation))
    others = PatchSpec(kernels, strides, dilation=dilations, groups=groups)
    lines, images = _chunk_sizes(
        blocks, len(x), groups * panel * across, groups * n * panel, max_numbers, -(-1024 // across)
    )
    sums = torch.zeros_like(out)
    for start in range(0, blocks, lines):
        stop = min(start + lines, blocks)
        products = out.new_zeros((groups, stop - start, n, panel))
        for chunk in x.split(images):
            covered = _lines(chunk, dim, start, stop, spec, _dtype(x, out)).movedim(2 + dim, 2)
            _add_blocks(products, _strips(covered, others))
            del covered
        for shift in range(shifts + 1):
            low, high, j = max(shift, start), min(shift + count, stop), shift * panel
            if low < high:
                sums[:, j:, j : j + panel] += products[:, low - start : high - start, : n - j, : n - j].sum(1)
        del products
    _mirror(sums, panel)
    # `sums` has the kernel's line before the rest of a patch, (c / g, *others); the weight has it in its place.
    first, dims = n // math.prod(spec.kernel), len(positions)
    order = (2, *(3 + i if i < dim else 1 if i == dim else 2 + i for i in range(dims)))  # of (g, line, c / g, *others)
    sums = sums.view(groups, *(kernel, first, *kernels) * 2).permute(0, *order, *(1 + dims + i for i in order))
    out.view(groups, *(first, *spec.kernel) * 2).copy_(sums)


def _strips(x: Tensor, others: PatchSpec) -> Tensor:
    """The lines of padded (N, c, h, *others), unfolded along the others: (g, h * c / g * prod(k), N * prod(o))."""
    dims = len(others.kernel)
    views = _windows(x, others, 3).unflatten(1, (others.groups, -1))  # (N, g, c / g, h, *o, *k)
    positions, kernel = range(4, 4 + dims), range(4 + dims, 4 + 2 * dims)
    strips: Tensor = views.permute(1, 3, 2, *kernel, 0, *positions).flatten(3 + dims).flatten(1, 2 + dims)
    return strips.contiguous()


def _add_blocks(products: Tensor, strips: Tensor) -> None:
    """Adds, for each block, its lines times its first lines to (g, blocks, n, panel)."""
    _, blocks, n, panel = products.shape
    for lines, product in zip(strips, products, strict=True):
        _add_product(product, lines.unfold(0, n, panel).mT, lines.unfold(0, panel, panel)[:blocks])


def _chunk_sizes(lines: int, images: int, each: int, fixed: int, max_numbers: int, least: int) -> tuple[int, int]:
    """How many lines of how many images to take at a time.

    Args:
        lines: all of them.
        images: all of them.
        each: numbers that a line of an image takes.
        fixed: numbers that a line takes whatever the images.
        budget: numbers.
        least: images of which lines are rather taken in several pieces.
    """
    taken = max(1, min(lines, max_numbers // max(1, min(images, least) * each + fixed)))
    most = max(1, min(images, (max_numbers - taken * fixed) // max(1, taken * each)))
    return taken, -(-images // -(-images // most))  # evenly


def _lines(x: Tensor, dim: int, start: int, stop: int, spec: PatchSpec, dtype: torch.dtype) -> Tensor:
    """What the windows `start` .. `stop` - 1 along `dim` cover of (N, c, *size), zeros of the padding included."""
    low = start * spec.stride[dim] - spec.padding[2 * dim]
    high = (stop - 1) * spec.stride[dim] - spec.padding[2 * dim] + spec.extent[dim]
    size = x.shape[2 + dim]
    first = min(max(low, 0), size)
    padding = list(spec.padding)
    padding[2 * dim : 2 * dim + 2] = max(0, min(high, 0) - low), max(0, high - max(low, size))
    x = x.narrow(2 + dim, first, max(0, min(high, size) - first)).to(dtype)
    if not any(padding):
        return x
    return F.pad(x, last_dimension_first(padding))


def last_dimension_first(padding: Sequence[int]) -> list[int]:
    """Returns a `PatchSpec`'s padding in the order of `F.pad`."""
    return [side for i in reversed(range(0, len(padding), 2)) for side in padding[i : i + 2]]


def _windows(x: Tensor, spec: PatchSpec, first: int) -> Tensor:
    """A view of (..., *size), sizes from dimension `first` on, as (..., *o, *k)."""
    for dim, (span, stride, dilation) in enumerate(zip(spec.extent, spec.stride, spec.dilation, strict=True)):
        x = x.unfold(first + dim, span, stride)
        if dilation > 1:
            x = x[..., ::dilation]
    return x


def _dtype(x: Tensor, out: Tensor) -> torch.dtype:
    """The factors' precision: tensor cores multiply 16-bit numbers exactly and sum in float32."""
    return (
        x.dtype
        if x.is_cuda and out.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)
        else out.dtype
    )


def _panel(out: Tensor) -> int:
    """Columns of the triangle filled at a time: all where launches cost more than operations."""
    return PANEL if out.is_cpu and out.shape[-1] >= 2 * PANEL else max(1, out.shape[-1])


def _add_gram(out: Tensor, matrix: Tensor, panel: int) -> None:
    """Adds the lower triangle of `matrix` `matrix`^T, (g, n, b), to (g, n, n)."""
    for j in range(0, out.shape[-1], panel):
        _add_product(out[:, j:, j : j + panel], matrix[:, j:], matrix[:, j : j + panel].mT)


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds batches of `left` @ `right`."""
    if left.dtype != out.dtype:
        out += torch.bmm(left, right, out_dtype=out.dtype)
    elif out.is_cpu and out.shape[-1] * out.shape[-2] <= FEW_ENTRIES:
        out += torch.bmm(left, right)
    else:
        out.baddbmm_(left, right)


def _mirror(out: Tensor, panel: int) -> None:
    """Fills what lies above the panels of the lower triangle."""
    for j in range(panel, out.shape[-1], panel):
        out[:, :j, j : j + panel] = out[:, j : j + panel, :j].mT
