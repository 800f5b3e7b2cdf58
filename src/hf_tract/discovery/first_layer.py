"""Finds the layer that the pixels reach first: by request, by timm's config, by a trial run, or by module order."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from hf_tract.config import TrActError
from hf_tract.core.sharding import is_sharded
from hf_tract.discovery.inputs import pixel_argument_name
from hf_tract.discovery.probe import Probe
from hf_tract.discovery.requests import list_some, requested_layers
from hf_tract.discovery.trials import probe_example, probe_guesses
from hf_tract.discovery.wrappers import layers_by_name, modules_by_name, unwrap, without_wrappers

LayerSelection = str | nn.Module | Sequence[str | nn.Module]

# Names that models give their vision part: this grows with the ecosystem.
VISION_TOWERS = (
    "vision_model",
    "vision_tower",
    "vision_encoder",
    "image_encoder",
    "visual",
)

# How a layer was found.
NAMED = "named by the user"
BY_TIMM = "timm's first_conv"
REACHED = "reached first by the pixels"
IN_PARENT = "reached first by the pixels, in its parent's forward"
BY_ORDER = "first in module order"

# The operation that reads words; a guessed batch has pixels in their place.
LOOK_UP = "embedding"
logger = logging.getLogger(__name__)


class FirstLayer(NamedTuple):
    """Holds a layer that TrAct acts on: its name in the unwrapped model, the layer, and how it was found."""

    name: str
    module: nn.Module
    source: str


def find_first_layers(
    model: nn.Module, layers: LayerSelection = "auto", example_batch: Any = None
) -> list[FirstLayer]:
    """Find the layers that the pixels reach first, in that order; nearly always there is only one.

    Args:
        model: any model, wrapped or not (DDP, FSDP, `torch.compile`).
        layers: "auto" to find them, or a request: a name, a glob pattern, a module, or several of these.
        example_batch: for "auto", if guessed batches do not fit the forward, or the forward takes several inputs: a
            tensor, a tuple of positional arguments, or a mapping of keyword arguments
            ({"batch": batch} for a forward that takes a mapping). It is only run through copies of the model.

    Returns:
        Name, module and source of each.

    Raises:
        TrActError: if no layer is found; if a request is no convolution or linear layer; if the pixels reach another
            kind of weight first; if the forward fails on `example_batch`, with that error as the cause.

    Examples:
        >>> find_first_layers(nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(), nn.Linear(32, 10)))[0].name
        '0'
    """
    sharded = is_sharded(model)
    model = unwrap(model)
    if not isinstance(layers, str) or layers != "auto":
        return _by_request(model, layers)
    _check_searchable(model, example_batch)
    found = _by_timm(model) if example_batch is None or sharded else []
    # The hooks of a sharded model would mistake a trial run for a training step.
    if not found and not sharded:
        found = _by_probe(model, example_batch)
    return found or _by_order(model)


def _by_request(model: nn.Module, layers: LayerSelection) -> list[FirstLayer]:
    if isinstance(layers, (str, nn.Module)):
        layers = [layers]
    requests = list(layers) if isinstance(layers, Iterable) else []
    if not requests:
        raise TrActError(
            f"`layers` (={layers!r}) must be 'auto', a layer's name or pattern, a module, or several of these."
        )
    found = requested_layers(model, requests)
    return [FirstLayer(name, layer, NAMED) for name, layer in found.items()]


def _check_searchable(model: nn.Module, example_batch: Any) -> None:
    """Raise an error for a model that reads no pixels, or has no layer for them."""
    if example_batch is None and pixel_argument_name(model) == "input_ids":
        raise TrActError(
            f"`model` (={type(model).__name__}) reads `input_ids` and no "
            "pixels: its first layer is an embedding already. Name a layer "
            "with `layers=` if that is what you want."
        )
    modules = list(model.modules())
    if layers_by_name(model) or any(map(_is_lazy, modules)):
        return
    classes = [type(module).__name__ for module in modules[1:]]
    raise TrActError(
        f"`model` (={type(model).__name__}) has no convolution or linear layer "
        f"that TrAct could take; it has {list_some(classes)}."
    )


def _is_lazy(module: nn.Module) -> bool:
    return isinstance(module, LazyModuleMixin)


def _by_timm(model: nn.Module) -> list[FirstLayer]:
    """Return the first layers that the config of a timm model names; none for another model.

    None either where another layer stands before them, as in a model that was changed, or that holds one of timm.
    """
    traits = getattr(model, "pretrained_cfg", None)
    if not isinstance(traits, Mapping) or not traits.get("first_conv"):
        return []
    names = traits["first_conv"]
    if isinstance(names, str):
        names = [names]
    layers = layers_by_name(model)
    if not layers.keys() >= set(names) or next(iter(layers)) not in names:
        return []
    return [FirstLayer(name, layers[name], BY_TIMM) for name in names]


def _by_probe(model: nn.Module, example_batch: Any) -> list[FirstLayer]:
    """Return the layers that the pixels reach first in a trial run of a copy; none if no run reaches a weight."""
    probe = probe_guesses(model) if example_batch is None else probe_example(model, example_batch)
    if probe is None:
        return []
    modules = dict(model.named_modules())
    met = {meeting.module for meeting in probe.meetings}.union(probe.layers)
    if not modules.keys() >= met:
        return []  # The model has other modules in evaluation mode, in which it was tried.
    _check_operations(type(model).__name__, modules, probe)
    found: dict[str, FirstLayer] = {}
    for meeting in probe.meetings:
        name = meeting.layer
        if name is None:
            continue
        if meeting.module != name:
            found[name] = FirstLayer(without_wrappers(name), modules[name], IN_PARENT)
        elif name not in found:
            found[name] = FirstLayer(without_wrappers(name), modules[name], REACHED)
    return list(found.values())


def _check_operations(model: str, modules: Mapping[str, nn.Module], probe: Probe) -> None:
    """Raise an error if the first weight that the pixels reach is no layer's own; warn if only a later one is not."""
    for place, meeting in enumerate(probe.meetings):
        if meeting.layer is not None:
            continue
        where = without_wrappers(meeting.module) or "the model itself"
        if place == 0:
            raise TrActError(
                f"`model` (={model}): the first weight that the pixels meet is "
                f"in {where} ({type(modules[meeting.module]).__name__}), in an "
                f"operation (`{meeting.operation}`) that is no convolution or "
                "linear layer's own. TrAct cannot act on it. Make that weight "
                "an nn.Linear's or nn.Conv2d's, or name another layer with "
                "`layers=` if that is what you want."
            )
        if meeting.operation == LOOK_UP:
            continue
        logger.warning(
            "TrAct: pixels also meet a weight in %s, in an operation (`%s`) that is no convolution or linear layer's "
            "own. That weight has its ordinary gradient.",
            where,
            meeting.operation,
        )
        return


def _by_order(model: nn.Module) -> list[FirstLayer]:
    """Return the first convolution of the vision part, else its first linear layer, by module order, and warn.

    The other layers of an `nn.ModuleDict` that holds it are stems for other inputs, and are returned too.
    """
    modules = modules_by_name(model)
    layers = _in_vision_tower(list(layers_by_name(model)), modules)
    # Convolutions come first; otherwise their order stays.
    layers.sort(key=lambda name: isinstance(modules[name], nn.Linear))
    for name, module in modules.items():
        if layers and name == layers[0]:
            break
        if _is_lazy(module):
            raise TrActError(
                f"`model` (={type(model).__name__}): {name} has no weight yet; run a batch through the model first."
            )
    parent = _parent(layers[0])
    taken = layers[:1]
    if isinstance(modules[parent], nn.ModuleDict):
        taken = [name for name in layers if _parent(name) == parent]
    logger.warning(
        "TrAct: no trial run of the model met one of its layers, so the first "
        "convolution or linear layer in the order of the modules is taken: %s. "
        "If that is not where the pixels come in, name the layer with "
        "`layers=`, or give "
        "a batch with `example_batch=`.",
        ", ".join(taken),
    )
    return [FirstLayer(name, modules[name], BY_ORDER) for name in taken]


def _in_vision_tower(layers: list[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the layers of the first vision tower; all of them if there is none."""
    for tower in modules:
        if tower.split(".")[-1] in VISION_TOWERS:
            inside = [layer for layer in layers if f"{layer}.".startswith(f"{tower}.")]
            return inside or layers
    return layers


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
