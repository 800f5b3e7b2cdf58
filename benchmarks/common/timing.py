"""Measures time and memory of several ways to do the same work, side by side in one run."""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Arms = dict[str, Callable[[], object]]


def interleaved(
    arms: Arms, repeats: int, device: torch.device, seconds: float = 0.1, warmup: int = 2
) -> dict[str, list[float]]:
    """Return seconds per call of each arm, `repeats` times, in turns, so that all of them meet the same disturbances.

    Args:
        arms: the ways, by name.
        repeats: measurements of each.
        device: what the arms compute on.
        seconds: least time of one measurement; a faster arm is called several times in it.
        warmup: calls of each arm before.
    """
    calls = {}
    for name, arm in arms.items():
        once = min(_timed(arm, 1, device) for _ in range(warmup))
        calls[name] = max(1, round(seconds / max(once, 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for turn in range(repeats):
        start = turn % len(names)
        # The order changes, so that no arm always follows the same one.
        for name in names[start:] + names[:start]:
            times[name].append(_timed(arms[name], calls[name], device))
    return times


def _timed(arm: Callable[[], object], calls: int, device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        arm()
    _synchronize(device)
    return (time.perf_counter() - start) / calls


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes of tensors that are alive together during `run`, beyond those that are alive before it.

    torch's allocator counts them: temporaries inside operations are in it; on the CPU, oneDNN's and cuDNN's own are
    not.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return _peak_on_host(events)


def _peak_on_host(events: list[dict[str, Any]]) -> int:
    """Return the most bytes that are allocated at once, from a profiler's events."""
    changes = [event for event in events if event.get("name") == "[memory]"]
    changes.sort(key=lambda event: event["ts"])
    now = peak = 0
    for event in changes:
        if event["args"]["Device Type"] == 0:
            now += event["args"]["Bytes"]
            peak = max(peak, now)
    return peak
