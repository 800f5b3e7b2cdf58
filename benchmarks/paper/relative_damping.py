"""Lets TrAct take lam relative to each layer's input, for layers whose inputs are not pixels."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch

from hf_tract.core.solve import DampedInverse
from hf_tract.core.step import Step


@contextlib.contextmanager
def relative_damping() -> Iterator[None]:
    """Multiply lam by tr(C) / n, the mean square of what the layer reads, in each step inside."""
    absolute = Step.factorise

    def factorise(step: Step, lam: float, dtype: torch.dtype | None = None) -> DampedInverse:
        assert step.total is not None
        sums, count = step.total
        mean_square = sums.diagonal(dim1=-2, dim2=-1).mean() / count
        return absolute(step, lam * float(mean_square), dtype)

    with mock.patch.object(Step, "factorise", factorise):
        yield
