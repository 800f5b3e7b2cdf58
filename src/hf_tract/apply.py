"""`apply_tract` and `remove_tract`: TrAct on and off, for any model and any training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from hf_tract.config import Scope, TrActConfig, TrActError
from hf_tract.layers import FirstLayer, Layers, find_first_layers
from hf_tract.step import LayerStep
from hf_tract.tap import Tapped, columns, is_frozen, tap, untap, untapped_class

logger = logging.getLogger(__name__)


class TrActHandle:
    """What `apply_tract` returns: the layers taken, and the way to take TrAct off again.

    As a context manager it removes TrAct on leaving.
    """

    def __init__(self, layers: list[FirstLayer], config: TrActConfig) -> None:
        """Made by `apply_tract`."""
        self.layers, self.config = layers, config

    def remove(self) -> None:
        """Leaves each layer as it was before; a second call does nothing."""
        for layer in self.layers:
            untap(layer.module)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """For every micro-step of a plain accumulation loop but the last: forward and backward go inside.

        The first layer's gradient is held back until a backward outside of it hands on one gradient, preconditioned
        with the second moment of all of them. accelerate and Trainer need no such call. Under DDP it goes with DDP's own.
        """
        with contextlib.ExitStack() as stack:
            for step in self._steps().values():
                stack.enter_context(step.no_sync())
            yield

    def reset(self) -> None:
        """Forgets the micro-steps gathered so far: for a loop that drops an accumulation half-way."""
        for step in self._steps().values():
            step.reset()

    def stats(self) -> dict[str, dict[str, float]]:
        """Figures of the last optimizer step, by layer, as this process sees them; computed when asked for.

        `grad_norm_raw` and `grad_norm` are the norm of the weight's gradient before and after the preconditioning (before
        clipping and before ranks are averaged, in the loss's scale); `condition` estimates the condition number of
        C + lam I. A layer that has had no backward yet is left out.
        """
        return {name: stats for name, step in self._steps().items() if (stats := step.stats())}

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """What goes from one optimizer step to the next, by layer: nothing, unless `every` or `ema` is set.

        accelerate saves and loads it in `save_state` after `accelerator.register_for_checkpointing(handle)`.
        """
        return {name: state for name, step in self._steps().items() if (state := step.state_dict())}

    def load_state_dict(self, state_dict: Mapping[str, Mapping[str, Any]]) -> None:
        """Goes on from what `state_dict` gave.

        Raises:
            TrActError: for a state of other layers, or of layers of another size. Nothing is loaded then.
        """
        sizes = {layer.name: getattr(layer.module, "groups", 1) * columns(layer.module) ** 2 + 1 for layer in self.layers}
        for name, state in state_dict.items():
            if len(state["kept"]) != sizes.get(name):
                raise TrActError(
                    f"`state_dict` has {len(state['kept'])} numbers for layer {name!r}; this model's layers need {sizes}."
                )
        for name, step in self._steps().items():
            step.load_state_dict(state_dict.get(name))

    def _steps(self) -> dict[str, LayerStep]:
        return {layer.name: layer.module._tract_step for layer in self.layers if isinstance(layer.module, Tapped)}

    def __enter__(self) -> TrActHandle:
        """The handle itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Removes TrAct."""
        self.remove()

    def __repr__(self) -> str:
        """Settings and layers, a line each."""
        lines = [
            f"  {layer.name}: {untapped_class(type(layer.module)).__name__}, n={columns(layer.module)} ({layer.source})"
            for layer in self.layers
        ]
        more = "".join(f", {name}={value:g}" for name, value in self._options().items())
        return "\n".join([f"TrAct(lam={self.config.lam:g}, scope={self.config.scope!r}{more})", *lines])

    def _options(self) -> dict[str, float]:
        """What differs from the method as published."""
        return {name: value for name in ("every", "ema") if (value := getattr(self.config, name)) != getattr(TrActConfig, name)}


def apply_tract(
    model: nn.Module,
    lam: float = 0.1,
    layers: Layers = "auto",
    scope: Scope = "global",
    *,
    every: int = 1,
    ema: float = 0.0,
    scratch_mib: int = 128,
    inputs: Any = None,
    process_group: Any = None,
) -> TrActHandle:
    """Lets the first layer of `model` learn by TrAct, whatever the optimizer and the training loop.

    From now on the gradient of the layer's weight W, flattened to m x n, is `grad_W @ inv(C + lam I)`, where
    C = (1/b) sum of p p^T over all b patches p that the layer saw since the last optimizer step. Forward values, other
    gradients, names and the state dict stay as they are. On a model that has TrAct already the new settings replace the
    old ones. Before or after `prepare`, `torch.compile` and DDP makes no difference.

    Args:
        model: any model.
        lam: damping, in the units of C's eigenvalues, so of squared normalised pixels.
        layers: "auto", or names, glob patterns or modules: see `find_first_layers`.
        scope: "global" for one C per optimizer step, over accumulated micro-steps and all ranks; "local" for one per
            forward call of each process, as in the paper's code.
        every: optimizer steps that one factor serves; 1 is the method.
        ema: decay of a running average of C; 0 is the method. With `every` or `ema` the handle has a state to save.
        scratch_mib: bound on the memory that computing C takes, in MiB.
        inputs: a batch, for "auto" with a model that nothing is known about: see `find_first_layers`.
        process_group: the data-parallel ranks that share C, the default group where None.

    Returns:
        A handle: `remove()`, `no_sync()`, `stats()`; also a context manager.

    Raises:
        TrActError: for a setting that is none, layers that match nothing or are frozen, and a model without a layer.

    Source:
        Petersen, Borgelt, Ermon: TrAct, NeurIPS 2024, arXiv 2410.23970, section 3.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(), nn.Linear(32, 10))
        >>> with apply_tract(model, lam=0.1) as handle:
        ...     print(handle)
        TrAct(lam=0.1, scope='global')
          0: Conv2d, n=48 (reached first by the pixels)
    """
    config = TrActConfig(lam=lam, scope=scope, every=every, ema=ema, scratch_mib=scratch_mib)  # checked before the search
    found = find_first_layers(model, layers, inputs)
    by_name = not (isinstance(layers, str) and layers == "auto")
    names: str | tuple[str, ...] = tuple(layer.name for layer in found) if by_name else "auto"
    config = dataclasses.replace(config, layers=names)
    if frozen := [layer.name for layer in found if is_frozen(layer.module)]:
        if by_name:
            raise TrActError(
                f"`layers` (={layers!r}) names {', '.join(frozen)}, which is frozen; TrAct acts on a weight's gradient: "
                f"set `requires_grad=True` on it or name another layer."
            )
        trainable = [layer for layer in found if layer.name not in frozen]  # such as LoRA's beside its base layer
        if not trainable:
            logger.warning(FROZEN, ", ".join(frozen), frozen[0])
        found = trainable or found
    # An accumulation that was interrupted leaves accelerate's flag behind, and a plain loop would then hold back forever.
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.GradientState().sync_gradients = True
    for layer in found:
        tap(layer.module, config, process_group)
    return TrActHandle(found, config)


def remove_tract(model: nn.Module) -> None:
    """Takes TrAct off every layer of `model`; a model without it stays as it is."""
    for module in model.modules():
        untap(module)


FROZEN = (
    "TrAct: the first layer (%s) is frozen, so TrAct does nothing. To train it, call "
    "`model.get_submodule(%r).requires_grad_(True)` before the optimizer is made (torchvision's detectors freeze it unless "
    "`trainable_backbone_layers` counts it, transformers' DETR where its backbone is a ResNet), or name another layer with "
    "`layers=`."
)
