"""Lists the layer that TrAct takes of every vision architecture of the installed transformers and timm, and checks it.

    uv run --group bench python -m benchmarks.survey --table docs/models.md

makes each model small, with random weights, and asks of it: is the layer that TrAct finds the one that the pixels meet
first; are its outputs the same bit by bit; is its gradient the dense float64 formula's, and every other one untouched;
does it step? The model of the default config, on the meta device, tells TrAct's share of a training step's operations.
Results are written to --output_dir as they come; what is in it already, of the same versions, is not looked at again
(--fresh forgets it).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.common.options import new_parser
from benchmarks.survey.look import WORKS
from benchmarks.survey.models import subjects
from benchmarks.survey.table import LIBRARIES, rows, table, versions


def main() -> None:
    """Look at the models and write the table."""
    args = parse()
    chosen = []
    for subject in subjects():
        if args.library in (None, subject.library) and (not args.models or subject.name in args.models):
            chosen.append(subject)
    if not chosen:
        sys.exit(f"--models {args.models} names no model of this survey.")
    path = args.output_dir / ("_".join(versions().values()) + ".jsonl")
    if args.fresh:
        path.unlink(missing_ok=True)
    found = rows(chosen, path, args.workers)
    works = [row for row in found if row["status"] == WORKS]
    for row in found:
        if row["status"] != WORKS or row["remark"]:
            print(f"{row['name']}: {row['status']} {row['remark']}")
    print(f"{len(works)} of {len(found)} work")
    if args.table:
        args.table.write_text(table(found), encoding="utf-8")


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--models", nargs="+", metavar="NAME", help="only these classes or timm models")
    add("--library", choices=LIBRARIES, help="only this one's models")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    add("--table", type=Path, help="write the table here")
    add("--output_dir", type=Path, default=Path("outputs/survey"), help="for results, tables and plots")
    add("--fresh", action="store_true", help="forget earlier results in --output_dir")
    return parser.parse_args()


if __name__ == "__main__":
    main()
