"""Which layer of a model do the pixels meet first: by the user's word, timm's, a probe, or the order of the modules."""

from __future__ import annotations

import difflib
import fnmatch
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from hf_tract.config import TrActError
from hf_tract.core.patches import is_supported
from hf_tract.core.sharding import is_sharded
from hf_tract.discovery.inputs import pixel_argument_name
from hf_tract.discovery.trials import callers_in_a_trial, described, probe_example, probe_guesses
from hf_tract.discovery.wrappers import unwrap, without_wrappers

LayerSelection = str | nn.Module | Sequence[str | nn.Module]

# What grows with the ecosystem is data: names that models give their vision part.
VISION_TOWERS = ("vision_model", "vision_tower", "vision_encoder", "image_encoder", "visual")


NAMED, BY_ORDER = "named by the user", "first in module order"
REACHED, IN_PARENT = "reached first by the pixels", "reached first by the pixels, in its parent's forward"
logger = logging.getLogger(__name__)


class FirstLayer(NamedTuple):
    """A layer that TrAct takes: its name in the unwrapped model, the layer, and how it was found."""

    name: str
    module: nn.Module
    source: str


def find_first_layers(
    model: nn.Module, layers: LayerSelection = "auto", example_batch: Any = None
) -> list[FirstLayer]:
    """The layers that pixels meet first, in that order; nearly always one.

    Args:
        model: any model, wrapped or not (DDP, FSDP, `torch.compile`).
        layers: "auto" to find them; or what to take: names, glob patterns, the modules themselves, or several of these.
        example_batch: for "auto", where the library's own guesses of a batch do not fit the forward, or where it reads several
            inputs: a tensor, a tuple of positional arguments, or a mapping of keyword arguments ({"batch": batch} for a
            forward that takes a mapping). It is used for one forward of a copy.

    Returns:
        Name, module and source of each.

    Raises:
        TrActError: if nothing is found, or something that is no convolution or linear layer was asked for; if the pixels meet
            another kind of weight first; from the forward's own error, if it does not take `example_batch`.

    Example:
        >>> find_first_layers(nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(), nn.Linear(32, 10)))[0].name
        '0'
    """
    sharded, model = is_sharded(model), unwrap(model)
    if not (isinstance(layers, str) and layers == "auto"):
        return _by_request(model, [layers] if isinstance(layers, (str, nn.Module)) else list(layers))
    if example_batch is None and pixel_argument_name(model) == "input_ids":
        raise TrActError(
            f"`model` (={type(model).__name__}) reads `input_ids` and no pixels: its first layer is an embedding already. "
            f"Name a layer with `layers=` if that is what you want."
        )
    if not _candidates(model) and not any(isinstance(module, LazyModuleMixin) for module in model.modules()):
        looked_at = _some(type(module).__name__ for _, module in model.named_modules() if module is not model)
        raise TrActError(
            f"`model` (={type(model).__name__}) has no convolution or linear layer that TrAct could take; it has {looked_at}."
        )
    if found := _by_timm(model):
        return found
    # The hooks of a sharded model would take a trial run for a step of its own.
    return ([] if sharded else _by_probe(model, example_batch)) or _by_order(model)


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    return {without_wrappers(name): module for name, module in model.named_modules() if is_supported(module)}


def _some(names: Iterable[str], most: int = 6) -> str:
    unique = list(dict.fromkeys(names))
    return (", ".join(unique[:most]) or "no module") + (", ..." if len(unique) > most else "")


def _by_request(model: nn.Module, asked: Sequence[str | nn.Module]) -> list[FirstLayer]:
    candidates = _candidates(model)
    everything = {without_wrappers(name): module for name, module in model.named_modules()}
    found: dict[str, FirstLayer] = {}
    for wish in asked:
        if isinstance(wish, nn.Module):
            names = [name for name, module in everything.items() if module is wish]
            if not names:
                raise TrActError(
                    f"`layers` (={type(wish).__name__}) is no module of `model` (={type(model).__name__})."
                )
        else:
            pattern = without_wrappers(wish)
            names = [pattern] if pattern in everything else fnmatch.filter(candidates, pattern)
            if not names:
                near = difflib.get_close_matches(pattern, candidates, n=3, cutoff=0.3) or list(candidates)
                raise TrActError(
                    f"`layers` (={wish!r}) matches no convolution or linear layer; the nearest are {_some(near)}."
                )
        for name in names:
            if name not in candidates:
                inside = [other for other in candidates if other.startswith(f"{name}.")]
                hint = f"did you mean {_some(inside, 3)}?" if inside else "name one that is."
                raise TrActError(
                    f"`layers` (={name!r}) is {_described(everything[name])}, no convolution or linear layer with a weight "
                    f"that can be trained; {hint}"
                )
            found[name] = FirstLayer(name, candidates[name], NAMED)
    return list(found.values())


def _described(module: nn.Module) -> str:
    weight = getattr(module, "weight", None)
    dtype = f" of {weight.dtype}" if isinstance(weight, Tensor) and not weight.is_floating_point() else ""
    return f"a {type(module).__name__}{dtype}"


def _by_timm(model: nn.Module) -> list[FirstLayer]:
    """Takes what timm says of a model of its own; what stands around one may have met the pixels before."""
    candidates = _candidates(model)
    traits = getattr(model, "pretrained_cfg", None)
    first = traits.get("first_conv") if isinstance(traits, Mapping) else None
    names = [first] if isinstance(first, str) else list(first or ())
    if not names or any(name not in candidates for name in names):
        return []
    return [FirstLayer(name, candidates[name], "timm's first_conv") for name in names]


def _by_order(model: nn.Module) -> list[FirstLayer]:
    """Takes the first convolution of the vision part, else its first linear layer, in the order of the modules; and warns.

    Layers beside it in one `nn.ModuleDict` are stems for other inputs, and taken too.
    """
    prefix = next((name for name, _ in model.named_modules() if name.split(".")[-1] in VISION_TOWERS), "")
    candidates = {name: m for name, m in _candidates(model).items() if name.startswith(without_wrappers(prefix))}
    ordered = sorted(candidates, key=lambda name: isinstance(candidates[name], nn.Linear))  # stable
    modules = {without_wrappers(name): module for name, module in model.named_modules()}
    order = list(modules)
    lazy = next((name for name, module in modules.items() if isinstance(module, LazyModuleMixin)), None)
    if lazy is not None and (not ordered or order.index(lazy) < order.index(ordered[0])):
        raise TrActError(
            f"`model` (={type(model).__name__}): {lazy} has no weight yet; run a batch through the model first."
        )
    if not ordered:
        return []
    parent = ordered[0].rpartition(".")[0]
    together = [name for name in ordered if name.rpartition(".")[0] == parent]
    taken = together if isinstance(modules[parent], nn.ModuleDict) else ordered[:1]
    logger.warning(BY_ORDER_WARNING, ", ".join(taken))
    return [FirstLayer(name, candidates[name], BY_ORDER) for name in taken]


def _by_probe(model: nn.Module, example_batch: Any) -> list[FirstLayer]:
    """Takes every layer that the pixels meet first in one forward of a copy."""
    found = probe_guesses(model) if example_batch is None else probe_example(model, example_batch)
    if found is not None and not found.meetings and example_batch is not None:
        raise TrActError(
            f"`example_batch` (={described(example_batch)}): the forward of `model` (={type(model).__name__}) ran, and no "
            f"tensor of the batch met a weight. Give pixels as tensors, in tuples, lists or mappings, or name the layer with "
            f"`layers=`."
        )
    if found is None or not found.meetings:
        return []
    first, others = found.meetings[0], found.others
    modules = dict(model.named_modules())
    if first.layer is None:
        where = without_wrappers(first.module) or "the model itself"
        raise TrActError(
            f"`model` (={type(model).__name__}): the first weight that the pixels meet is in {where} "
            f"({type(modules[first.module]).__name__}), in an operation (`{first.operation}`) that is no convolution or linear "
            f"layer's own. TrAct cannot act on it. Make that weight an nn.Linear's or nn.Conv2d's, or name another layer with "
            f"`layers=` if that is what you want."
        )
    if others:
        logger.warning(OTHER_WEIGHTS, without_wrappers(others[0].module) or "the model itself", others[0].operation)
    in_parents = {meeting.layer for meeting in found.meetings if meeting.layer != meeting.module}
    return [
        FirstLayer(without_wrappers(name), modules[name], IN_PARENT if name in in_parents else REACHED)
        for name in found.layers
    ]


def find_functional_callers(
    model: nn.Module, layers: Sequence[FirstLayer], example_batch: Any = None
) -> list[tuple[nn.Module, list[nn.Module]]]:
    """Returns the modules whose own forward runs an operation with the weight of a layer, and these layers.

    A trial run on the meta device tells; where none reaches a layer, nothing is returned.
    """
    sharded, model = is_sharded(model), unwrap(model)
    modules = dict(model.named_modules())
    names = {
        layer.name for layer in layers if layer.source in (NAMED, BY_ORDER, IN_PARENT)
    }  # what else there is ran by itself
    if not names or sharded:
        return []
    callers = callers_in_a_trial(model, example_batch)
    read = {
        caller: [layer for layer in owned if without_wrappers(layer) in names] for caller, owned in callers.items()
    }
    return [(modules[caller], [modules[name] for name in owned]) for caller, owned in read.items() if owned]


BY_ORDER_WARNING = (
    "TrAct: no forward of the model could be tried, so its first convolution or linear layer in the order of the modules is "
    "taken: %s. If that is not where the pixels come in, name the layer with `layers=`, or give a batch with `example_batch=`."
)
OTHER_WEIGHTS = (
    "TrAct: pixels also meet a weight in %s, in an operation (`%s`) that is no convolution or linear layer's own. That weight "
    "has its ordinary gradient."
)
