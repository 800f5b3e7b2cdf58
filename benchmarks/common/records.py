"""Stores finished runs as JSON lines: what was run, what came out, and what it ran on."""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from hf_tract.integrations import provenance

PACKAGES = (*provenance.PACKAGES, "pytorch_optimizer", "torch_tract")
Row = dict[str, Any]


@dataclass
class RunRecord:
    """Describes one finished run, or one measurement."""

    # Two runs that are the same have the same key.
    key: str
    arm: str
    settings: dict[str, Any]
    seed: int
    # Each figure by its name: after each epoch of a run, or in each turn of a measurement.
    curve: dict[str, list[float]]
    # The time until the end of each epoch of a run, or that of each turn of a measurement.
    seconds: list[float]
    # The fingerprint of the data set.
    data: str = ""
    command: str = ""
    commit: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    hardware: str = ""


def key_of(*told: Any) -> str:
    """Return a short digest of what tells runs apart."""
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def environment() -> Row:
    """Return the commit, the versions and the hardware of this process, as fields of a record."""
    return {"commit": COMMIT, "versions": provenance.versions(PACKAGES), "hardware": provenance.hardware()}


def command() -> str:
    """Return the running command as a reader would type it, without the folders of this machine."""
    script = Path(sys.argv[0]).resolve()
    if not script.is_relative_to(ROOT / "benchmarks"):
        return provenance.command()
    module = ".".join(script.relative_to(ROOT).with_suffix("").parts)
    return provenance.command(["-m", module.removesuffix(".__main__"), *sys.argv[1:]])


def _commit() -> str:
    """Return the commit of this checkout, with a plus sign where the code has changed since."""
    if not shutil.which("git"):
        return ""
    found = _git("rev-parse", "--short=12", "HEAD")
    if found and _git("status", "--porcelain", "--", "src", "benchmarks"):
        found += "+"
    return found


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()


# The code that runs is that of the import; somebody may commit while a long series goes on.
COMMIT = _commit()


def read_rows(path: Path, latest: bool = False) -> dict[str, Row]:
    """Return the rows of a file by their keys; what is in it is not computed again.

    Args:
        path: of the file.
        latest: whether a later row takes the place of an earlier one, as for a measurement that is gone on with.

    Raises:
        ValueError: where two rows have one key otherwise, as after two commands at the same time.
    """
    rows: dict[str, Row] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["key"] in rows and not latest:
                raise ValueError(f"{path.name} has two rows of the key {row['key']}: delete one of them.")
            rows[row["key"]] = row
    return rows


def add_row(path: Path, row: Row) -> None:
    """Write a row at once, as one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_records(path: Path, latest: bool = False) -> dict[str, RunRecord]:
    """Return the records of a file by their keys; the arguments and errors are those of `read_rows`."""
    return {key: RunRecord(**row) for key, row in read_rows(path, latest).items()}


def add_record(path: Path, record: RunRecord) -> None:
    """Write a record at once, as one line."""
    add_row(path, dataclasses.asdict(record))
