"""Finds the layers that the user asks for: by name, by pattern, or as modules."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from hf_tract.config import TrActError
from hf_tract.discovery.wrappers import layers_by_name, modules_by_name, without_wrappers


def requested_layers(model: nn.Module, requests: Iterable[str | nn.Module]) -> dict[str, nn.Module]:
    """Return the requested layers of the unwrapped `model` by name.

    Raises:
        TrActError: if a request matches no module, or one that is no convolution or linear layer.
    """
    modules = modules_by_name(model)
    layers = layers_by_name(model)
    found = {}
    for request in requests:
        if isinstance(request, str):
            names = _names_like(request, modules, layers)
        else:
            names = [name for name, module in modules.items() if module is request]
            if not names:
                raise TrActError(
                    f"`layers` (={type(request).__name__}) is no module of "
                    f"`model` (={type(model).__name__}); give one of its own "
                    "modules, or a name."
                )
        for name in names:
            if name not in layers:
                raise TrActError(
                    f"`layers` (={name!r}) is {_described(modules[name])}, no "
                    "convolution or linear layer with a weight that can be "
                    f"trained; {_hint(name, layers)}"
                )
            found[name] = layers[name]
    return found


def _names_like(request: str, modules: Mapping[str, nn.Module], layers: Mapping[str, nn.Module]) -> list[str]:
    pattern = without_wrappers(request)
    if pattern in modules:
        return [pattern]
    names = fnmatch.filter(layers, pattern)
    if not names:
        near = difflib.get_close_matches(pattern, layers, n=3, cutoff=0.3) or layers
        raise TrActError(
            f"`layers` (={request!r}) matches no convolution or linear layer; the nearest are {list_some(near)}."
        )
    return names


def _described(module: nn.Module) -> str:
    described = f"a {type(module).__name__}"
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and not weight.is_floating_point():
        described += f" of {weight.dtype}"
    return described


def _hint(name: str, layers: Mapping[str, nn.Module]) -> str:
    inside = fnmatch.filter(layers, f"{name}.*".lstrip("."))
    if inside:
        return f"did you mean {list_some(inside, 3)}?"
    return "name one that is."


def list_some(names: Iterable[str], most: int = 6) -> str:
    """Return the first few of `names`, without repeats, as text for a message."""
    unique = list(dict.fromkeys(names))
    if len(unique) > most:
        unique[most:] = ["..."]
    return ", ".join(unique) or "no module"
