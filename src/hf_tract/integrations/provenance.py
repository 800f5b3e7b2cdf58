"""Describes how a result was computed: the command, the hardware and the versions."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from accelerate import PartialState

PACKAGES = ("hf-tract", "torch", "transformers", "accelerate", "datasets", "timm")
# What a notebook's kernel has in place of a script.
NOTEBOOKS = ("ipykernel_launcher.py", "colab_kernel_launcher.py")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")
# In an address.
_LOGIN = re.compile(r"(?<=://)[^/\s@]+@")
# Ends of the names of options whose values are private.
SECRETS = ("token", "secret", "password", "passwd", "api_key", "apikey", "access_key", "secret_key")


def command(arguments: Sequence[str] | None = None) -> str:
    """Return the running command, without tokens and passwords and without the folders of this machine.

    How several processes were started is not known: a comment says how many there were.

    Args:
        arguments: the script and its arguments, by default those of this process.

    Examples:
        >>> command(["/mnt/me/train.py", "--dataset", "/data/cifar10", "--hub_token=hf_AbCdEfGh1234"])
        'python train.py --dataset PATH_TO/cifar10 --hub_token=TOKEN'
    """
    arguments = arguments or sys.argv
    if Path(arguments[0]).name in NOTEBOOKS:
        return "# in a notebook"
    words = ["python"]
    option = ""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        word = _without_folder(name) + equals + _without_folder(value)
        if equals and _is_secret(name):
            word = f"{name}=TOKEN"
        if option.startswith("-") and _is_secret(option):
            word = "TOKEN"
        word = _TOKEN.sub("TOKEN", word)
        words.append(shlex.quote(_LOGIN.sub("TOKEN@", word)))
        option = argument
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        words.append(f"  # by a launcher, on {processes} processes")
    return " ".join(words)


def _is_secret(name: str) -> bool:
    return name.lower().replace("-", "_").endswith(SECRETS)


def _without_folder(argument: str) -> str:
    """Return a path in the working folder relative to it, and of any other path only its name."""
    path = Path(argument)
    if not path.is_absolute() and not argument.startswith(("../", "~")):
        return argument
    if path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    if path.suffix == ".py":
        return path.name
    return f"PATH_TO/{path.name}"


def hardware() -> str:
    """Return the name of the device that torch computes on; the one that accelerate uses where it has begun."""
    device = torch.device("cpu")
    if PartialState._shared_state:
        device = PartialState().device
    elif torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator() or device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return f"{_cpu()}, {device.type}"
    threads = torch.get_num_threads()
    unit = "thread" if threads == 1 else "threads"
    return f"{_cpu()}, {os.cpu_count()} cores, {threads} {unit}"


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    try:
        listing = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return platform.machine()
    for line in listing.splitlines():
        if line.startswith("Model name"):
            return f"{platform.machine()} {line.split(':', 1)[1].strip()}"
    return platform.machine()
