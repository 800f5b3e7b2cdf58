"""Batches as a model takes them, whatever they come as; the first ones of a loader, which is as before afterwards."""

from __future__ import annotations

import contextlib
import itertools
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hf_tract.batches import accepted, each_tensor
from hf_tract.config import TrActError


def as_batches(batches: Any, model: nn.Module) -> list[Any]:
    """Each batch as pixels or as the keyword arguments that `model` takes.

    Args:
        batches: one tensor or mapping; several, or lists of images, or tuples such as (pixels, labels); or a `DataLoader`,
            whose first are taken.
        model: whose forward decides which keys are dropped.

    Raises:
        TrActError: for what is none of these.
    """
    if isinstance(batches, DataLoader):
        batches = first_batches(batches)
    each = [batches] if isinstance(batches, (Tensor, Mapping)) else list(batches)
    each = [batch[0] if isinstance(batch, (list, tuple)) and batch and not _are_images(batch) else batch for batch in each]
    for batch in each:
        if not (isinstance(batch, (Tensor, Mapping)) or _are_images(batch)):
            raise TrActError(
                f"`batches` has a {type(batch).__name__}: give tensors of pixels, mappings of arguments or a DataLoader."
            )
        pixels = batch[0] if _are_images(batch) else batch
        if isinstance(pixels, Tensor) and not pixels.is_floating_point():
            raise TrActError(
                f"`batches` has a tensor of {pixels.dtype}, and pixels are floats: give one batch with its labels as "
                f"[(pixels, labels)], and images normalised as in training."
            )
    return [accepted(model, batch) if isinstance(batch, Mapping) else batch for batch in each]


def _are_images(batch: Any) -> bool:
    """Whether it is a list of images of any sizes, as torchvision's detectors take them."""
    if not isinstance(batch, (list, tuple)):
        return False
    return bool(batch) and all(isinstance(image, Tensor) and image.ndim == 3 for image in batch)


def first_batches(loader: Iterable[Any], count: int = 4) -> list[Any]:
    """`count` batches of this rank, or as many as there are; where accelerate dispatches batches, the same on every rank.

    The random numbers of torch, NumPy and Python, and those of the loader and its samplers, are as before afterwards, so
    that training does not depend on whether anybody looked.

    Args:
        loader: any loader, such as a `DataLoader`, also one that accelerate has prepared.
        count: how many.
    """
    # accelerate's own iteration tells the whole process that a loader has begun, and an end never comes here.
    loader = getattr(loader, "base_dataloader", loader)
    with _random_state_kept(), _generators_kept(loader), _workers_kept(loader):
        return list(itertools.islice(loader, count))


def sent(batch: Any, device: torch.device | None, dtype: torch.dtype) -> Any:
    """The batch on `device`, and its floats in `dtype` if that is a half one, which float32 does not meet without autocast.

    Args:
        batch: tensors in mappings, lists and tuples.
        device: where None, it stays where it is.
        dtype: of the weight that reads it.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    return each_tensor(batch, lambda t: t.to(device or t.device, dtype if half and t.is_floating_point() else t.dtype))


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    python, numpy = random.getstate(), sys.modules.get("numpy")
    arrays = numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng([]):
            yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(arrays)


@contextlib.contextmanager
def _generators_kept(loader: Any) -> Iterator[None]:
    """Of the loader and of the samplers inside it, at any depth."""
    states: dict[torch.Generator, torch.Tensor] = {}
    waiting, seen = [loader], set[int]()
    while waiting:
        each = waiting.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        generator = getattr(each, "generator", None)
        if isinstance(generator, torch.Generator):
            states[generator] = generator.get_state()
        waiting += [getattr(each, name, None) for name in ("sampler", "batch_sampler")]
    try:
        yield
    finally:
        for generator, state in states.items():
            generator.set_state(state)


@contextlib.contextmanager
def _workers_kept(loader: Any) -> Iterator[None]:
    """Persistent workers that began inside end there: training begins with its own, and their random numbers."""
    none_yet = getattr(loader, "_iterator", None) is None
    try:
        yield
    finally:
        started = getattr(loader, "_iterator", None)
        if none_yet and started is not None:
            started._shutdown_workers()
            loader._iterator = None
