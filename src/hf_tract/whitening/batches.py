"""Batches as a model takes them, whatever they come as; the first ones of a loader, which is as before afterwards."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from hf_tract.config import TrActError
from hf_tract.discovery.inputs import filter_forward_kwargs, map_tensors
from hf_tract.discovery.random_state import random_state_kept

logger = logging.getLogger(__name__)


def to_model_inputs(batches: Any, model: nn.Module) -> list[Any]:
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
    each = [
        batch[0] if isinstance(batch, (list, tuple)) and batch and not _are_images(batch) else batch for batch in each
    ]
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
    return [_as_taken(model, batch) for batch in each]


def _as_taken(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return filter_forward_kwargs(model, batch)
    return list(batch) if isinstance(batch, tuple) else batch  # images of any sizes are one argument


def _are_images(batch: Any) -> bool:
    """Whether it is a list of images of any sizes, as torchvision's detectors take them."""
    if not isinstance(batch, (list, tuple)):
        return False
    return bool(batch) and all(isinstance(image, Tensor) and image.ndim == 3 for image in batch)


def first_batches(loader: Iterable[Any], count: int = 4) -> list[Any]:
    """Returns `count` batches of this rank, or as many as there are; where accelerate dispatches batches, the same on each.

    Training does not depend on whether anybody looked: a process of its own reads them from a fresh loader over the same
    data, so that streams, samplers, augmentations and the random numbers of all of them stay where they are.

    Args:
        loader: any loader, such as a `DataLoader`, also one that accelerate has prepared.
        count: how many.

    Raises:
        TrActError: for an iterator that reads once, whose first batches training would miss.
    """
    # accelerate's own iteration tells the whole process that a loader has begun, and an end never comes here.
    loader = getattr(loader, "base_dataloader", loader)
    if isinstance(loader, DataLoader):
        return _read_apart(loader, count)
    if iter(loader) is loader:
        raise TrActError(
            f"`batches` (={type(loader).__name__}) reads once, and training would miss what is read of it: give "
            f"`whiten_first_layer` a batch or a few of its like."
        )
    with random_state_kept():
        return list(itertools.islice(loader, count))


def _read_apart(loader: DataLoader[Any], count: int) -> list[Any]:
    with random_state_kept():
        try:
            return _first_of(_fresh(loader), count)
        except Exception as error:  # data that cannot go to another process, a sampler that cannot be copied
            if isinstance(loader.dataset, IterableDataset):
                raise TrActError(
                    f"`batches` has a stream ({type(loader.dataset).__name__}) that no other process can read ({error}), and "
                    f"training would miss what is read of it here: give `whiten_first_layer` a batch or a few of its like."
                ) from error
            name = type(loader.dataset).__name__
            logger.warning(
                "TrAct: no other process can read %s (%s); it is read here, and what it counts moves on.", name, error
            )
        with _generators_kept(loader), _workers_kept(loader):
            return list(itertools.islice(loader, count))


def _first_of(loader: DataLoader[Any], count: int) -> list[Any]:
    batches: Any = iter(loader)
    try:
        return list(itertools.islice(batches, count))
    finally:
        batches._shutdown_workers()


def _fresh(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Returns a loader over the same data, with copies of its samplers, that reads in one process of its own."""
    settings: dict[str, Any] = {
        "num_workers": 1,
        "collate_fn": loader.collate_fn,
        "generator": torch.Generator().manual_seed(0),  # of the process's seed
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context if loader.num_workers else None,
    }
    if isinstance(loader.dataset, IterableDataset):
        return DataLoader(loader.dataset, loader.batch_size, drop_last=loader.drop_last, **settings)
    memo = {id(loader.dataset): loader.dataset}  # which samplers may hold
    if loader.batch_sampler is None:
        return DataLoader(loader.dataset, batch_size=None, sampler=copy.deepcopy(loader.sampler, memo), **settings)
    return DataLoader(loader.dataset, batch_sampler=copy.deepcopy(loader.batch_sampler, memo), **settings)


def move_batch(batch: Any, device: torch.device | None, dtype: torch.dtype) -> Any:
    """The batch on `device`, and its floats in `dtype` if that is a half one, which float32 does not meet without autocast.

    Args:
        batch: tensors in mappings, lists and tuples.
        device: where None, it stays where it is.
        dtype: of the weight that reads it.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    return map_tensors(batch, lambda t: t.to(device or t.device, dtype if half and t.is_floating_point() else t.dtype))


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
