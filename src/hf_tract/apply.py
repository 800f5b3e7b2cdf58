"""`apply_tract` and `remove_tract`: TrAct on and off, for any model and any training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any
from weakref import ref

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_tract.config import Scope, TrActConfig, TrActError
from hf_tract.core.attach import attach, detach, foreign_forward, preconditioner_of
from hf_tract.core.callers import attach_caller, detach_caller
from hf_tract.core.first_step import FirstStepWatch
from hf_tract.core.patches import patch_size
from hf_tract.core.preconditioner import LayerPreconditioner
from hf_tract.core.tract_class import original_class
from hf_tract.core.weights import is_frozen
from hf_tract.discovery.first_layer import FirstLayer, LayerSelection, find_first_layers, find_functional_callers

logger = logging.getLogger(__name__)


class TrActHandle:
    """What `apply_tract` returns: the layers taken, and the way to take TrAct off again.

    As a context manager it removes TrAct on leaving.
    """

    def __init__(self, model: nn.Module, layers: list[FirstLayer], config: TrActConfig) -> None:
        """Made by `apply_tract`."""
        self.layers, self.config = layers, config
        self.first_step: FirstStepWatch | None = None
        self._model = ref(model)

    @property
    def model(self) -> nn.Module | None:
        """The model that `apply_tract` was given, as long as somebody else keeps it."""
        return self._model()

    def remove(self) -> None:
        """Leaves each layer of the model as it was before; a second call does nothing."""
        if self.first_step is not None:
            self.first_step.stop()
        for layer in self.layers:
            detach(layer.module)
        if self.model is not None:
            remove_tract(self.model)  # also copies that a library put in a layer's place

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Says that the backward inside is not the step's last, for engines that keep gradients outside of `.grad`.

        Under FSDP and ZeRO without accelerate, every micro-step but the last goes inside, forward and backward. Everywhere
        else `.grad` itself tells when a step begins, and this does nothing.
        """
        preconditioners = list(self._preconditioners().values())
        for preconditioner in preconditioners:
            preconditioner.open_no_syncs += 1
        try:
            yield
        finally:
            for preconditioner in preconditioners:
                preconditioner.open_no_syncs -= 1

    def stats(self) -> dict[str, dict[str, float]]:
        """Returns figures of the optimizer step so far, by layer, as this process sees them; computed when asked for.

        `grad_norm_raw` and `grad_norm` are the norm of the weight's gradient before and after the preconditioning (before
        clipping and before ranks are averaged, in the loss's scale); `condition` estimates the condition number of
        C + lam I; `mean_eigenvalue` is that of C, the mean square of what the layer reads. A layer that has had no backward
        yet is left out.
        """
        return {name: stats for name, layer in self._preconditioners().items() if (stats := layer.stats())}

    def summary(self) -> str:
        """Returns the settings and the layers in one line."""
        return " ".join(repr(self).split())

    def _preconditioners(self) -> dict[str, LayerPreconditioner]:
        """Returns those of the layers taken, and of copies of them that the model now has."""
        modules: dict[str, nn.Module] = {layer.name: layer.module for layer in self.layers}
        known = {id(module) for module in modules.values()}
        for name, module in () if self.model is None else self.model.named_modules():
            if preconditioner_of(module) is not None and id(module) not in known:
                modules[name] = module
        found = {name: preconditioner_of(module) for name, module in modules.items()}
        return {name: preconditioner for name, preconditioner in found.items() if preconditioner is not None}

    def __enter__(self) -> TrActHandle:
        """The handle itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Removes TrAct."""
        self.remove()

    def __repr__(self) -> str:
        """Settings and layers, a line each."""
        lines = [
            f"  {layer.name}: {original_class(type(layer.module)).__name__}, n={patch_size(layer.module)} ({layer.source})"
            for layer in self.layers
        ]
        return "\n".join([f"TrAct(lam={self.config.lam:g}, scope={self.config.scope!r})", *lines])


def apply_tract(
    model: nn.Module,
    lam: float = 0.1,
    layers: LayerSelection = "auto",
    scope: Scope = "global",
    *,
    example_batch: Any = None,
    process_group: Any = None,
) -> TrActHandle:
    """Lets the first layer of `model` learn by TrAct, whatever the optimizer and the training loop.

    From now on the gradient of the layer's weight W, flattened to m x n, is `grad_W @ inv(C + lam I)`, where
    C = (1/b) sum of p p^T over all b patches p whose gradient is in grad_W: since `.grad` was last empty, over accumulated
    micro-steps and all ranks. Forward values, other gradients, names and the state dict stay as they are. On a model that
    has TrAct already the new settings replace all old ones. Before or after `prepare`, `torch.compile` and DDP makes no
    difference. If the first optimizer step ends without a preconditioned gradient, or with pixels of a scale that `lam` is not
    meant for, a warning says so.

    Args:
        model: any model.
        lam: damping, in the units of C's eigenvalues, so of squared normalised pixels.
        layers: "auto", or names, glob patterns or modules: see `find_first_layers`.
        scope: "global" for one C per optimizer step, over accumulated micro-steps and all ranks; "local" for one per
            forward call of each process, as in the paper's code.
        example_batch: for "auto", where the library's own guesses do not fit: see `find_first_layers`.
        process_group: the data-parallel ranks that share C, the default group where None. Each of them must run the layer's
            backward equally often.

    Returns:
        A handle: `remove()`, `stats()`, `no_sync()`; also a context manager.

    Raises:
        TrActError: for a setting that is none, layers that match nothing, are frozen or have a forward that another library
            replaced, and a model without a layer. The model is left as it was.

    Source:
        Petersen, Borgelt, Ermon: TrAct, NeurIPS 2024, arXiv 2410.23970, section 3.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(), nn.Linear(32, 10))
        >>> with apply_tract(model, lam=0.1) as handle:
        ...     print(handle)
        TrAct(lam=0.1, scope='global')
          0: Conv2d, n=48 (reached first by the pixels)
    """
    config = TrActConfig(lam=lam, scope=scope)  # checked before the search
    found = find_first_layers(model, layers, example_batch)
    by_name = not (isinstance(layers, str) and layers == "auto")
    names: str | tuple[str, ...] = tuple(layer.name for layer in found) if by_name else "auto"
    config = dataclasses.replace(config, layers=names)
    frozen = [layer.name for layer in found if is_frozen(layer.module)]
    if frozen and by_name:
        raise TrActError(
            f"`layers` (={layers!r}) names {', '.join(frozen)}, which is frozen; TrAct acts on a weight's gradient: "
            f"set `requires_grad=True` on it or name another layer."
        )
    trainable = [layer for layer in found if layer.name not in frozen]  # such as LoRA's layer beside its frozen base
    if not trainable:
        logger.warning(FROZEN, ", ".join(frozen), frozen[0])
    found = trainable or found
    for layer in found:
        if foreign := foreign_forward(layer.module):
            raise TrActError(
                f"`model` has a first layer ({layer.name}) whose forward was replaced by {foreign}, under which TrAct cannot "
                f"act: call `apply_tract` before that is done."
            )
    taken = {id(layer.module) for layer in found}
    for module in model.modules():
        detach_caller(module)
        if id(module) not in taken:
            detach(module)
    for layer in found:
        attach(layer.module, config, process_group)
    for caller, read in find_functional_callers(model, found, example_batch):
        attach_caller(caller, read)
    handle = TrActHandle(model, found, config)
    if trainable:
        handle.first_step = FirstStepWatch(model, [(layer.name, layer.module) for layer in found])
        logger.info("%s", handle.summary())
    _warn_of_unused_parameters(model)
    return handle


def remove_tract(model: nn.Module) -> None:
    """Takes TrAct off every layer of `model`; a model without it stays as it is."""
    for module in model.modules():
        detach(module)
        detach_caller(module)


def _warn_of_unused_parameters(model: nn.Module) -> None:
    if isinstance(model, DistributedDataParallel) and model.find_unused_parameters:
        logger.warning(UNUSED_PARAMETERS)


UNUSED_PARAMETERS = (
    "TrAct: DistributedDataParallel was made with `find_unused_parameters=True`. Every rank must run the first layer's "
    "backward equally often, since they add up their second moments there; where one may skip the layer, use `scope='local'`."
)
FROZEN = (
    "TrAct: the first layer (%s) is frozen, so TrAct does nothing. To train it, call "
    "`model.get_submodule(%r).requires_grad_(True)` before the optimizer is made (torchvision's detectors freeze it unless "
    "`trainable_backbone_layers` counts it, transformers' DETR where its backbone is a ResNet), or name another layer with "
    "`layers=`."
)
