"""Finished runs as JSON lines: what was run, what came out of each epoch, and what it ran on."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_tract.integrations import provenance

PACKAGES = (*provenance.PACKAGES, "torch_tract")
RAN_ON = "ran_on.json"  # versions and hardware, which a run leaves in its folder


@dataclass
class Result:
    """A finished run."""

    key: str  # of its job
    scale: str
    seed: int
    config: dict[str, Any]
    top1: list[float]  # on the test set, after each epoch
    top5: list[float]
    loss: list[float]  # of the epoch's last training batch
    seconds: list[float]  # of training until then: of the clock on an accelerator, of the process on CPU
    versions: dict[str, str]
    hardware: str
    command: str = field(default_factory=provenance.command)


def read(path: Path) -> dict[str, Result]:
    """The results of a file, by key."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    results = [Result(**json.loads(line)) for line in lines]
    return {result.key: result for result in results}


def add(path: Path, result: Result) -> None:
    """Writes a result at once, as one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(result)) + "\n")
