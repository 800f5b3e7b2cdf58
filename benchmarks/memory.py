"""Peak memory of tensors, counted by their storages: exact on any device, deaf to the allocator's habits."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Bytes of the tensors that operations made inside and that are alive together: `peak`, and `now`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs `func` and counts the storages that it made."""
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in given | self._storages:
                    self._add(storage._cdata, storage.nbytes())
                    weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())
        return result

    def _add(self, key: int, size: int) -> None:
        self._storages.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _remove(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.now -= size
