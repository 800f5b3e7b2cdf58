"""Brings a value from an accelerator to the host without waiting, to be read in a later step."""

from __future__ import annotations

import torch
from torch import Tensor


class DelayedValue:
    """Holds a scalar that an accelerator computes; the host reads it once it has arrived."""

    def __init__(self) -> None:
        self._copy: Tensor | None = None
        self._event: torch.Event | None = None

    def send(self, value: Tensor) -> None:
        """Start to copy a scalar float tensor to the host, unless an earlier one is still on its way."""
        if value.is_cpu:
            self._copy = value.clone()
            return
        if value.device.type not in ("cuda", "xpu"):
            return
        if self._copy is None:
            # Only to pinned memory does a device copy while the host goes on.
            self._copy = torch.zeros((), dtype=torch.float64, pin_memory=True)
            self._event = torch.Event(value.device)
        elif self._event is not None and not self._event.query():
            return
        assert self._event is not None
        self._copy.copy_(value, non_blocking=True)
        self._event.record()

    def read(self) -> float:
        """Return the last value that has arrived, and forget it; 0 if there is none."""
        if self._copy is None or (self._event is not None and not self._event.query()):
            return 0.0
        value = float(self._copy)
        self._copy.zero_()
        return value
