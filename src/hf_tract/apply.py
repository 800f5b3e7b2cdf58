"""Puts TrAct on a model and takes it off, for any training loop."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any
from weakref import ref

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_tract.config import Scope, TrActConfig, TrActError
from hf_tract.core.attach import attach, attach_caller, detach, preconditioner_of
from hf_tract.core.first_step import FirstStepWatch
from hf_tract.core.notices import FROZEN, LARGE, LARGE_PATCH, UNUSED_PARAMETERS
from hf_tract.core.patches import patch_size
from hf_tract.core.preconditioner import LayerPreconditioner
from hf_tract.core.tract_class import foreign_forward, original_class
from hf_tract.core.weights import is_frozen
from hf_tract.discovery.callers import find_functional_callers
from hf_tract.discovery.first_layer import FirstLayer, LayerSelection, find_first_layers

logger = logging.getLogger(__name__)


class TrActHandle:
    """Lists the layers of a model that have TrAct, and takes it off again.

    As a context manager it removes TrAct on exit.
    """

    def __init__(self, model: nn.Module, layers: list[FirstLayer], config: TrActConfig) -> None:
        self.layers = layers
        self.config = config
        self.first_step: FirstStepWatch | None = None
        self._model = ref(model)

    def __reduce__(self) -> Any:
        """Leave the handle out of a pickle: a model that holds it loads where hf-tract is not installed."""
        return type(None), ()

    def __copy__(self) -> TrActHandle:
        """Return this handle: the model is the same."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> TrActHandle:
        """Return the handle of a model that is being copied, or this one where the model is not."""
        if id(self.model) not in memo:
            return self
        return TrActHandle(memo[id(self.model)], copy.deepcopy(self.layers, memo), self.config)

    @property
    def model(self) -> nn.Module | None:
        """Return the model that `apply_tract` was given; the handle does not keep it alive."""
        return self._model()

    def remove(self) -> None:
        """Take TrAct off the model; a second call does nothing."""
        # A library may have put a copy in a layer's place.
        for layer in self.layers:
            detach(layer.module)
        if self.model is not None:
            remove_tract(self.model)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Mark a backward inside as not the last of its step, for engines that keep gradients outside of `.grad`.

        Under FSDP and ZeRO without accelerate, run every micro-step but the last inside, forward and backward.
        Everywhere else `.grad` itself shows when a step begins, and this does nothing.
        """
        with contextlib.ExitStack() as stack:
            for _, preconditioner in self._preconditioners():
                stack.enter_context(preconditioner.steps.left_open())
            yield

    def stats(self) -> dict[str, dict[str, float]]:
        """Compute figures of the optimizer step so far, by layer, as this process sees them.

        Returns:
            For each layer that has had a backward: `grad_norm_raw` and `grad_norm`, the norm of the weight's gradient
            before and after preconditioning (before clipping and before ranks are averaged, in the loss's scale);
            `condition`, an estimate of the condition number of C + lam I; `mean_eigenvalue` of C, the mean square of
            what the layer reads. Empty once TrAct is off; a layer that was exchanged or frozen has no figures.
        """
        if self.first_step is not None:
            self.first_step.look_for_exchanged()
        stats = {name: preconditioner.stats() for name, preconditioner in self._preconditioners()}
        return {name: figures for name, figures in stats.items() if figures}

    def summary(self) -> str:
        """Return the settings and the layers in one line."""
        return " ".join(repr(self).split())

    def _preconditioners(self) -> list[tuple[str, LayerPreconditioner]]:
        """Return names and preconditioners of the layers, and of copies that a library has put in their place."""
        modules = [(layer.name, layer.module) for layer in self.layers if self._has(layer)]
        if self.model is not None:
            modules += self.model.named_modules()
        names: dict[LayerPreconditioner, str] = {}
        for name, module in modules:
            preconditioner = preconditioner_of(module)
            if preconditioner is not None:
                names.setdefault(preconditioner, name)
        return [(name, preconditioner) for preconditioner, name in names.items()]

    def _has(self, layer: FirstLayer) -> bool:
        """Return whether a layer is still in the model, where that still exists."""
        return self.model is None or layer.module in self.model.modules()

    def __enter__(self) -> TrActHandle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        lines = [f"TrAct(lam={self.config.lam:g}, scope={self.config.scope!r})"]
        for layer in self.layers:
            kind = original_class(type(layer.module)).__name__
            source = layer.source if self._has(layer) else "exchanged since, without TrAct"
            lines.append(f"  {layer.name}: {kind}, n={patch_size(layer.module)} ({source})")
        return "\n".join(lines)


def apply_tract(
    model: nn.Module,
    lam: float = 0.1,
    layers: LayerSelection = "auto",
    scope: Scope = "global",
    *,
    example_batch: Any = None,
    process_group: Any = None,
) -> TrActHandle:
    """Train the first layer of `model` by TrAct from now on, whatever the optimizer and the training loop.

    Its weight's gradient, (m, n), is then `grad_W @ inv(C + lam I)`, C = (1/b) sum of p p^T over all b patches p since
    `.grad` was last empty, on all ranks. Nothing else about the model changes. Call it before the model is
    sharded (FSDP, DeepSpeed), so before `prepare` there, and again for new settings, which replace all old ones.

    Args:
        model: any model.
        lam: as in `TrActConfig`.
        layers: as in `TrActConfig`, or modules.
        scope: as in `TrActConfig`.
        example_batch: as in `find_first_layers`.
        process_group: the data-parallel ranks that share C; None for the default group. Each of them must run the
            layer's backward equally often.

    Returns:
        A handle with `remove()`, `stats()` and `no_sync()`, which is also a context manager.

    Raises:
        TrActError: for a setting, a layer or a model that TrAct cannot work with; the model is left as it was.

    Source:
        Petersen, Borgelt, Ermon: TrAct, NeurIPS 2024, arXiv 2410.23970, section 3.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(), nn.Linear(32, 10))
        >>> with apply_tract(model, lam=0.1) as handle:
        ...     print(handle)
        TrAct(lam=0.1, scope='global')
          0: Conv2d, n=48 (reached first by the pixels)
    """
    config = TrActConfig(lam=lam, scope=scope)
    found = _find_layers(model, layers, example_batch)
    if layers != "auto":
        config = dataclasses.replace(config, layers=tuple(layer.name for layer in found))
    callers = find_functional_callers(model, found, example_batch)
    # All checks have passed: only now is the model changed.
    _replace(model, found, callers, config, process_group)
    handle = TrActHandle(model, found, config)
    _watch_first_step(handle, model)
    return handle


def remove_tract(model: nn.Module) -> None:
    """Take TrAct off every layer of `model`; a model without it stays as it is."""
    for module in model.modules():
        detach(module)


def _find_layers(model: nn.Module, layers: LayerSelection, example_batch: Any) -> list[FirstLayer]:
    """Return the layers that get TrAct.

    Raises:
        TrActError: for a layer that TrAct cannot act on.
    """
    found = find_first_layers(model, layers, example_batch)
    frozen = [layer.name for layer in found if is_frozen(layer.module)]
    if frozen and layers != "auto":
        raise TrActError(
            f"`layers` (={layers!r}) names {', '.join(frozen)}, which is frozen; TrAct acts on a weight's gradient: "
            f"set `requires_grad=True` on it or name another layer."
        )
    if len(frozen) < len(found):
        found = [layer for layer in found if layer.name not in frozen]
        # LoRA means to train a layer beside the frozen one.
        left_out = [name for name in frozen if not name.endswith("base_layer")]
        if left_out:
            logger.warning("TrAct: %s is frozen and has no TrAct; other first layers have it.", ", ".join(left_out))
    for layer in found:
        foreign = foreign_forward(layer.module)
        if foreign:
            raise TrActError(
                f"`model` has a first layer ({layer.name}) whose forward was replaced by {foreign}, under which "
                f"TrAct cannot act: call `apply_tract` before that is done."
            )
    return found


def _replace(
    model: nn.Module,
    taken: list[FirstLayer],
    callers: list[tuple[nn.Module, list[nn.Module]]],
    config: TrActConfig,
    process_group: Any,
) -> None:
    """Apply TrAct to the layers and to the modules that use their weights directly, and take it off all others."""
    layers = {layer.module for layer in taken}
    for module in model.modules():
        if module not in layers:
            detach(module)
    for layer in taken:
        attach(layer.module, config, process_group)
    for caller, read in callers:
        attach_caller(caller, read)


def _watch_first_step(handle: TrActHandle, model: nn.Module) -> None:
    """Log which layers have TrAct, and have the first optimizer step checked."""
    if all(is_frozen(layer.module) for layer in handle.layers):
        # With what wrappers such as DDP add.
        full_names = {module: name for name, module in model.named_modules()}
        names = ", ".join(layer.name for layer in handle.layers)
        logger.warning(FROZEN, names, full_names[handle.layers[0].module])
    else:
        handle.first_step = FirstStepWatch(model, [(layer.name, layer.module) for layer in handle.layers])
        logger.info("%s", handle.summary())
        for layer in handle.layers:
            if patch_size(layer.module) > LARGE_PATCH:
                logger.warning(LARGE, layer.name, patch_size(layer.module))
    if isinstance(model, DistributedDataParallel) and model.find_unused_parameters:
        logger.warning(UNUSED_PARAMETERS)
