"""The first batches of a loader, which afterwards gives what it would have given."""

from __future__ import annotations

import contextlib
import itertools
import random
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch


def first_batches(loader: Iterable[Any], count: int = 4) -> list[Any]:
    """`count` batches of this rank, or as many as there are.

    The random numbers of torch, NumPy and Python, and those of the loader and its samplers, are as before afterwards, so
    that training does not depend on whether anybody looked.

    Args:
        loader: any loader, such as a `DataLoader`, also one that accelerate has prepared.
        count: how many.
    """
    # accelerate's own iteration tells the whole process that a loader has begun, and an end never comes here.
    loader = getattr(loader, "base_dataloader", loader)
    with _random_state_kept(), _generators_kept(loader):
        return list(itertools.islice(loader, count))


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
