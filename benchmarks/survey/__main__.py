"""Lists the layer that TrAct takes of every vision architecture of the installed transformers and timm, and checks it.

    uv run --group bench python -m benchmarks.survey --table docs/models.md

makes each model small, with random weights, and asks of it: is the layer that TrAct finds the one that the pixels meet
first; are its outputs the same bit by bit; is its gradient the dense float64 formula's, and every other one untouched;
does it step? The model of the default config, on the meta device, tells TrAct's share of a training step's operations.
Results are written to --output as they come; what is in it already, of the same versions, is not looked at again
(--fresh forgets it).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import multiprocessing
import os
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from rich.progress import track
from torch import nn
from torch.utils._pytree import tree_leaves

from benchmarks.survey import families as survey_families
from benchmarks.survey.check import differences, met_first, objective, reference, run
from benchmarks.survey.families import FAMILIES
from benchmarks.survey.models import Subject, special_batch, subjects
from hf_tract import TrActError, apply_tract, find_first_layers
from hf_tract.cli.report import inspect_model
from hf_tract.discovery.inputs import guess_inputs, pixel_argument_name

LAM = 0.1
BATCH = 64  # of the share of operations
LARGEST = 4 * 10**6  # numbers of a batch
WORKS = "ok"
LIBRARIES = ("transformers", "timm", *FAMILIES)
Row = dict[str, Any]


def look(subject: Subject) -> Row:
    """The row of one model: what TrAct takes of it, and what is wrong, if anything is."""
    torch.manual_seed(0)
    row = _blank(subject)
    try:
        model = _without_zeros(subject.make(small=True).eval())
    except Exception as error:
        return {**row, "status": f"not built: {_brief(error)}"}
    try:
        found = [layer.name for layer in find_first_layers(model)]
    except TrActError as error:
        return {**row, "status": f"refused: {_brief(error)}"}
    row["remark"] = _remark(model, found)
    row["status"] = _checked(subject, model, found)
    del model
    return {**row, **_figures(subject, found)}


def _blank(subject: Subject) -> Row:
    return {**subject._asdict(), "layers": [], "share": None, "remark": ""}


def _without_zeros(model: nn.Module) -> nn.Module:
    """A model in which no projection starts as zero, which would keep every gradient from what is below."""
    for parameter in model.parameters():
        if parameter.dim() > 1 and not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.02)
    return model


def _checked(subject: Subject, model: nn.Module, found: list[str]) -> str:
    special = survey_families.batch(subject.name) or special_batch(subject.name, model)
    try:
        batch = _accepted(copy.deepcopy(model)) if special is None else special  # a forward may leave a cache behind
    except Exception as error:
        return f"not run: {type(error).__name__}, {_brief(error)}"
    wrong = []
    first = met_first(copy.deepcopy(model), batch, pixel_argument_name(model) if isinstance(batch, dict) else None)
    if set(first) != set(found):  # timm's order is its own
        wrong.append(f"the pixels meet {', '.join(first) or 'no layer'} first")
    want = reference(model, batch, found, LAM)
    if not want.expected:
        wrong.append("no gradient reaches the layer")
    with apply_tract(model, lam=LAM):
        wrong += differences(model, batch, want)[:3]
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3 / want.scale)
        optimizer.step()
    moved = [name for name in want.expected if not bool(model.get_parameter(name).isfinite().all())]
    return "; ".join(wrong + [f"{name} is not finite after a step" for name in moved]) or WORKS


def _accepted(model: nn.Module) -> Any:
    """Returns the first guessed batch that the model takes and can be trained on; raises the first guess's error."""
    errors = []
    for batch in guess_inputs(model, "cpu"):
        if _numbers(batch) > LARGEST:
            continue
        try:
            objective(run(model, batch))
        except Exception as error:  # a guess; the next may fit
            errors.append(error)
        else:
            return batch
    raise errors[0]


def _numbers(batch: Any) -> int:
    return sum(leaf.numel() for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor))


def _remark(model: nn.Module, found: list[str]) -> str:
    """Where timm says something else than the probe does, for the table to say why."""
    config = getattr(model, "pretrained_cfg", None)
    if config is None:
        return ""
    said = config.get("first_conv") or ()
    said = [said] if isinstance(said, str) else list(said)
    return "" if said == found else f"timm's first_conv names {', '.join(said) or 'none'}"


def _figures(subject: Subject, found: list[str]) -> Row:
    """The layers' sizes and TrAct's share, of the model as its library makes it by default."""
    # Some libraries compute with numbers while they build.
    with contextlib.nullcontext() if subject.library in FAMILIES else torch.device("meta"):
        model = subject.make(small=False)
    inspection = inspect_model(model, layers=found)
    layers = [{"name": layer.name, "operation": layer.operation, "n": layer.columns} for layer in inspection.layers]
    return {"layers": layers, "share": inspection.share(BATCH)}


def _brief(error: Exception) -> str:
    return " ".join(str(error).split()).split(". ")[0][:160]


def rows(chosen: list[Subject], path: Path, workers: int) -> list[Row]:
    """A row for each model, in their order; those of `path` are taken over and new ones added to it."""
    known = (
        {(row["library"], row["name"]): row for row in map(json.loads, path.read_text().splitlines())}
        if path.exists()
        else {}
    )
    todo = [subject for subject in chosen if (subject.library, subject.name) not in known]
    context = multiprocessing.get_context("spawn")  # a worker is made anew after some models: they leave memory behind
    with path.open("a") as file, context.Pool(workers, maxtasksperchild=100) as pool:
        for row in track(pool.imap(_looked, todo), "models", len(todo), disable=not todo):
            known[row["library"], row["name"]] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
    return [known[subject.library, subject.name] for subject in chosen]


def _looked(subject: Subject) -> Row:
    """The row of one model, in a worker process, whose settings concern nobody else."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    start = time.perf_counter()
    try:
        return {**look(subject), "seconds": round(time.perf_counter() - start, 1)}
    except Exception as error:  # the table says so, and the others go on
        return {**_blank(subject), "status": f"failed: {_brief(error)}", "seconds": 0}
    finally:
        gc.collect()


def table(found: list[Row]) -> str:
    """docs/models.md."""
    lines = [
        HEAD.format(
            command=COMMAND, versions=", ".join(f"{name} {number}" for name, number in versions().items()), batch=BATCH
        )
    ]
    for library in LIBRARIES:
        part = [row for row in found if row["library"] == library]
        if not part:
            continue
        good = sum(row["status"] == WORKS for row in part)
        lines.append(f"\n## {library}: {good} of {len(part)} work\n")
        family = {"transformers": "model_type", "timm": "module"}.get(library, "library")
        lines.append(f"| {family} | model | first layer | operation | n | share | status |")
        lines.append("|---|---|---|---|---|---|---|")
        lines += [line(row) for row in part]
    return "\n".join(lines) + "\n"


def line(row: Row) -> str:
    """A model's line of the table."""
    layers = row["layers"]
    cells = [
        "<br>".join(dict.fromkeys(str(layer[key]) for layer in layers)) or "-" for key in ("name", "operation", "n")
    ]
    share = "-" if row["share"] is None else f"{100 * row['share']:.2g} %"
    status = "; ".join(part for part in (row["status"], row["remark"]) if part).replace("|", "\\|")
    return f"| {row['family']} | {row['name']} | {' | '.join(cells)} | {share} | {status} |"


def versions() -> dict[str, str]:
    """Of what the table depends on."""
    return {name: version(name) for name in ("transformers", "timm", "torch")}


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


def main() -> None:
    """Looks at the models and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="only these classes or timm models")
    parser.add_argument("--library", choices=LIBRARIES)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    parser.add_argument("--table", type=Path, help="write the table here")
    parser.add_argument("--output", type=Path, default=Path("outputs/survey"))
    parser.add_argument("--fresh", action="store_true", help="forget earlier results in --output")
    args = parser.parse_args()
    chosen = [
        s for s in subjects() if args.library in (None, s.library) and (not args.models or s.name in args.models)
    ]
    if not chosen:
        sys.exit(f"--models {args.models} names no model of this survey.")
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / ("_".join(versions().values()) + ".jsonl")
    if args.fresh:
        path.unlink(missing_ok=True)
    found = rows(chosen, path, args.workers)
    for row in found:
        if row["status"] != WORKS or row["remark"]:
            print(f"{row['name']}: {row['status']} {row['remark']}")
    print(f"{sum(row['status'] == WORKS for row in found)} of {len(found)} work")
    if args.table:
        args.table.write_text(table(found), encoding="utf-8")


if __name__ == "__main__":
    main()
