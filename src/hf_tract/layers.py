"""Which layer of a model do the pixels meet first: by the user's word, timm's, a probe, or the order of the modules."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from hf_tract.batches import batches, each_tensor, pixel_argument
from hf_tract.config import TrActError
from hf_tract.patches import is_supported
from hf_tract.probe import functional_callers, probe, twin
from hf_tract.sharding import is_sharded

Layers = str | nn.Module | Sequence[str | nn.Module]

# What grows with the ecosystem is data: names that wrappers add, that models give their vision part.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
AFFORDABLE = 10**9  # parameters up to which a forward with values is made where the meta device does not suffice
TOWERS = ("vision_model", "vision_tower", "vision_encoder", "image_encoder", "visual")


NAMED, BY_ORDER = "named by the user", "first in module order"


class FirstLayer(NamedTuple):
    """A layer that TrAct takes: its name in the unwrapped model, the layer, and how it was found."""

    name: str
    module: nn.Module
    source: str


def find_first_layers(model: nn.Module, layers: Layers = "auto", inputs: Any = None) -> list[FirstLayer]:
    """The layers that pixels meet first, in that order; nearly always one.

    Args:
        model: any model, wrapped or not (DDP, FSDP, `torch.compile`).
        layers: "auto" to find them; or what to take: names, glob patterns, the modules themselves, or several of these.
        inputs: for "auto" with a model that nothing is known about: a batch, as a tensor, a list of images or a mapping of
            keyword arguments. Only its shapes and dtypes are used.

    Returns:
        Name, module and source of each.

    Raises:
        TrActError: if nothing is found, or something that is no convolution or linear layer was asked for.

    Example:
        >>> find_first_layers(nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(), nn.Linear(32, 10)))[0].name
        '0'
    """
    model = unwrap(model)
    if not (isinstance(layers, str) and layers == "auto"):
        return _asked_for(model, [layers] if isinstance(layers, (str, nn.Module)) else list(layers))
    if pixel_argument(model) == "input_ids":
        raise TrActError(
            f"`model` (={type(model).__name__}) reads `input_ids` and no pixels: its first layer is an embedding already. "
            f"Name a layer with `layers=` if that is what you want."
        )
    for find in (_by_timm, lambda m: _by_probe(m, inputs), _by_order):
        if found := find(model):
            return found
    looked_at = _some(type(module).__name__ for _, module in model.named_modules() if module is not model)
    raise TrActError(
        f"`model` (={type(model).__name__}) has no convolution or linear layer that TrAct could take; it has {looked_at}."
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside of DDP, FSDP1, DataParallel, `torch.compile` and what looks like them."""
    children = dict(model.named_children())
    while len(children) == 1 and next(iter(children)) in WRAPPERS:
        (model,) = children.values()
        children = dict(model.named_children())
    return model


def plain(name: str) -> str:
    """`name` without what wrappers added to it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    return {plain(name): module for name, module in model.named_modules() if is_supported(module)}


def _some(names: Iterable[str], most: int = 6) -> str:
    unique = list(dict.fromkeys(names))
    return (", ".join(unique[:most]) or "no module") + (", ..." if len(unique) > most else "")


def _asked_for(model: nn.Module, asked: Sequence[str | nn.Module]) -> list[FirstLayer]:
    candidates = _candidates(model)
    everything = {plain(name): module for name, module in model.named_modules()}
    found: dict[str, FirstLayer] = {}
    for wish in asked:
        if isinstance(wish, nn.Module):
            names = [name for name, module in everything.items() if module is wish]
            if not names:
                raise TrActError(f"`layers` (={type(wish).__name__}) is no module of `model` (={type(model).__name__}).")
        else:
            pattern = plain(wish)
            names = [pattern] if pattern in everything else fnmatch.filter(candidates, pattern)
            if not names:
                near = difflib.get_close_matches(pattern, candidates, n=3, cutoff=0.3) or list(candidates)
                raise TrActError(f"`layers` (={wish!r}) matches no convolution or linear layer; the nearest are {_some(near)}.")
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
    """What timm says of a model or of a part of it, when all of it resolves."""
    candidates = _candidates(model)
    for prefix, module in model.named_modules():
        cfg = getattr(module, "pretrained_cfg", None)
        first = cfg.get("first_conv") if isinstance(cfg, Mapping) else None
        names = [first] if isinstance(first, str) else list(first or ())
        names = [plain(f"{prefix}.{name}" if prefix else name) for name in names]
        if names and all(name in candidates for name in names):
            return [FirstLayer(name, candidates[name], "timm's first_conv") for name in names]
    return []


def _by_order(model: nn.Module) -> list[FirstLayer]:
    """The first convolution of the vision part, else its first linear layer, in the order of the modules."""
    prefix = next((name for name, _ in model.named_modules() if name.split(".")[-1] in TOWERS), "")
    candidates = {name: m for name, m in _candidates(model).items() if name.startswith(plain(prefix))}
    ordered = sorted(candidates.items(), key=lambda item: isinstance(item[1], nn.Linear))  # stable
    return [FirstLayer(*item, BY_ORDER) for item in ordered[:1]]


def _by_probe(model: nn.Module, inputs: Any = None) -> list[FirstLayer]:
    """Every layer whose input still depends on the pixels alone, seen in one forward of a twin.

    The twin is on the meta device, where a forward costs next to nothing. Some forwards look at values before they come to
    the pixels: where that is affordable, a second twin shares the model's weights.
    """
    modules = dict(model.named_modules())
    for device in ("meta", *_affordable(model)):
        try:
            copied = twin(model, device if device == "meta" else None)
        except Exception:  # a model that cannot be copied, such as FSDP2's, is no error: the module order is left
            return []
        for batch in batches(copied, device) if inputs is None else [_moved(inputs, device)]:
            if names := dict.fromkeys(reading.name for reading in probe(copied, batch)):
                return [FirstLayer(plain(name), modules[name], "reached first by the pixels") for name in names]
    return []


def _affordable(model: nn.Module) -> list[str]:
    """The device of a model that is not too large for one more forward, if it is a single one."""
    if any(isinstance(parameter, UninitializedParameter) for parameter in model.parameters()):
        return []
    devices = {parameter.device for parameter in model.parameters()} - {torch.device("meta")}
    small = sum(parameter.numel() for parameter in model.parameters()) <= AFFORDABLE
    return [str(next(iter(devices)))] if small and len(devices) == 1 else []


def _moved(inputs: Any, device: str) -> Any:
    """The caller's batch; on the meta device, only its shapes and its integers."""
    return each_tensor(inputs, lambda t: t.to("cpu" if device == "meta" and not t.is_floating_point() else device))


def find_functional_callers(
    model: nn.Module, layers: Sequence[FirstLayer], inputs: Any = None
) -> list[tuple[nn.Module, list[nn.Module]]]:
    """Returns the modules whose own forward runs an operation with the weight of a layer, and these layers.

    A trial run on the meta device tells; where none completes, nothing is returned.
    """
    model = unwrap(model)
    modules = dict(model.named_modules())
    names = {layer.name for layer in layers if layer.source in (NAMED, BY_ORDER)}  # what else there is ran by itself
    if not names or is_sharded(model):  # whose hooks would take the trial run for a step
        return []
    with contextlib.suppress(Exception):  # such as FSDP2's, which cannot be copied
        copied = twin(model)
        for batch in itertools.islice(batches(copied), 3) if inputs is None else [_moved(inputs, "meta")]:
            with contextlib.suppress(Exception):
                callers = functional_callers(copied, batch)
                read = {caller: [layer for layer in owned if plain(layer) in names] for caller, owned in callers.items()}
                return [(modules[caller], [modules[name] for name in owned]) for caller, owned in read.items() if owned]
    return []
