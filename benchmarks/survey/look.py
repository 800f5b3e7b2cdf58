"""Looks at one model: which layer TrAct takes of it, and what is wrong, if anything is."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import time
import warnings
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from torch import nn

from benchmarks.common.records import Row
from benchmarks.survey import families
from benchmarks.survey.check import differences, met_first, objective, reference, run
from benchmarks.survey.families import FAMILIES
from benchmarks.survey.models import Subject, special_batch
from hf_tract import TrActError, apply_tract, find_first_layers
from hf_tract.cli.report import inspect_model
from hf_tract.discovery.inputs import guess_inputs, pixel_argument_name

LAM = 0.1
# The batch whose share of operations is computed.
BATCH = 64
WORKS = "ok"


def look(subject: Subject) -> Row:
    """Return the row of one model: what TrAct takes of it, and what is wrong, if anything is."""
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
    return {"key": subject.key, **subject._asdict(), "layers": [], "share": None, "remark": ""}


def _without_zeros(model: nn.Module) -> nn.Module:
    """Return the model with random numbers for projections of zeros, which let no gradient through."""
    for parameter in model.parameters():
        if parameter.dim() > 1 and not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.02)
    return model


def _checked(subject: Subject, model: nn.Module, found: list[str]) -> str:
    """Return what is wrong with the model in words, or that it works."""
    try:
        batch = _batch_for(subject, model)
    except Exception as error:
        return f"not run: {type(error).__name__}, {_brief(error)}"
    wrong = []
    pixels = pixel_argument_name(model) if isinstance(batch, dict) else None
    first = met_first(copy.deepcopy(model), batch, pixels)
    # The order is not compared, since timm has its own.
    if set(first) != set(found):
        wrong.append(f"the pixels meet {', '.join(first) or 'no layer'} first")
    want = reference(model, batch, found, LAM)
    if not want.expected:
        wrong.append("no gradient reaches the layer")
    with apply_tract(model, lam=LAM):
        wrong += differences(model, batch, want)[:3]
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3 / want.scale)
        optimizer.step()
    for name in want.expected:
        if not bool(model.get_parameter(name).isfinite().all()):
            wrong.append(f"{name} is not finite after a step")
    return "; ".join(wrong) or WORKS


def _batch_for(subject: Subject, model: nn.Module) -> Any:
    special = families.batch(subject.name) or special_batch(subject.name, model)
    if special is not None:
        return special
    # A forward may leave a cache behind.
    return _accepted(copy.deepcopy(model))


def _accepted(model: nn.Module) -> Any:
    """Return the first guessed batch that the model takes and can be trained on; raise the first guess's error."""
    errors = []
    for batch in guess_inputs(model, "cpu"):
        try:
            objective(run(model, batch))
        # This was a guess; the next may fit.
        except Exception as error:
            errors.append(error)
        else:
            return batch
    raise errors[0]


def _remark(model: nn.Module, found: list[str]) -> str:
    """Say where timm names another layer than the probe does."""
    config = getattr(model, "pretrained_cfg", None)
    if config is None:
        return ""
    named = config.get("first_conv") or []
    if isinstance(named, str):
        named = [named]
    if list(named) == found:
        return ""
    return f"timm's first_conv names {', '.join(named) or 'none'}"


def _figures(subject: Subject, found: list[str]) -> Row:
    """Return the layers' sizes and TrAct's share, of the model as its library makes it by default."""
    place: contextlib.AbstractContextManager[Any] = torch.device("meta")
    # Some of these libraries compute with numbers while they build.
    if subject.library in FAMILIES:
        place = contextlib.nullcontext()
    with place:
        model = subject.make(small=False)
    inspection = inspect_model(model, layers=found)
    layers = []
    for layer in inspection.layers:
        layers.append({"name": layer.name, "operation": layer.operation, "n": layer.columns})
    return {"layers": layers, "share": inspection.share(BATCH)}


def _brief(error: Exception) -> str:
    return " ".join(str(error).split()).split(". ")[0][:160]


def look_in_worker(subject: Subject) -> Row:
    """Return the row of one model, in a worker process, whose settings concern nobody else."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    start = time.perf_counter()
    try:
        return {**look(subject), "seconds": round(time.perf_counter() - start, 1)}
    # The table says so, and the others go on.
    except Exception as error:
        return {**_blank(subject), "status": f"failed: {_brief(error)}", "seconds": 0}
    finally:
        gc.collect()
