"""Calls a model's forward with a batch, and handles the arguments and tensors in one."""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def forward_parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of `model.forward`.

    It looks through peft's wrapper, whose own signature is `*args, **kwargs`.
    """
    base_model = getattr(model, "get_base_model", None)
    if callable(base_model):
        model = base_model()
    try:
        return inspect.signature(model.forward).parameters
    except (TypeError, ValueError):  # such as a scripted module's
        return {}


def filter_forward_kwargs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of `batch` that the forward takes; others may be for a loss outside of the model."""
    parameters = forward_parameters(model)
    for parameter in parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            return dict(batch)
    return {name: value for name, value in batch.items() if name in parameters}


def run_forward(model: nn.Module, batch: Any) -> Any:
    """Run a forward call on a batch, and restore the state of the random numbers.

    A tuple holds positional arguments. A mapping holds keyword arguments, unless it is the one argument itself.
    """
    with preserved_random_state(), torch.compiler.set_stance("force_eager"):
        if isinstance(batch, tuple):
            return model(*batch)
        if isinstance(batch, Mapping):
            takes_one_argument = len(forward_parameters(model)) == 1
            if filter_forward_kwargs(model, batch) or not takes_one_argument:
                return model(**batch)
        return model(batch)


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the random state of torch (on the CPU, and on CUDA's present device), numpy and Python on exit."""
    python_state = random.getstate()
    # Where numpy is not imported, nothing draws from it.
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    try:
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)


def map_tensors(batch: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return `batch` with each tensor in its mappings, lists and tuples replaced by what `change` returns for it."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return _map_mapping(batch, change)
    if not isinstance(batch, (list, tuple)):
        return batch
    values = [map_tensors(value, change) for value in batch]
    if isinstance(batch, list):
        return values
    if hasattr(batch, "_fields"):  # a named tuple
        return type(batch)(*values)
    return tuple(values)


def _map_mapping(batch: Mapping[str, Any], change: Callable[[Tensor], Any]) -> Any:
    # Forwards read attributes of types such as transformers' `BatchFeature`, so the type is kept.
    changed = {name: map_tensors(value, change) for name, value in batch.items()}
    if type(batch) is dict:
        return changed
    mapped: Any = copy.copy(batch)
    try:
        for name, value in changed.items():
            mapped[name] = value
    except TypeError:  # a mapping that cannot be changed
        return changed
    return mapped


def tensors_in(batch: Any) -> list[Tensor]:
    """Return the tensors in the mappings, lists and tuples of `batch`."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        # Some types that hold tensors refuse anything else.
        return tensor

    map_tensors(batch, note)
    return found
