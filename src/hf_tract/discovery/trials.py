"""Runs copies of a model on guessed batches, or on the user's, until a forward call shows the first layer."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_tract.config import TrActError
from hf_tract.core.patches import CONV_OPS
from hf_tract.discovery.calling import forward_parameters, map_tensors
from hf_tract.discovery.inputs import guess_inputs, precision
from hf_tract.discovery.probe import Probe, copy_with_values, layers_reached_first, meta_copy
from hf_tract.discovery.wrappers import without_wrappers

# A larger model is not copied with its values: it is tried on the meta device only.
MAX_PROBE_PARAMETERS = 5 * 10**8
# How many guesses that reach a weight are tried on the meta device, and how many guesses in all with values.
MAX_GUESSES = 24
# How many guesses that reach a weight are tried with values.
MAX_TRIES_WITH_VALUES = 3

logger = logging.getLogger(__name__)


def trial_runs(model: nn.Module, example_batch: Any = None, with_values: bool = True) -> Iterator[tuple[str, Probe]]:
    """Run forward calls on copies of `model`, and yield the device and the record of each.

    They run on the meta device first, where they cost next to nothing, and then with values, on which some forwards
    depend, unless `with_values` is false. Without `example_batch`, the batches are guessed. A model that cannot be
    copied yields nothing.
    """
    for device, copied in _copies(model, with_values):
        tries_left = MAX_GUESSES
        if device != "meta":
            tries_left = MAX_TRIES_WITH_VALUES
        for batch in _batches(copied, device, example_batch):
            probe = layers_reached_first(copied, batch)
            yield device, probe
            if probe.meetings:
                tries_left -= 1
            if tries_left == 0:
                break


def _copies(model: nn.Module, with_values: bool) -> Iterator[tuple[str, nn.Module]]:
    try:
        yield "meta", meta_copy(model)
        device = _device_for_values(model)
        if with_values and device is not None:
            yield device, copy_with_values(model)
    except Exception:  # whatever a model's own copying raises
        return


def _device_for_values(model: nn.Module) -> str | None:
    """Return the device of a model that is small and on one device, so that its values can be copied; else None."""
    size = 0
    devices = set()
    for parameter in model.parameters():
        size += parameter.numel()
        devices.add(parameter.device)
    if len(devices) != 1 or torch.device("meta") in devices or size > MAX_PROBE_PARAMETERS:
        return None
    return str(devices.pop())


def _batches(copied: nn.Module, device: str, example_batch: Any) -> Iterator[Any]:
    if example_batch is not None:
        return iter([_moved(example_batch, device, precision(copied))])
    guesses = guess_inputs(copied, device)
    if device == "meta":
        return guesses
    return itertools.islice(guesses, MAX_GUESSES)


def _moved(batch: Any, device: str, dtype: torch.dtype) -> Any:
    """Return a copy of the user's batch, in the model's precision."""

    def moved(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if tensor.is_floating_point():
            return tensor.to(device, dtype, copy=True)
        if device == "meta":
            # Integers keep their values, as those of guesses do.
            return tensor.to("cpu", copy=True)
        return tensor.to(device, copy=True)

    return map_tensors(batch, moved)


def probe_guesses(model: nn.Module) -> Probe | None:
    """Return the first trial run on a guessed batch that completes, else the first that reaches a layer or weight."""
    partial: Probe | None = None
    for _, probe in trial_runs(model):
        if not probe.meetings:
            continue
        if probe.error is None:
            return probe
        if partial is None or (probe.layers and not partial.layers):
            partial = probe
    if partial is not None and partial.layers and _may_have_missed_a_layer(model, partial):
        logger.warning(
            "TrAct: no guess of a batch fitted the forward of the model to its "
            "end; one went far enough to meet %s, which is taken. If that is "
            "not where the pixels come in, or not the only place (several "
            "branches), give a batch with `example_batch=`, or name the layers "
            "with `layers=`.",
            ", ".join(map(without_wrappers, partial.layers)),
        )
    return partial


def _may_have_missed_a_layer(model: nn.Module, probe: Probe) -> bool:
    """Return whether the pixels may come in elsewhere too, given a run that ended early.

    They may in another argument, or in a convolution that has not run and takes no more channels than they have.
    """
    if isinstance(probe.batch, tuple):
        return True
    if not isinstance(probe.batch, Tensor):
        return False
    have_run = {read.layer for read in probe.inputs}
    for name, module in model.named_modules():
        if name in have_run or not isinstance(module, tuple(CONV_OPS)):
            continue
        if getattr(module, "in_channels", math.inf) <= probe.batch.shape[1]:
            return True
    return False


def probe_example(model: nn.Module, example_batch: Any) -> Probe | None:
    """Return the record of a trial run on the user's batch; None for a model that cannot be copied.

    Raises:
        TrActError: if its pixels reach no weight; if the forward fails on the batch, with that error as the cause.
    """
    runs: dict[str, Probe] = {}
    for device, probe in trial_runs(model, example_batch):
        runs[device] = probe
        if probe.error is None:
            break
    if not runs:
        return None
    device, probe = runs.popitem()
    named = f"`example_batch` (={_described(example_batch)}): the forward of `model` (={type(model).__name__})"
    if probe.error is None and not probe.meetings:
        raise TrActError(
            f"{named} ran, and no tensor of the batch met a weight. Give pixels "
            "as tensors, in tuples, lists or mappings, or name the layer with "
            "`layers=`."
        )
    # On the meta device a forward may have failed only because it needs values.
    if probe.error is None or (device == "meta" and probe.meetings):
        return probe
    argument = next(iter(forward_parameters(model)), "batch")
    raise TrActError(
        f"{named} failed on it with {type(probe.error).__name__}: "
        f"{probe.error}. A tuple is passed as positional arguments, a mapping "
        "as keyword arguments, and anything else, a list too, as the first "
        f"argument; give {{{argument!r}: batch}} if the forward takes a mapping."
    ) from probe.error


def _described(batch: Any) -> str:
    """Return the types and shapes in a batch, as text."""
    if isinstance(batch, Mapping):
        entries = [f"{key!r}: {_described(value)}" for key, value in batch.items()]
        return "{" + ", ".join(entries) + "}"
    if isinstance(batch, (list, tuple)):
        return f"{type(batch).__name__} of " + ", ".join(map(_described, batch))
    if isinstance(batch, Tensor):
        return f"{batch.dtype} {tuple(batch.shape)}"
    return type(batch).__name__
