"""Recomputes the figures of README, docs and model cards from stored runs, and fails on one that does not follow.

    uv run --group bench python -m benchmarks.verify            # check
    uv run --group bench python -m benchmarks.verify --write    # write the tables between their marks again

What each document says is listed in benchmarks/verify/sentences.yaml, and its tables in tables.py. A figure fails that
the stored runs do not give, and so does one that no sentence covers.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from benchmarks import ROOT
from benchmarks.common.options import new_parser
from benchmarks.verify import figures
from benchmarks.verify.claims import NOT_MEASURED, UNCHECKED, claims
from benchmarks.verify.tables import TABLES


def main() -> None:
    """Check the documents, or write their tables."""
    args = parse()
    if args.write:
        write_tables()
    problems: list[str] = []
    checked = 0
    for path in documents():
        problems += problems_of(name_of(path), text_of(path))
        checked += 1
    console = Console(soft_wrap=True, highlight=False, emoji=False)
    for problem in problems:
        console.print(problem, markup=False)
    if problems:
        raise SystemExit(f"{len(problems)} figures of {checked} documents do not follow from stored runs.")
    counted = sum(len(sentences) for sentences in claims().values())
    console.print(f"{counted} sentences and {len(TABLES)} tables in {checked} documents follow from stored runs.")


def documents() -> Iterator[Path]:
    """Yield the documents whose figures are checked."""
    paths = [ROOT / "README.md", ROOT / "examples" / "README.md", *(ROOT / "model_cards").glob("*.md")]
    for pattern in ("*.md", "*.ipynb"):
        paths += (ROOT / "docs").rglob(pattern)
    for path in sorted(paths):
        if name_of(path) not in UNCHECKED:
            yield path


def text_of(path: Path) -> str:
    """Return what a reader sees of a document; of a notebook its text, without code and outputs."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = []
    for cell in json.loads(text)["cells"]:
        if cell["cell_type"] == "markdown":
            cells.append("".join(cell["source"]))
    return "\n\n".join(cells)


def name_of(path: Path) -> str:
    """Return the path of a document from the project's root."""
    return path.relative_to(ROOT).as_posix()


def problems_of(name: str, markdown: str) -> Iterator[str]:
    """Yield in words what does not follow in a document."""
    for table, rows in figures.tables(markdown).items():
        if table not in TABLES:
            yield f"{name}: no stored table is called {table}; there are {', '.join(TABLES)}."
        elif rows != TABLES[table]():
            yield f"{name}: the table {table} is not what the stored runs give; --write writes it."
    said = claims().get(name, [])
    known = list(NOT_MEASURED.get(name, {}))
    for sentence in [*said, *known]:
        if not figures.contains(markdown, sentence):
            yield f"{name}: benchmarks/verify/sentences.yaml gives {sentence!r}, which is not there."
    for figure in figures.uncovered(markdown, [*said, *known]):
        yield f"{name}:{figure.line}: {figure.text!r} is in no sentence of benchmarks/verify/sentences.yaml."


def write_tables() -> None:
    """Write the stored tables into the documents that have their marks."""
    for path in documents():
        if path.suffix != ".md":
            continue
        markdown = path.read_text(encoding="utf-8")
        named = figures.tables(markdown)
        if named:
            written = {table: TABLES[table]() for table in named}
            path.write_text(figures.with_tables(markdown, written), encoding="utf-8")


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--write", action="store_true", help="write the tables between their marks first")
    return parser.parse_args()


if __name__ == "__main__":
    main()
