"""Runs commands, several at once, each with its share of the cores or an accelerator of its own."""

import os
import queue
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import FrameType

from rich.progress import track

from benchmarks import ROOT
from benchmarks.common.forks import can_fork, start, wait


@dataclass(frozen=True)
class Work:
    """Holds commands that are run one after the other, and names the file that gets what they print."""

    commands: Sequence[Sequence[str]]
    log: Path
    name: str = ""


def run_all(
    what: str,
    todo: Sequence[Work],
    at_once: int,
    done: Callable[[Work], None] = lambda work: None,
    devices: Sequence[str] = (),
    imported: Sequence[str] = (),
) -> list[str]:
    """Run everything, and go on where one fails.

    Args:
        what: the name of the progress bar.
        todo: what to run.
        at_once: how many run at the same time.
        done: called in this thread with each that ended well.
        devices: CUDA_VISIBLE_DEVICES of the processes in turn; empty to leave it.
        imported: modules that are imported once for all commands `python -m MODULE`.

    Returns:
        What failed, in words.
    """
    runner = _Runner(at_once, devices, imported)
    # Otherwise the processes would outlive this one.
    before = signal.signal(signal.SIGTERM, _exit)
    failed = []
    with ThreadPoolExecutor(at_once) as pool:
        running = {pool.submit(runner.run, work): work for work in todo}
        try:
            for future in track(as_completed(running), what, len(todo), disable=not todo):
                error = future.result()
                if error:
                    failed.append(error)
                    print(error, file=sys.stderr, flush=True)
                else:
                    done(running[future])
        finally:
            runner.stop(list(running))
            signal.signal(signal.SIGTERM, before)
    return failed


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


class _Runner:
    """Starts processes and ends those that are alive when it is stopped."""

    def __init__(self, at_once: int, devices: Sequence[str], imported: Sequence[str]) -> None:
        self.imported = imported
        # The process that is copied takes it over too.
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // at_once))
        self.devices: queue.SimpleQueue[str] = queue.SimpleQueue()
        for index in range(at_once):
            self.devices.put(devices[index % len(devices)] if devices else "")
        self.alive: set[subprocess.Popen[bytes] | ForkServerProcess] = set()
        self.stopped = False

    def run(self, work: Work) -> str | None:
        """Run the commands of one work; return what failed, in words."""
        device = self.devices.get()
        work.log.parent.mkdir(parents=True, exist_ok=True)
        try:
            work.log.write_bytes(b"")
            for command in work.commands:
                if self.stopped:
                    return None
                code = self._wait_for(command, work.log, device)
                if code:
                    return f"{shlex.join(command)} failed with {code}; what it printed is in {work.log}."
        finally:
            self.devices.put(device)
        return None

    def _wait_for(self, command: Sequence[str], log: Path, device: str) -> int:
        # The commands may be `python -m benchmarks...`, wherever this process was started.
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        variables = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        if device:
            variables["CUDA_VISIBLE_DEVICES"] = device
        if can_fork(command, self.imported):
            return self._wait_for_fork(command, log, variables)
        with log.open("a") as output:
            environment = {**os.environ, **variables}
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        self.alive.add(process)
        code = process.wait()
        self.alive.discard(process)
        return code

    def _wait_for_fork(self, command: Sequence[str], log: Path, variables: Mapping[str, str]) -> int:
        process = start(command, self.imported, log, variables)
        self.alive.add(process)
        code = wait(process)
        self.alive.discard(process)
        return code

    def stop(self, futures: Sequence[Future[str | None]]) -> None:
        """End the processes that are alive, and start no other."""
        self.stopped = True
        for future in futures:
            future.cancel()
        for process in list(self.alive):
            process.terminate()
