"""Counts the operations and bytes that TrAct adds to a training step, by the formulas of docs/performance.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from hf_tract.core.moments import CPU_MEMORY_LIMIT, PANEL
from hf_tract.core.neighbours import MAX_WIDENING, larger_patches
from hf_tract.core.overlap import best_overlap
from hf_tract.core.patches import PatchSpec

BYTES = 4  # of a number in float32


class Cost(NamedTuple):
    """Holds a number of floating-point operations, and of bytes that are read and written."""

    operations: int
    bytes: int

    def plus(self, other: Cost, times: int = 1) -> Cost:
        """Return the sum of this cost and `times` the other one."""
        operations = self.operations + other.operations * times
        moved = self.bytes + other.bytes * times
        return Cost(operations, moved)


def patch_count(shape: Sequence[int], spec: PatchSpec) -> int:
    """Return b, the number of patches that an operation reads from an input of this shape."""
    if not spec.kernel:
        return math.prod(shape[:-1])
    images = math.prod(shape[: -len(spec.kernel) - 1])
    return images * math.prod(_output_size(shape, spec))


def moment_cost(shape: Sequence[int], spec: PatchSpec) -> Cost:
    """Return the cost of `patch_moments` on the CPU for an input of this shape."""
    n = spec.patch_size(shape)
    if spec.kernel:
        positions = _output_size(shape, spec)
        entries = spec.groups * n**2
        max_numbers = CPU_MEMORY_LIMIT // BYTES
        dim = best_overlap(spec, positions, entries, max_numbers)
        if dim is not None:
            wide = spec
            if MAX_WIDENING * entries <= max_numbers:
                wide = larger_patches(spec, dim, positions, n)
            return _overlap_cost(shape, wide, dim)
    b = patch_count(shape, spec)
    # Only the lower triangle of a symmetric product is computed, a panel of columns at a time.
    panel = n
    if n >= 2 * PANEL:
        panel = PANEL
    triangle = 0
    for column in range(0, n, panel):
        rows = n - column
        triangle += rows * min(panel, rows)
    # The patches are written and read once.
    numbers = math.prod(shape) + spec.groups * 2 * n * b
    return Cost(spec.groups * 2 * triangle * b, BYTES * numbers)


def _overlap_cost(shape: Sequence[int], spec: PatchSpec, dim: int) -> Cost:
    """Return the cost of `overlapping_sums` along `dim`; the letters are those of its docstring."""
    k, s = spec.kernel[dim], spec.stride[dim]
    n = spec.patch_size(shape)
    o = _output_size(shape, spec)[dim]
    columns = patch_count(shape, spec) // o
    blocks = o + (k - 1) // s
    panel = n * s // k
    lines = blocks * panel * columns
    numbers = math.prod(shape) + spec.groups * 2 * (lines + blocks * n * panel)
    return Cost(spec.groups * 2 * n * lines, BYTES * numbers)


def _output_size(shape: Sequence[int], spec: PatchSpec) -> tuple[int, ...]:
    return spec.output_size(shape[-len(spec.kernel) :])


def solve_cost(m: int, n: int, groups: int = 1) -> Cost:
    """Return the cost of factorising C and solving for an m x n weight, once per optimizer step."""
    operations = groups * n**3 // 3 + 2 * m * n**2
    numbers = 2 * groups * n**2 + 2 * m * n
    return Cost(operations, BYTES * numbers)
