"""Collects the rows of all models, and writes docs/models.md from them."""

from __future__ import annotations

import multiprocessing
from importlib.metadata import version
from pathlib import Path

from rich.progress import track

from benchmarks.common import markdown
from benchmarks.common.records import Row, add_row, read_rows
from benchmarks.survey.families import FAMILIES
from benchmarks.survey.look import BATCH, WORKS, look_in_worker
from benchmarks.survey.models import Subject

LIBRARIES = ("transformers", "timm", *FAMILIES)
FAMILY_HEADS = {"transformers": "model_type", "timm": "module"}
COMMAND = "uv run --group bench python -m benchmarks.survey --table docs/models.md"
HEAD = Path(__file__).with_name("head.md").read_text(encoding="utf-8").rstrip()


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
    numbers = []
    for name, number in versions().items():
        numbers.append(f"{name} {number}")
    head = HEAD.format(command=COMMAND, versions=", ".join(numbers), batch=BATCH)
    lines = [head]
    for library in LIBRARIES:
        part = [row for row in found if row["library"] == library]
        if not part:
            continue
        statuses = [row["status"] for row in part]
        family = FAMILY_HEADS.get(library, "library")
        lines.append(f"\n## {library}: {statuses.count(WORKS)} of {len(part)} work\n")
        heads = [family, "model", "first layer", "operation", "n", "share", "status"]
        lines += markdown.table(heads, map(cells_of, part))
    return "\n".join(lines) + "\n"


def cells_of(row: Row) -> list[str]:
    """Return a model's row of the table."""
    cells = []
    for key in ("name", "operation", "n"):
        values: dict[str, None] = {}
        for layer in row["layers"]:
            values[str(layer[key])] = None
        cells.append("<br>".join(values) or "-")
    share = "-"
    if row["share"] is not None:
        share = f"{100 * row['share']:.2g} %"
    remarks = filter(None, (row["status"], row["remark"]))
    status = "; ".join(remarks).replace("|", "\\|")
    return [row["family"], row["name"], *cells, share, status]


def versions() -> dict[str, str]:
    """Return the versions of what the table depends on."""
    return {name: version(name) for name in ("transformers", "timm", "torch")}
