"""Converts batches in the forms that users give into inputs of a model, and reads a loader without advancing it."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import multiprocessing
import pickle
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hf_tract.config import TrActError
from hf_tract.discovery.calling import filter_forward_kwargs, map_tensors, preserved_random_state

logger = logging.getLogger(__name__)

# For one batch, read by another process.
MAX_SECONDS = 300
# Libraries whose loaders hand on the batches as they are.
PASS_ON = {"torch", "torchdata", "timm", "accelerate"}
READS_ONCE = "and training would miss what is read of it here: call `whiten_first_layer` with a few batches before."


def to_model_inputs(batches: Any, model: nn.Module) -> list[Any]:
    """Return each batch as pixels or as the keyword arguments that `model` takes.

    Args:
        batches: in any form that `whiten_first_layer` takes.
        model: keys that its forward does not take are dropped.

    Raises:
        TrActError: for batches in another form, and for pixels that are integers.
    """
    if isinstance(batches, (Tensor, Mapping)):
        batches = [batches]
    elif not isinstance(batches, (list, tuple)):
        batches = first_batches(batches)
    return [_to_model_input(batch, model) for batch in batches]


def _to_model_input(batch: Any, model: nn.Module) -> Any:
    has_labels = isinstance(batch, (list, tuple)) and not _is_image_list(batch, model)
    if has_labels and len(batch) > 0:
        batch = batch[0]
    if isinstance(batch, Mapping):
        return _keyword_arguments(batch, model)
    pixels = batch
    if _is_image_list(batch, model):
        # `run_forward` would pass the entries of a tuple as arguments.
        batch = list(batch)
        pixels = batch[0]
    if not isinstance(pixels, Tensor):
        raise TrActError(
            f"`batches` has a {type(batch).__name__}: give tensors of pixels, mappings of arguments or a DataLoader."
        )
    if not pixels.is_floating_point():
        raise TrActError(
            f"`batches` has a tensor of {pixels.dtype}, and pixels are floats: "
            "normalise images as in training, and give one batch with its "
            "labels as [(pixels, labels)]."
        )
    return batch


def _keyword_arguments(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    arguments: dict[str, Any] = filter_forward_kwargs(model, batch)
    if batch and not arguments:
        raise TrActError(
            f"`batches` has a mapping of {', '.join(map(repr, batch))}, of "
            f"which the forward of {type(model).__name__} takes none: give the "
            "pixels alone, or name them as the forward does."
        )
    return arguments


def _is_image_list(batch: Any, model: nn.Module) -> bool:
    """Return whether a batch lists images (c, H, W) of any sizes, as torchvision's detectors take them."""
    if not isinstance(batch, (list, tuple)) or not batch:
        return False
    # Without these, a tensor of three dimensions is a batch of signals (N, C, L) or sequences (N, L, C).
    reads_images = any(isinstance(module, nn.Conv2d) for module in model.modules())
    return reads_images and all(isinstance(image, Tensor) and image.ndim == 3 for image in batch)


def first_batches(loader: Iterable[Any], count: int = 4) -> list[Any]:
    """Return up to `count` of the first batches of this rank, without changing what training will read.

    Those of a `DataLoader` are read by another process from a new loader over the same data, so that streams,
    samplers, augmentations and their random numbers keep their state; or from a copy of the data in this process,
    where another one would run the user's script again. A loader whose class has an `__iter__` of its own, which may
    change the batches, is read itself, with a warning. Where accelerate dispatches batches, each rank gets the same
    ones.

    Args:
        loader: any loader, such as a `DataLoader`, also one that accelerate has prepared.
        count: the largest number of batches to return.

    Raises:
        TrActError: for a loader that can be read only once, and for a stream in a loader that is read itself, since
            training would miss the first batches.
    """
    # Iterating over accelerate's loader would set its `GradientState` for the whole process.
    loader = getattr(loader, "base_dataloader", loader)
    if not isinstance(loader, DataLoader) and iter(loader) is loader:
        name = type(loader).__name__
        raise TrActError(f"`batches` (={name}) reads once, {READS_ONCE}")
    with preserved_random_state(), _preserved_generators(loader):
        if not isinstance(loader, DataLoader):
            return list(itertools.islice(loader, count))
        if type(loader).__iter__.__module__.partition(".")[0] in PASS_ON:
            return _read_apart(loader, count)
        return _read_here(loader, count)


def _read_here(loader: DataLoader[Any], count: int) -> list[Any]:
    """Return the first batches of a loader whose class changes them as it goes, so that no other one stands for it."""
    name = type(loader).__name__
    if isinstance(loader.dataset, IterableDataset):
        raise TrActError(f"`batches` (={name}) has a stream and an `__iter__` of its own, {READS_ONCE}")
    logger.warning("TrAct: %s has an `__iter__` of its own; it is read here, and what it counts moves on.", name)
    return list(itertools.islice(loader, count))


def _read_apart(loader: DataLoader[Any], count: int) -> list[Any]:
    """Return the first batches, read in another process or from a copy of the data, where that is possible."""
    name = type(loader.dataset).__name__
    try:
        # A process that is not forked imports the script, and runs all of it where no `if __name__ == "__main__":`
        # guards it. With processes of its own the loader needs that guard anyway.
        if loader.num_workers == 0 and not _forks():
            copied = pickle.loads(pickle.dumps(loader.dataset))
            apart = _new_loader(loader, copied, num_workers=0)
        else:
            apart = _new_loader(loader, loader.dataset, num_workers=1)
        return _first_of(apart, count)
    # Data may be tied to its process in many ways.
    except Exception as error:
        if isinstance(loader.dataset, IterableDataset):
            raise TrActError(
                f"`batches` has a stream ({name}) that no other process can read ({error}), {READS_ONCE}"
            ) from error
        logger.warning(
            "TrAct: no other process can read %s (%s); it is read here, and what it counts moves on.", name, error
        )
    return _first_of(_new_loader(loader, loader.dataset, num_workers=0), count)


def _forks() -> bool:
    """Return whether processes are forked, without settling that for the user's later choice."""
    method = multiprocessing.get_start_method(allow_none=True)
    if method is None:
        # The first is the default.
        method = multiprocessing.get_all_start_methods()[0]
    return method == "fork"


def _first_of(loader: DataLoader[Any], count: int) -> list[Any]:
    batches: Any = iter(loader)
    try:
        return list(itertools.islice(batches, count))
    finally:
        # An error that somebody keeps would keep the iterator and its process alive.
        if hasattr(batches, "_shutdown_workers"):
            batches._shutdown_workers()


def _new_loader(loader: DataLoader[Any], dataset: Dataset[Any], num_workers: int) -> DataLoader[Any]:
    """Return a loader like `loader` over these data, with copies of its samplers and a generator of its own."""
    settings: dict[str, Any] = {
        "num_workers": num_workers,
        "collate_fn": loader.collate_fn,
        "worker_init_fn": loader.worker_init_fn,
        # The seeds of the workers come from it, and are drawn on the default device.
        "generator": torch.Generator(torch.get_default_device()).manual_seed(0),
    }
    if num_workers > 0:
        settings["multiprocessing_context"] = loader.multiprocessing_context
        # A forked process hangs where another thread held a lock that its data need.
        settings["timeout"] = MAX_SECONDS
    if isinstance(dataset, IterableDataset):
        return DataLoader(dataset, loader.batch_size, drop_last=loader.drop_last, **settings)
    if loader.batch_sampler is None:
        settings["batch_size"] = None
        settings["sampler"] = _copied(loader.sampler, {id(loader.dataset): dataset})
    else:
        settings["batch_sampler"] = _copied(loader.batch_sampler, {id(loader.dataset): dataset})
    return DataLoader(dataset, **settings)


def _copied(sampler: Any, known: dict[int, Any]) -> Any:
    """Return a copy of a sampler, with what is `known` by its id; the sampler itself if it cannot be copied."""
    try:
        return copy.deepcopy(sampler, known)
    # A sampler may hold an open file or a lock.
    except Exception as error:
        name = type(sampler).__name__
        logger.warning("TrAct: %s cannot be copied (%s); what it counts moves on.", name, error)
        return sampler


@contextlib.contextmanager
def _preserved_generators(loader: Any) -> Iterator[None]:
    """Leave the generators of a loader and of its samplers, at any depth, as they were: not all can be copied."""
    states: dict[torch.Generator, Tensor] = {}
    waiting = [loader]
    seen: set[int] = set()
    while waiting:
        part = waiting.pop()
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        generator = getattr(part, "generator", None)
        if isinstance(generator, torch.Generator):
            states[generator] = generator.get_state()
        waiting += [getattr(part, "sampler", None), getattr(part, "batch_sampler", None)]
    try:
        yield
    finally:
        for generator, state in states.items():
            generator.set_state(state)


def move_batch(batch: Any, device: torch.device | None, dtype: torch.dtype) -> Any:
    """Return the batch on `device`, in a precision that fits the weight that reads it.

    Args:
        batch: tensors in mappings, lists and tuples.
        device: where to move it; None leaves it where it is.
        dtype: the weight's. If it has 16 bits, floats are converted to it, since without autocast it does not mix
            with float32.
    """
    is_half = dtype in (torch.float16, torch.bfloat16)

    def moved(tensor: Tensor) -> Tensor:
        if is_half and tensor.is_floating_point():
            return tensor.to(device=device, dtype=dtype)
        return tensor.to(device=device)

    return map_tensors(batch, moved)
