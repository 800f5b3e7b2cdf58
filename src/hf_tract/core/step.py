"""Holds the totals of one optimizer step of a layer, and what a backward needs to know about its forward call."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor

from hf_tract.core.accumulation import SeenGrads
from hf_tract.core.moments import PatchSums
from hf_tract.core.solve import DampedInverse

_numbers = itertools.count()
# An operator takes no Python objects, so it finds its forward call by number.
FORWARD_CALLS: WeakValueDictionary[int, ForwardCall] = WeakValueDictionary()


class ForwardCall:
    """Holds what a backward needs to know about the forward call that it belongs to."""

    def __init__(self, weight: Tensor, preconditioner: Any, is_given: bool = False) -> None:
        """Watch a forward call.

        Args:
            weight: of the call.
            preconditioner: that of the layer.
            is_given: whether the weight stands in the place of the layer's own parameter.
        """
        self.number = next(_numbers)
        # A `LayerPreconditioner`; by this reference the graph keeps it alive until the backward.
        self.preconditioner = preconditioner
        # A reentrant checkpoint runs the forward call inside a backward pass, and the backward in a pass nested in it.
        self.backward_pass = torch._C._current_graph_task_id()
        # `functional_call` runs the layer with a parameter other than its own.
        self.leaf = weight if weight.is_leaf else None
        # It also runs it with weights that other parameters computed, as of a hypernetwork: each has its own gradient.
        self.computed = weight if is_given and not weight.is_leaf else None
        # Whether the weight's gradient was taken with `create_graph=True`.
        self.was_differentiated = False
        # Whether the running backward pass has `create_graph=True`.
        self.creates_graph = False
        self.output_grad: Tensor | None = None
        self._has_second_order = False
        FORWARD_CALLS[self.number] = self

    def keep_output_grad(self, grad: Tensor) -> None:
        """Keep the output's gradient, from which a 16-bit operation's weight gradient is recomputed in float32.

        With second derivatives, not all of the weight's gradient comes through the output. Then none is kept, and the
        operation's own weight gradient is used.
        """
        if torch.is_grad_enabled():
            self._has_second_order = True
        self.output_grad = None if self._has_second_order else grad


class Step:
    """Adds up the second moments and the ordinary gradient of one layer over one optimizer step.

    Shape letters: g groups, m outputs, n columns of `weight.flatten(1)`.
    """

    def __init__(self, backward_pass: int, began_empty: bool = False) -> None:
        # Whether `.grad` was None when the step began; then zeros in it may be what the step has added up.
        self.began_empty = began_empty
        # What `.grad` held when the step began, or when an optimizer used it; the step is over when it holds other
        # tensors, as of a penalty that comes before the loss.
        self.seen_grads: SeenGrads | None = None
        # The last backward pass that belongs to the step.
        self.backward_pass = backward_pass
        # The forward calls whose patches are in `total`.
        self.counted_calls: WeakSet[ForwardCall] = WeakSet()
        # Set by the last micro-step; used only where an engine keeps gradients outside of `.grad`.
        self.closed = False
        self.total: PatchSums | None = None
        # (m, ...): the ordinary gradient.
        self.grad: Tensor | None = None
        self.inverse: DampedInverse | None = None

    @contextlib.contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Leave the step as it was if an error ends this context: then nothing has reached `.grad` either."""
        before = dict(vars(self))
        try:
            yield
        except BaseException:
            vars(self).update(before)
            raise

    def returned(self, keep: Tensor | None = None) -> Tensor | None:
        """Return the step's gradient times inv(C + lam I), masked by `keep`; None before the first factorisation.

        Before a backward adds to the step, it is the gradient that the weight has got in this step so far.
        """
        if self.inverse is None or self.grad is None:
            return None
        return keep_where(keep, self.inverse(self.grad))

    def adds_up_to_zero(self) -> bool:
        """Return whether all gradients of the step so far sum to zero."""
        return self.grad is not None and not bool(self.grad.any())

    def add(self, grad: Tensor, new: PatchSums | None, keep: Tensor | None) -> None:
        """Add the gradient of one backward, and the sums over its patches, or None if these are counted already."""
        if self.grad is not None:
            grad = grad + keep_where(keep, self.grad).to(grad.device)
        self.grad = grad
        if new is None:
            return
        if self.total is not None:
            sums, count = masked(self.total, keep)
            # DataParallel's replicas are on several devices.
            device = new.sums.device
            if isinstance(count, Tensor):
                count = count.to(device)
            new = PatchSums(new.sums + sums.to(device), new.patch_count + count)
        self.total = new

    def factorise(self, lam: float, dtype: torch.dtype | None = None) -> DampedInverse:
        """Factorise C + lam I, C being over all patches so far, and return the inverse.

        Args:
            lam: the damping.
            dtype: the precision of the factor; by default that of the sums.
        """
        assert self.total is not None
        self.inverse = DampedInverse(*self.total, lam, dtype)
        return self.inverse


def masked(total: PatchSums, keep: Tensor | None) -> PatchSums:
    """Return `total`, or sums over no patches if the scalar tensor `keep` is false."""
    if keep is None:
        return total
    return PatchSums(keep_where(keep, total.sums), keep.to(total.sums) * total.patch_count)


def keep_where(keep: Tensor | None, value: Tensor) -> Tensor:
    """Return `value`, or zeros if the scalar tensor `keep` is false; the device decides, so the host does not wait."""
    if keep is None:
        return value
    return torch.where(keep.to(value.device), value, 0.0)
