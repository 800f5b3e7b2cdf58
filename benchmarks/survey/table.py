"""Collects the rows of all models, and writes docs/models.md from them."""

from __future__ import annotations

import multiprocessing
from importlib.metadata import version
from pathlib import Path

from rich.progress import track

from benchmarks.common.records import Row, add_row, read_rows
from benchmarks.survey.families import FAMILIES
from benchmarks.survey.look import BATCH, WORKS, look_in_worker
from benchmarks.survey.models import Subject

LIBRARIES = ("transformers", "timm", *FAMILIES)
FAMILY_HEADS = {"transformers": "model_type", "timm": "module"}
COMMAND = "uv run --group bench python -m benchmarks.survey --table docs/models.md"
HEAD = """# Which layer TrAct takes of which model

Every architecture that classifies images in transformers, one class of every other model type of its vision tasks, the
vision towers of its multimodal models, and a model of every timm module. Written by

```bash
{command}
```

with {versions}, on the CPU. Each model is made small (few layers, default width) with random weights (seed 0).

- **ok**: the layer is the one that the pixels meet first (its input changes with the pixels and not with any weight);
  outputs and all other gradients are those without TrAct bit by bit; the layer's gradient is the dense float64
  formula's to 1e-3; an optimizer step leaves finite weights.
- **n**: inputs of one output of the layer; C is n x n.
- **share**: TrAct's operations over those of a training step of the default model with a batch of {batch}, whose
  backward is counted as two forwards; - where the forward can't be counted without values.

`hf-tract inspect MODEL` shows the same of any other model."""


def rows(chosen: list[Subject], path: Path, workers: int) -> list[Row]:
    """Return a row for each model, in their order; those of `path` are taken over and new ones added to it."""
    known = read_rows(path)
    todo = [subject for subject in chosen if subject.key not in known]
    context = multiprocessing.get_context("spawn")
    # A worker is made anew after some models, which leave memory behind.
    with context.Pool(workers, maxtasksperchild=100) as pool:
        for row in track(pool.imap(look_in_worker, todo), "models", len(todo), disable=not todo):
            known[row["key"]] = row
            add_row(path, row)
    return [known[subject.key] for subject in chosen]


def table(found: list[Row]) -> str:
    """Return the text of docs/models.md."""
    named = ", ".join(f"{name} {number}" for name, number in versions().items())
    lines = [HEAD.format(command=COMMAND, versions=named, batch=BATCH)]
    for library in LIBRARIES:
        part = [row for row in found if row["library"] == library]
        if not part:
            continue
        good = [row for row in part if row["status"] == WORKS]
        family = FAMILY_HEADS.get(library, "library")
        lines.append(f"\n## {library}: {len(good)} of {len(part)} work\n")
        lines.append(f"| {family} | model | first layer | operation | n | share | status |")
        lines.append("|---|---|---|---|---|---|---|")
        lines += [line(row) for row in part]
    return "\n".join(lines) + "\n"


def line(row: Row) -> str:
    """Return a model's line of the table."""
    cells = []
    for key in ("name", "operation", "n"):
        values = dict.fromkeys(str(layer[key]) for layer in row["layers"])
        cells.append("<br>".join(values) or "-")
    share = "-"
    if row["share"] is not None:
        share = f"{100 * row['share']:.2g} %"
    remarks = [part for part in (row["status"], row["remark"]) if part]
    status = "; ".join(remarks).replace("|", "\\|")
    return f"| {row['family']} | {row['name']} | {' | '.join(cells)} | {share} | {status} |"


def versions() -> dict[str, str]:
    """Return the versions of what the table depends on."""
    return {name: version(name) for name in ("transformers", "timm", "torch")}
