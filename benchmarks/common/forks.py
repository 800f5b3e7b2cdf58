"""Starts `python -m MODULE` as a copy of a process that has imported the module, which saves half a minute a start."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait as wait_for
from multiprocessing.context import ForkServerProcess
from pathlib import Path

# An exit code can be read once, and a start reads those of all that have ended: not both at a time.
_READS_EXIT_CODES = threading.Lock()


def can_fork(command: Sequence[str], modules: Sequence[str]) -> bool:
    """Return whether a command is `python -m` and one of these modules, where processes can be copied safely."""
    return sys.platform == "linux" and list(command[:2]) == [sys.executable, "-m"] and command[2] in modules


def start(
    command: Sequence[str], modules: Sequence[str], log: Path, variables: Mapping[str, str]
) -> ForkServerProcess:
    """Start a command that `can_fork`.

    The process that is copied imports the modules before the first start, with the variables of this process.

    Args:
        command: `python -m MODULE ...`.
        modules: what is imported before.
        log: gets what the command prints, behind what it holds.
        variables: of the command's environment.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    process = context.Process(target=_run, args=(list(command[2:]), str(log), dict(variables)))
    with _READS_EXIT_CODES:
        process.start()
    return process


def wait(process: ForkServerProcess) -> int:
    """Wait for the end of a started command; return its exit code."""
    wait_for([process.sentinel])
    with _READS_EXIT_CODES:
        process.join()
    assert process.exitcode is not None
    return process.exitcode


def _run(words: list[str], log: str, variables: dict[str, str]) -> None:
    os.environ.update(variables)
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
