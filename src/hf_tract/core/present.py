"""Holds the present step of each weight that a layer runs with, and of each shape that its gradient has."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from hf_tract.core.step import Step


class PresentSteps:
    """Holds steps by the weight and by the shape of the gradient.

    Nearly always there is one. `functional_call` runs a layer with other weights, as in ensembles; and a forward that
    takes a part of the weight, or resizes it, has gradients of several shapes, whose patches may differ in length.
    """

    def __init__(self) -> None:
        """Start without a step."""
        self._own: dict[torch.Size, Step] = {}
        # Of other leaves. A weak reference to the own weight would keep `model.to` from swapping tensors.
        self._others: Any = WeakIdKeyDictionary()
        # Of what gets its gradient in one backward pass alone, by its id.
        self._passing: dict[tuple[int, torch.Size], Step] = {}
        self._pass = -1

    def find(self, leaf: Tensor | None, shape: torch.Size) -> Step | None:
        """Return the step of a leaf; None stands for the layer's own weight."""
        return self._of(leaf).get(shape)

    def begin(self, leaf: Tensor | None, shape: torch.Size, step: Step, was_emptied: bool) -> None:
        """Let a step be the present one.

        Args:
            leaf: the weight; None stands for the layer's own.
            shape: of its gradient.
            step: the new one.
            was_emptied: whether `.grad` was empty, so that steps of other shapes are over, but for those of the pass.
        """
        steps = self._of(leaf)
        for other, before in list(steps.items()):
            if was_emptied and before.backward_pass != step.backward_pass:
                del steps[other]
        steps[shape] = step

    def in_pass(self, backward_pass: int, tensor: Tensor | None, shape: torch.Size, is_new: bool) -> Step:
        """Return the step of a tensor in one backward pass, behind which it is forgotten."""
        if backward_pass != self._pass:
            self._passing.clear()
            self._pass = backward_pass
        key = (id(tensor), shape)
        if is_new or key not in self._passing:
            self._passing[key] = Step(backward_pass)
        return self._passing[key]

    def by_leaf(self) -> Iterator[tuple[Tensor | None, Collection[Step]]]:
        """Yield the leaves with their steps; None stands for the layer's own weight."""
        yield None, self._own.values()
        for leaf, steps in list(self._others.items()):
            yield leaf, steps.values()

    def _of(self, leaf: Tensor | None) -> dict[torch.Size, Step]:
        if leaf is None:
            return self._own
        found: dict[torch.Size, Step] = self._others.setdefault(leaf, {})
        return found
