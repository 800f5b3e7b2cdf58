"""Checks the layers after the first optimizer step, and warns if TrAct did not work as it should.

Later it looks now and then whether they are still in the model.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any
from weakref import ref

from torch import nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from hf_tract.core.attach import preconditioner_of
from hf_tract.core.notices import advice_on_lam
from hf_tract.core.optimizer_hook import call_after_steps, has_gradients, updated_by
from hf_tract.core.preconditioner import PRECONDITIONERS
from hf_tract.core.weights import is_frozen, mask_of, weight_parameters

logger = logging.getLogger(__name__)

_watches: list[FirstStepWatch] = []
# After so many steps of other optimizers, something is said.
STEPS_ELSEWHERE = 100
# Every so many steps of an optimizer, the model is looked through.
STEPS_BETWEEN = 100


class FirstStepWatch:
    """Waits for the first step of an optimizer that holds a layer's weight, and then checks the layers."""

    def __init__(self, model: nn.Module, layers: Sequence[tuple[str, nn.Module]]) -> None:
        """Start waiting, in place of any earlier watch on `model`.

        Args:
            model: the model that TrAct was applied to; only a weak reference to it is kept.
            layers: the names and modules of the layers that have TrAct.
        """
        self._model = ref(model, lambda _: self._lose_model())
        self._layers = [(name, ref(layer), preconditioner_of(layer)) for name, layer in layers]
        # The layers of a model that is gone.
        self._lost: list[str] = []
        # Of each optimizer: some loops have one for each parameter.
        self._steps: Any = WeakIdKeyDictionary()
        self._looked = False
        self._looked_elsewhere = False
        for watch in list(_watches):
            if watch._model() is None or watch._model() is model:
                watch.stop()
        _watches.append(self)
        call_after_steps(_after_step)

    def stop(self) -> None:
        """Stop waiting."""
        if self in _watches:
            _watches.remove(self)

    def _lose_model(self) -> None:
        """Wait on, with names alone, if nothing has trained the model: a script may have made it anew."""
        self._lost = [name for name, _ in self._layers_now()]
        if self._looked or self._looked_elsewhere or self._has_acted() or not self._lost:
            self.stop()
        self._layers = []

    def _has_acted(self) -> bool:
        """Return whether a layer has had a preconditioned gradient."""
        for _, _, preconditioner in self._layers:
            if preconditioner is not None and preconditioner.last_step is not None:
                return True
        return False

    def look(self) -> None:
        """Check each layer, unless this has been done already."""
        if self not in _watches or self._looked:
            return
        self._looked = True
        self.look_for_exchanged()
        copies = self._trained_copies()
        for name, layer in self._layers_now():
            # peft's `modules_to_save` trains a copy, and freezes the layer itself.
            if layer is not None and not (copies and is_frozen(layer)):
                _check(name, layer)
        for name, layer in copies:
            _check(name, layer)

    def look_for_exchanged(self) -> None:
        """Warn of layers that are no longer in the model, once for each."""
        if self._model() is None:
            return
        gone = [name for name, layer in self._layers_now() if layer is None]
        for name in gone:
            logger.warning(
                "TrAct: %s was exchanged for another module after TrAct was applied, and what is there now has "
                "its ordinary gradient. Call `apply_tract` again after the model is changed. This is shown once.",
                name,
            )
        self._layers = [known for known in self._layers if known[0] not in gone]
        if not self._layers_now():
            self.stop()

    def after_step(self, optimizer: Optimizer) -> None:
        """Check the layers if `optimizer` holds the weight of one."""
        steps = self._steps.get(optimizer, 0) + 1
        self._steps[optimizer] = steps
        if self._looked:
            if steps % STEPS_BETWEEN == 0:
                self.look_for_exchanged()
            return
        model = self._model()
        if model is not None and updated_by(optimizer, self._weights_of(model)):
            # A step without gradients only makes the optimizer's state, as torch does before it loads one.
            if steps == STEPS_ELSEWHERE or has_gradients(model.parameters()):
                self.look()
        elif steps == STEPS_ELSEWHERE and not self._looked_elsewhere:
            self._looked_elsewhere = True
            self._look_elsewhere()

    def _weights_of(self, model: nn.Module) -> list[nn.Parameter]:
        """Return the layers' weights; all of the model's where a layer was replaced or an engine keeps its weight."""
        layers = [layer for _, layer in self._layers_now()]
        weights: list[nn.Parameter] = []
        for layer in layers:
            weights += weight_parameters(layer)
        if None in layers or not weights:
            return list(model.parameters())
        return weights

    def _look_elsewhere(self) -> None:
        """Check layers whose weights an optimizer holds in another form, and warn if TrAct has acted on no model."""
        names = self._lost + [name for name, _ in self._layers_now()]
        if self._model() is None:
            self.stop()
        if not names:
            return
        if self._has_acted():
            self.look()
            return
        for preconditioner in PRECONDITIONERS.values():
            if preconditioner.last_step is not None:
                return
        logger.warning(
            "TrAct: optimizers have taken %d steps, and none of them holds %s "
            "of the model that TrAct was applied to. Some libraries train a "
            "copy, or a model that they build themselves (skorch, "
            "ultralytics): apply TrAct to that one, behind its "
            "construction. This is shown once.",
            STEPS_ELSEWHERE,
            " or ".join(names),
        )

    def _trained_copies(self) -> list[tuple[str, nn.Module]]:
        """Return names and modules of copies of the layers in the model that TrAct has acted on."""
        model = self._model()
        if model is None:
            return []
        known = [preconditioner for _, _, preconditioner in self._layers]
        copies = []
        for name, module in model.named_modules():
            preconditioner = preconditioner_of(module)
            if preconditioner is None or preconditioner in known:
                continue
            if preconditioner.last_step is not None:
                copies.append((name, module))
        return copies

    def _layers_now(self) -> list[tuple[str, nn.Module | None]]:
        """Return pairs of a name and its layer, or None in place of a layer that is no longer in the model.

        Layers that TrAct was removed from are left out.
        """
        model = self._model()
        modules = set() if model is None else set(model.modules())
        layers: list[tuple[str, nn.Module | None]] = []
        for name, reference, preconditioner in self._layers:
            layer = reference()
            if preconditioner is not None and preconditioner.active:
                layers.append((name, layer if layer in modules else None))
        return layers


def _check(name: str, layer: nn.Module) -> None:
    """Warn if the layer has had no preconditioned gradient, if it is masked, or if its pixels do not fit `lam`."""
    preconditioner = preconditioner_of(layer)
    if preconditioner is None:
        return
    step = preconditioner.last_step
    mask = mask_of(layer)
    if mask:
        logger.warning(
            "TrAct: the weight of %s seems to be masked (by %s). "
            "Preconditioning mixes its entries, so the gradient of those "
            "behind the mask moves the others, and the layer does not end "
            "where it would without TrAct. Name another layer with "
            "`layers=`, or train without TrAct. This is shown once.",
            name,
            mask,
        )
    if step is None:
        logger.warning(
            "TrAct: the first optimizer step has ended, and %s has returned no "
            "preconditioned gradient (%s). Usually the forward did not run the "
            "layer with gradients on (a batch without images, a frozen part), "
            "another library replaced its forward after TrAct was applied "
            "(apply TrAct after it), or its weight is used outside of the "
            "layer. This is shown once.",
            name,
            _reason(layer),
        )
    elif step.inverse is not None:
        advice = advice_on_lam(step.inverse.mean_eigenvalue, preconditioner.config.lam)
        if advice:
            logger.warning("TrAct: %s: %s This is shown once.", name, advice)


def _reason(layer: nn.Module) -> str:
    if any(parameter.grad is not None for parameter in weight_parameters(layer)):
        return "its weight has a gradient that did not come through the layer"
    return "its weight has no gradient"


def _after_step(optimizer: Optimizer) -> None:
    for watch in list(_watches):
        watch.after_step(optimizer)
