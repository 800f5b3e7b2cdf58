"""Brings a flag from an accelerator to the host without waiting, to be read in a later step."""

from __future__ import annotations

import torch
from torch import Tensor


class DelayedFlag:
    """Holds a flag that an accelerator computes; the host reads it once it has arrived."""

    def __init__(self) -> None:
        self._copy: Tensor | None = None
        self._event: torch.Event | None = None

    def send(self, flag: Tensor) -> bool:
        """Start to copy a scalar bool tensor to the host; return False if an earlier one is still on its way."""
        if flag.is_cpu:
            self._copy = flag
            return True
        if flag.device.type not in ("cuda", "xpu") or _is_captured():
            return False
        if self._copy is None or self._event is None:
            # Only to pinned memory does a device copy while the host goes on.
            self._copy = torch.zeros((), dtype=torch.bool, device="cpu", pin_memory=True)
        elif not self._event.query():
            return False
        self._copy.copy_(flag, non_blocking=True)
        # An event belongs to one device, and DataParallel's replicas, which share this object, are on several.
        self._event = torch.Event(flag.device)
        self._event.record()
        return True

    def read(self) -> bool:
        """Return whether the flag that was sent last has arrived, and is set."""
        if self._copy is None:
            return False
        if self._event is not None and (_is_captured() or not self._event.query()):
            return False
        return bool(self._copy)


def _is_captured() -> bool:
    """Return whether a CUDA graph is being captured; to ask for an event would break that off."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
