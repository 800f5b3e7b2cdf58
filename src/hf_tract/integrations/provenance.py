"""Where a figure comes from: the command, the hardware and the versions that stand beside it."""

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

PACKAGES = ("hf-tract", "torch", "transformers", "accelerate", "datasets", "timm")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")


def command(arguments: Sequence[str] | None = None) -> str:
    """The command that runs now, without what is nobody else's business: tokens, and where files lie on this machine.

    Args:
        arguments: the script and its arguments, by default those of this process.

    Example:
        >>> command(["/mnt/me/train.py", "--dataset", "/data/cifar10", "--hub_token=hf_AbCdEfGh1234"])
        'python train.py --dataset PATH_TO/cifar10 --hub_token=TOKEN'
    """
    script, *rest = sys.argv if arguments is None else arguments
    parts = [_relative(script), *("=".join(_relative(piece) for piece in part.split("=", 1)) for part in rest)]
    parts = ["TOKEN" if before.endswith("token") else part for before, part in zip(["", *parts], parts, strict=False)]
    return " ".join(["python", *(shlex.quote(_TOKEN.sub("TOKEN", part)) for part in parts)])


def _relative(part: str) -> str:
    """A path below the working folder from there on, another by its name."""
    path = Path(part)
    if not path.is_absolute() and not part.startswith(("../", "~")):
        return part
    if path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    return path.name if path.suffix == ".py" else f"PATH_TO/{path.name}"


def hardware() -> str:
    """The device that torch computes on, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{_cpu()}, {os.cpu_count()} cores, {threads} thread{'s' if threads > 1 else ''}"


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Of those packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    try:
        lines = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("Model name")]
    return f"{platform.machine()} {names[0]}" if names else platform.machine()
