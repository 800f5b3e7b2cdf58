"""Measures time and memory of several ways to do the same work, side by side in one run."""

from __future__ import annotations

import gc
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Arms = dict[str, Callable[[], object]]
CALLS_ON_GPU = 10


def interleaved(
    arms: Arms, repeats: int, device: torch.device, seconds: float = 0.1, warmup: float = 0.1, seed: int = 0
) -> dict[str, list[float]]:
    """Return seconds per call of each arm, `repeats` times, in turns, so that all of them meet the same disturbances.

    Args:
        arms: the ways, by name.
        repeats: measurements of each.
        device: what the arms compute on.
        seconds: least time of one measurement; a faster arm is called several times in it. On a GPU it is called at
            least 10 times, so that the host runs ahead as it does in training.
        warmup: seconds for which each arm runs before, at least twice.
        seed: of the order of the arms, which is drawn anew in each turn.
    """
    calls = {}
    for name, arm in arms.items():
        once = _warm_up(arm, warmup, device)
        calls[name] = max(least_calls(device), round(seconds / max(once, 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in arms}
    order = list(arms)
    chance = random.Random(seed)
    for _ in range(repeats):
        chance.shuffle(order)
        for name in order:
            times[name].append(_timed(arms[name], calls[name], device))
    return times


def least_calls(device: torch.device) -> int:
    """Return how many calls a measurement has at least."""
    if device.type == "cpu":
        return 1
    return CALLS_ON_GPU


def _warm_up(arm: Callable[[], object], seconds: float, device: torch.device) -> float:
    """Call an arm for some seconds, at least twice; return the seconds of its fastest call."""
    end = time.perf_counter() + seconds
    fastest = min(_timed(arm, 1, device), _timed(arm, 1, device))
    while time.perf_counter() < end:
        fastest = min(fastest, _timed(arm, 1, device))
    return fastest


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
