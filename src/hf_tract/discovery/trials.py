"""Trial runs of a model's copy: with guessed batches, or with the user's."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils._pytree import tree_leaves

from hf_tract.config import TrActError
from hf_tract.discovery.inputs import forward_parameters, guess_inputs, map_tensors, precision
from hf_tract.discovery.probe import Probe, functional_callers, layers_reached_first, meta_copy
from hf_tract.discovery.wrappers import without_wrappers

MOST_PARAMETERS = 5 * 10**8  # up to which a forward is made on copies of them, where the meta device does not suffice
FEW_PARAMETERS = 10**8  # likewise, where a forward on the meta device has told something before it failed
MOST_GUESSES, FEW_GUESSES = 24, 3  # of batches that reach a weight, without and with values
MOST_NUMBERS = 4 * 10**6  # of a guess with values
logger = logging.getLogger(__name__)


def probe_guesses(model: nn.Module) -> Probe | None:
    """Returns what the pixels meet in the first guess of a batch that the forward takes, or else what a part of one tells."""
    partial: Probe | None = None
    is_uncertain = False  # which of several arguments are pixels
    for device, copied in _copies(model, MOST_PARAMETERS):
        tries = 0
        for batch in itertools.islice(_guesses(copied, device), None if device == "meta" else MOST_GUESSES):
            found = layers_reached_first(copied, batch)
            if found.meetings and found.error is None:
                return found
            if found.meetings and (partial is None or (found.layers and not partial.layers)):
                partial, is_uncertain = found, isinstance(batch, tuple)
            tries += bool(found.meetings)
            if tries == (MOST_GUESSES if device == "meta" else FEW_GUESSES):
                break
        if partial is not None and not _devices_with_values(model, FEW_PARAMETERS):
            break
    if is_uncertain and partial is not None and partial.layers:
        logger.warning(UNCERTAIN, ", ".join(map(without_wrappers, partial.layers)))
    return partial


def _copies(model: nn.Module, most: int) -> Iterator[tuple[str, nn.Module]]:
    """Makes the copies to try, with their devices: none of a model that cannot be copied, such as FSDP2's.

    The first is on the meta device, where a forward costs next to nothing. Some forwards look at values: a model of at most
    `most` parameters is copied with them too.
    """
    for device in ("meta", *_devices_with_values(model, most)):
        try:
            copied = meta_copy(model, device if device == "meta" else None)
        except Exception:  # whatever a model's own copying raises
            return
        yield device, copied


def _guesses(copied: nn.Module, device: str) -> Iterator[Any]:
    """Guesses batches; with values, none that are large."""
    return (batch for batch in guess_inputs(copied, device) if device == "meta" or _numbers(batch) <= MOST_NUMBERS)


def _numbers(batch: Any) -> int:
    return sum(leaf.numel() for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))


def probe_example(model: nn.Module, example_batch: Any) -> Probe | None:
    """Returns what the pixels of the user's batch meet.

    Raises:
        TrActError: from the forward's own error, if it does not take the batch.
    """
    found: Probe | None = None
    device = "meta"
    for device, copied in _copies(model, MOST_PARAMETERS):
        found = layers_reached_first(copied, _moved(example_batch, device, precision(model)), grad=device != "meta")
        if found.error is None:
            return found
    if found is None:  # the model cannot be copied
        return None
    argument = next(iter(forward_parameters(model)), "batch")
    if found.meetings and device == "meta":  # the forward may have failed for want of values
        return found
    raise TrActError(
        f"`example_batch` (={described(example_batch)}): the forward of `model` (={type(model).__name__}) failed on it with "
        f"{type(found.error).__name__}: {found.error}. A tuple is passed as positional arguments and a mapping as keyword "
        f"arguments; give {{{argument!r}: batch}} if the forward takes a mapping."
    ) from found.error


def described(batch: Any) -> str:
    """Returns the types and shapes in a batch."""
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key!r}: {described(value)}" for key, value in batch.items()) + "}"
    if isinstance(batch, (list, tuple)):
        return f"{type(batch).__name__} of " + ", ".join(map(described, batch))
    return f"{batch.dtype} {tuple(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__


def _devices_with_values(model: nn.Module, most: int) -> list[str]:
    """Returns the device of a model of at most `most` parameters, if it is a single one."""
    if any(isinstance(parameter, UninitializedParameter) for parameter in model.parameters()):
        return []
    devices = {parameter.device for parameter in model.parameters()} - {torch.device("meta")}
    small = sum(parameter.numel() for parameter in model.parameters()) <= most
    return [str(next(iter(devices)))] if small and len(devices) == 1 else []


def _moved(batch: Any, device: str, dtype: torch.dtype) -> Any:
    """Returns the caller's batch in the model's precision; on the meta device, only its shapes, and its integers."""

    def moved(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if not tensor.is_floating_point():
            return tensor.to("cpu" if device == "meta" else device, copy=True)
        return tensor.to(device, dtype, copy=True)

    return map_tensors(batch, moved)


def callers_in_a_trial(model: nn.Module, example_batch: Any) -> dict[str, list[str]]:
    """Returns what `functional_callers` does for the first batch that reaches a layer; nothing where none does."""
    for device, copied in _copies(model, FEW_PARAMETERS):
        guesses = (
            _guesses(copied, device)
            if example_batch is None
            else iter([_moved(example_batch, device, precision(model))])
        )
        found = (functional_callers(copied, batch) for batch in itertools.islice(guesses, 4 * MOST_GUESSES))
        if (callers := next((each for each in found if each is not None), None)) is not None:
            return callers
    return {}


UNCERTAIN = (
    "TrAct: no guess of a batch fitted the forward of the model, which takes several arguments; one went far enough to meet "
    "%s, which is taken. If that is not where the pixels come in, give a batch with `example_batch=`, or name the layer with "
    "`layers=`."
)
