"""Sums p p^T over patches by taking neighbouring output positions together, as one larger patch.

Shape letters as in core/README.md; k and the stride s are those of the one dimension along which positions are taken
together, L of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from hf_tract.core.overlap import overlapping_sums
from hf_tract.core.patches import PatchSpec

# Products of patches with more entries fill a CPU as they are.
MAX_ENTRIES = 256
# How long the copy of one number into a patch takes, in multiplications.
COPY_COST = 30
# Sums of larger patches take at most about so many times the memory of the others.
MAX_WIDENING = 16


def sums_by_neighbours(x: Tensor, spec: PatchSpec, dim: int, out: Tensor, max_numbers: int) -> None:
    """Write the sums of p p^T over all patches of (N, c, *size) to `out`, (g, n, n), sharing lines along `dim`.

    L neighbouring patches are the windows of one larger patch q of width k + (L - 1) s. With G the sums of q q^T, the
    sums over all patches are those of the L diagonal blocks of G that belong to the windows. Products of larger
    patches use a CPU better, and these patches overlap less, so that fewer numbers are copied.
    """
    n = out.shape[-1]
    wide = larger_patches(spec, dim, spec.output_size(x.shape[2:]), n)
    if wide == spec:
        overlapping_sums(x, spec, dim, out, max_numbers)
        return
    n_wide = n // math.prod(spec.kernel) * math.prod(wide.kernel)
    wide_sums = out.new_zeros((len(out), n_wide, n_wide))
    # They exist once more in another order.
    overlapping_sums(x, wide, dim, wide_sums, max_numbers - 2 * wide_sums.numel())
    _add_windows(out, wide_sums, spec, wide, _other_dimension(spec, dim))


def larger_patches(spec: PatchSpec, dim: int, positions: Sequence[int], n: int) -> PatchSpec:
    """Return the larger patches to take, where lines are shared along `dim`; `spec` itself if they do not pay off."""
    wide_dim = _other_dimension(spec, dim)
    if wide_dim < 0 or n > MAX_ENTRIES or spec.dilation[wide_dim] != 1:
        return spec
    together = _best_number(spec, wide_dim, positions[wide_dim], n)
    return _widened(spec, wide_dim, together)


def _other_dimension(spec: PatchSpec, dim: int) -> int:
    """Return the last dimension but `dim`; -1 if there is none."""
    last = len(spec.kernel) - 1
    if last == dim:
        return last - 1
    return last


def _best_number(spec: PatchSpec, dim: int, positions: int, n: int) -> int:
    """Return L, the number of neighbours along `dim` that costs least; only divisors of `positions` are possible."""
    best = 1
    lowest_cost = math.inf
    for together in (1, 2, 4, 8):
        width = _widened(spec, dim, together).kernel[dim] / spec.kernel[dim]
        cost = width**2 / together + COPY_COST / n * width / together
        if positions % together == 0 and cost < lowest_cost:
            best = together
            lowest_cost = cost
    return best


def _widened(spec: PatchSpec, dim: int, together: int) -> PatchSpec:
    """Return the patches that consist of so many neighbouring patches along `dim`."""
    kernel, stride = list(spec.kernel), list(spec.stride)
    kernel[dim] += (together - 1) * stride[dim]
    stride[dim] *= together
    return spec._replace(kernel=tuple(kernel), stride=tuple(stride))


def _add_windows(out: Tensor, wide_sums: Tensor, spec: PatchSpec, wide: PatchSpec, dim: int) -> None:
    """Add to (g, n, n) the diagonal blocks of `wide_sums` that belong to the patches in each larger patch."""
    groups, n, _ = out.shape
    channels = n // math.prod(spec.kernel)
    dims = len(spec.kernel)
    sums = out.view(groups, channels, *spec.kernel, channels, *spec.kernel)
    wide_sums = wide_sums.view(groups, channels, *wide.kernel, channels, *wide.kernel)
    # The axes of `dim`: the first belongs to the rows of the sums, the second to their columns.
    row_axis = 2 + dim
    column_axis = 3 + dims + dim
    k, s = spec.kernel[dim], spec.stride[dim]
    for start in range(0, wide.kernel[dim] - k + 1, s):
        sums += wide_sums.narrow(row_axis, start, k).narrow(column_axis, start, k)
