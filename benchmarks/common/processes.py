"""Scripts as processes, several at once, each with its share of the cores or an accelerator of its own."""

import os
import queue
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.progress import track


@dataclass(frozen=True)
class Work:
    """Commands that are run one after the other, and the file that gets what they print."""

    commands: Sequence[Sequence[str]]
    log: Path
    name: str = ""


def run_all(
    what: str,
    todo: Sequence[Work],
    at_once: int,
    done: Callable[[Work], None] = lambda work: None,
    devices: Sequence[str] = (),
) -> list[str]:
    """Runs everything, and goes on where one fails.

    Args:
        what: of the progress bar.
        todo: the processes.
        at_once: how many run at the same time.
        done: is called in this thread with each that ended well.
        devices: what CUDA_VISIBLE_DEVICES is for the processes in turn; empty to leave it.

    Returns:
        What failed, in words.
    """
    threads = max(1, (os.cpu_count() or 1) // at_once)
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for index in range(at_once):
        free.put(devices[index % len(devices)] if devices else "")
    alive: set[subprocess.Popen[bytes]] = set()
    ended = False

    def run(work: Work) -> str | None:
        device = free.get()
        given = {"CUDA_VISIBLE_DEVICES": device} if device else {}
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **given}
        work.log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with work.log.open("w") as file:
                for command in work.commands:
                    if ended:
                        return None
                    process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
                    alive.add(process)
                    code = process.wait()
                    alive.discard(process)
                    if code:
                        return f"{shlex.join(command)} failed with {code}; what it printed is in {work.log}."
        finally:
            free.put(device)
        return None

    def stop(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)  # else the processes would outlive this one
    failed = []
    with ThreadPoolExecutor(at_once) as pool:
        running = {pool.submit(run, work): work for work in todo}
        try:
            for future in track(as_completed(running), what, len(todo), disable=not todo):
                if error := future.result():
                    failed.append(error)
                    print(error, file=sys.stderr, flush=True)
                else:
                    done(running[future])
        finally:
            ended = True
            for future in running:
                future.cancel()
            for process in list(alive):
                process.terminate()
            signal.signal(signal.SIGTERM, before)
    return failed
