"""Tells once, when the first optimizer step ends, that nothing was preconditioned, or pixels of another scale."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from hf_tract.core.attach import TrActLayer, preconditioner_of
from hf_tract.core.notices import look_at_scale
from hf_tract.core.weights import weight_parameters

logger = logging.getLogger(__name__)


class FirstStepWatch:
    """Waits for the first step of an optimizer that holds a layer's weight, and then looks at the layers."""

    def __init__(self, model: nn.Module, layers: Sequence[tuple[str, nn.Module]]) -> None:
        """Begins to wait.

        Args:
            model: that TrAct was applied to. It is not kept alive.
            layers: names and layers that were taken.
        """
        self._model = ref(model)
        self._layers = [(name, ref(layer)) for name, layer in layers]
        for watch in [watch for watch in _watches if watch._model() is model]:  # new settings replace old ones
            watch.stop()
        _watches.append(self)
        _register_once()

    def stop(self) -> None:
        """Waits no longer."""
        if self in _watches:
            _watches.remove(self)

    def look(self) -> None:
        """Warns of each layer that has handed on nothing, unless that was done."""
        if self not in _watches:
            return
        self.stop()
        model = self._model()
        inside = {} if model is None else {id(module): name for name, module in model.named_modules()}
        for name, reference in self._layers:
            layer = reference()
            if layer is None or id(layer) not in inside:
                logger.warning(EXCHANGED, name)
                continue
            preconditioner = preconditioner_of(layer)
            step = None if preconditioner is None else preconditioner.last_step
            if preconditioner is not None and step is None:
                logger.warning(NOTHING_HANDED_ON, name, _reason(layer))
            elif preconditioner is not None and step is not None and step.inverse is not None:
                look_at_scale(name, step.inverse.mean_eigenvalue, preconditioner.config.lam)

    def after_step(self, optimizer: Optimizer) -> None:
        """Looks, if `optimizer` holds a weight of the layers."""
        model = self._model()
        if model is None:
            self.stop()
            return
        inside = {id(module) for module in model.modules()}
        layers = [layer for _, reference in self._layers if (layer := reference()) is not None and id(layer) in inside]
        weights = [parameter for layer in layers for parameter in weight_parameters(layer)]
        # Where a layer was exchanged, or an engine keeps its weight, any parameter of the model tells.
        whole = len(layers) < len(self._layers) or not weights
        mine = {id(parameter) for parameter in (model.parameters() if whole else weights)}
        if any(id(parameter) in mine for group in optimizer.param_groups for parameter in group["params"]):
            self.look()


_watches: list[FirstStepWatch] = []


@functools.cache
def _register_once() -> None:
    """Lets every optimizer tell of its steps: torch's hooks cannot be removed while they run, so this one stays."""
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    if torch.compiler.is_compiling():  # a compiled optimizer, which must not be cut here
        return
    for watch in list(_watches):
        watch.after_step(optimizer)


def _reason(layer: nn.Module) -> str:
    if not isinstance(layer, TrActLayer):
        return "TrAct was taken off again"
    if any(parameter.grad is not None for parameter in weight_parameters(layer)):
        return "its weight has a gradient that did not come through the layer"
    return "its weight has no gradient"


EXCHANGED = (
    "TrAct: %s was exchanged for another module after TrAct was applied, and what is there now has its ordinary gradient. "
    "Call `apply_tract` again after the model is changed. This is said once."
)
NOTHING_HANDED_ON = (
    "TrAct: the first optimizer step has ended, and %s has handed on no preconditioned gradient (%s). Usually the forward did "
    "not run the layer with gradients on (a batch without images, a frozen part), another library replaced its forward after "
    "TrAct was applied (apply TrAct after it), or its weight is used outside of the layer. This is said once."
)
