"""Operations and bytes of what TrAct adds to a training step: the formulas of docs/performance.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from hf_tract.core.moments import MAX_OVERLAP_COST, PANEL, best_overlap
from hf_tract.core.patches import PatchSpec


class Cost(NamedTuple):
    """Floating-point operations, and bytes read and written in float32."""

    operations: int
    bytes: int


def patches(shape: Sequence[int], spec: PatchSpec) -> int:
    """b: how many patches a layer reads of an input of this shape, all images together."""
    if not spec.kernel:
        return math.prod(shape[:-1])
    dims = len(spec.kernel)
    return math.prod(shape[: -dims - 1]) * math.prod(spec.output_size(shape[-dims:]))


def moment_cost(shape: Sequence[int], spec: PatchSpec) -> Cost:
    """Of `moments.patch_moments` on the CPU for an input of this shape."""
    n, b, read = spec.patch_size(shape), patches(shape, spec), math.prod(shape)
    if spec.kernel:
        positions = spec.output_size(shape[-len(spec.kernel) :])
        dim, share = best_overlap(spec, positions)
        if share <= MAX_OVERLAP_COST:
            kernel, stride = spec.kernel[dim], spec.stride[dim]
            blocks, panel = positions[dim] + (kernel - 1) // stride, n * stride // kernel
            strips = blocks * panel * b // positions[dim]
            moved = read + spec.groups * 2 * (strips + blocks * n * panel)
            return Cost(spec.groups * 2 * n * strips, 4 * moved)
    panel = PANEL if n >= 2 * PANEL else n
    triangle = sum((n - j) * min(panel, n - j) for j in range(0, n, panel))
    return Cost(spec.groups * 2 * triangle * b, 4 * (read + spec.groups * 2 * n * b))


def solve_cost(rows: int, columns: int, groups: int = 1) -> Cost:
    """Of one factorisation and solve for the whole weight's m `rows` and n `columns`: once an optimizer step."""
    return Cost(groups * columns**3 // 3 + 2 * rows * columns**2, 4 * (2 * groups * columns**2 + 2 * rows * columns))
