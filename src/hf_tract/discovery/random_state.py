"""Random numbers that a trial must leave as they were."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Leaves the random numbers of torch (on the CPU), numpy and Python as they were."""
    python, numpy = random.getstate(), sys.modules.get("numpy")
    arrays = numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng([]):
            yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(arrays)
