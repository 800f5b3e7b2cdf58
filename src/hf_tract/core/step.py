"""Holds what one optimizer step of a layer adds up, and what is known of each forward call."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from hf_tract.core.solve import DampedInverse

if TYPE_CHECKING:
    from hf_tract.core.preconditioner import LayerPreconditioner

_numbers = itertools.count()
# An operator takes no Python objects, so it finds its forward call by number.
FORWARD_CALLS: WeakValueDictionary[int, ForwardCall] = WeakValueDictionary()


class ForwardCall:
    """Holds what the backward of one forward call has to know of it."""

    def __init__(self, weight: Tensor, preconditioner: LayerPreconditioner) -> None:
        """Notes a forward call before its operation reads `weight`."""
        self.number = next(_numbers)
        self.preconditioner = preconditioner  # kept alive until the backward
        # A reentrant checkpoint runs this forward inside of a backward pass, and its backward in a pass within that.
        self.backward_pass = torch._C._current_graph_task_id()
        # `functional_call` runs the layer with another parameter than its own.
        self.leaf = weight if weight.is_leaf else None
        self.was_differentiated = False  # with `create_graph=True`
        self.output_grad: Tensor | None = None
        self._has_second_order = False
        FORWARD_CALLS[self.number] = self

    def keep_output_grad(self, grad: Tensor) -> None:
        """Keeps the output's gradient, from which a 16-bit operation's weight gradient is computed again in float32.

        In a graph with second derivatives the weight has more gradient than that, so the operation's own is taken.
        """
        if torch.is_grad_enabled():
            self._has_second_order = True
        self.output_grad = None if self._has_second_order else grad

    def take_output_grad(self) -> Tensor | None:
        """Returns the output's gradient, once."""
        grad = self.output_grad
        self.output_grad = None
        return grad


class Step:
    """Adds up the second moments and the ordinary gradient of one layer over one optimizer step.

    Shape letters: g groups, m outputs, n columns of `weight.flatten(1)`.
    """

    def __init__(self, backward_pass: int) -> None:
        """Begins empty, in this backward pass."""
        self.backward_pass = backward_pass  # the last one that belongs to the step
        self.counted_calls: set[int] = set()  # numbers of the forward calls whose patches are in `sums`
        self.closed = False  # set by the last micro-step, where gradients do not live in `.grad`
        self.sums: Tensor | None = None  # (g * n * n + 1,): sums of p p^T, then the number of patches
        self.grad: Tensor | None = None  # (m, ...), the ordinary gradient
        self.inverse: DampedInverse | None = None

    def handed_on(self, keep: Tensor | None = None) -> Tensor | None:
        """Returns the gradient that the weight has received in this step so far, as `keep_where` masks it."""
        if self.inverse is None or self.grad is None:
            return None
        return keep_where(keep, self.inverse(self.grad))

    def add(self, grad: Tensor, sums: Tensor | None, keep: Tensor | None) -> None:
        """Adds the gradient of one backward and the sums of its patches; None where these are counted already."""
        if self.grad is not None:
            grad = grad + keep_where(keep, self.grad).to(grad.device)
        self.grad = grad
        if sums is None:
            return
        if self.sums is not None:
            sums = sums + keep_where(keep, self.sums).to(sums.device)
        self.sums = sums

    def precondition(self, lam: float) -> tuple[Tensor, DampedInverse]:
        """Returns the step's gradient times inv(C + lam I), by the C of all patches so far, and that inverse."""
        assert self.sums is not None
        assert self.grad is not None
        n = math.prod(self.grad.shape[1:])
        count = self.sums[-1].clamp(min=1)
        moment = (self.sums[:-1] / count).view(-1, n, n)
        self.inverse = DampedInverse(moment, lam)
        return self.inverse(self.grad), self.inverse


def keep_where(keep: Tensor | None, value: Tensor) -> Tensor:
    """Returns `value`, or zeros where the scalar `keep` is false; on the device, so that the host does not wait."""
    if keep is None:
        return value
    return torch.where(keep.to(value.device), value, 0.0)
