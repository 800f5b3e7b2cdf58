"""Reads from transformers' Trainer the facts about a run that a model's card lists."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerState, TrainingArguments
from transformers.modelcard import TASK_MAPPING
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_tract.apply import TrActHandle
from hf_tract.core.attach import preconditioner_of
from hf_tract.core.notices import warn_once
from hf_tract.core.weights import is_frozen
from hf_tract.discovery.first_layer import NAMED, FirstLayer
from hf_tract.discovery.wrappers import modules_by_name, unwrap
from hf_tract.integrations.model_card import KINDS, METRICS
from hf_tract.whitening.fresh import checkpoint_name, were_loaded

# Trainer's arguments that a card lists, each with the value at which it is left out.
HYPERPARAMETERS = {
    "learning_rate": None,
    "lr_scheduler_type": None,
    "warmup_steps": 0,
    "optim": None,
    "weight_decay": None,
    "max_grad_norm": None,
    "label_smoothing_factor": 0,
    "num_train_epochs": None,
    "max_steps": -1,
    "per_device_train_batch_size": None,
    "gradient_accumulation_steps": None,
    "bf16": False,
    "fp16": False,
}
# Of so many classes or fewer, all are among the best five.
TOP = 5
_warned: set[str] = set()
# The names of scores in Trainer's log, and in a record.
SCORES = {"eval_loss": "eval_loss", "eval_accuracy": "accuracy", "eval_top1": "accuracy", "eval_top5": "top5"}


def facts_of_run(
    args: TrainingArguments,
    state: TrainerState,
    model: nn.Module,
    handle: TrActHandle | None,
    settings: Mapping[str, Any],
    is_trained: bool,
) -> dict[str, Any]:
    """Return the arguments of a `TrainingRecord` for a run so far, from what both a Trainer and its callbacks have.

    Args:
        args: Trainer's arguments.
        state: Trainer's state, whose log becomes the history and the metrics.
        model: the model that is trained.
        handle: the handle of TrAct on that model; None without TrAct.
        settings: further hyperparameters, which are not among Trainer's arguments.
        is_trained: whether training has ended, and Trainer has loaded the best weights if it was to.
    """
    history = history_of(state.log_history)
    reached = history
    if is_trained:
        reached = history_of(log_of_weights(args, state))
    scores = shares_of(reached[-1] if reached else {}, model)
    model_id = args.hub_model_id or Path(args.output_dir or "model").absolute().name
    facts: dict[str, Any] = {
        "name": model_id.split("/")[-1],
        "library": library_of(model),
        "dataset": "a data set that its author did not name",
        "base_model": base_model_of(model, args),
        "metrics": scores,
        "history": history,
        "hyperparameters": {**hyperparameters_of(args, state), **settings},
        "split": "evaluation",
        "seed": args.seed,
        "task": task_of(model),
    }
    if handle is not None:
        facts["tract"] = handle.config
        facts["layers"] = [layer.name for layer in handle.layers]
    return facts


def find_handle(trainer: Trainer) -> tuple[TrActHandle | None, dict[str, Any]]:
    """Return TrAct's handle on the model of `trainer`, and the settings that only its callback knows."""
    for callback in trainer.callback_handler.callbacks:
        # `TrActCallback` cannot be named here: its module imports this one.
        if hasattr(callback, "handle_of"):
            handle = callback.handle_of(trainer.model)
            if handle is not None:
                return handle, callback.hyperparameters
    return _handle_on(trainer.model), {}


def _handle_on(model: nn.Module | None) -> TrActHandle | None:
    """Return a handle on the layers that have TrAct from elsewhere, as from `apply_tract`; None if none is trained."""
    if model is None:
        return None
    layers = []
    for name, module in modules_by_name(model).items():
        preconditioner = preconditioner_of(module)
        if preconditioner is not None and not is_frozen(module):
            config = preconditioner.config
            layers.append(FirstLayer(name, module, NAMED))
    if not layers:
        return None
    return TrActHandle(model, layers, config)


def history_of(log: Iterable[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Return a row for each evaluation in Trainer's log: its epoch, the last training loss before it, its scores."""
    rows = []
    loss = None
    for entry in log:
        loss = entry.get("loss", loss)
        scores = {name: entry[key] for key, name in SCORES.items() if isinstance(entry.get(key), Real)}
        if not scores:
            continue
        row = {"epoch": round(entry.get("epoch", 0), 2)}
        if loss is not None:
            row["loss"] = loss
        row.update(scores)
        rows.append(row)
    return rows


def shares_of(row: Mapping[str, float], model: nn.Module) -> dict[str, float]:
    """Return the scores of a row that a card shows, and warn of those that are no shares of 1."""
    config = getattr(unwrap(model), "config", None)
    scores = {}
    for name in METRICS:
        if name not in row or (name == "top5" and getattr(config, "num_labels", math.inf) <= TOP):
            continue
        if 0 <= row[name] <= 1:
            scores[name] = row[name]
        else:
            warn_once(_warned, f"TrAct: the model card leaves out {name}, which is {row[name]:g} and no share of 1.")
    return scores


def log_of_weights(args: TrainingArguments, state: TrainerState) -> list[dict[str, Any]]:
    """Return Trainer's log up to the step of the weights that the model has after training, the best or the last."""
    # The best step itself may have been one that was not saved.
    folder = state.best_model_checkpoint
    if not args.load_best_model_at_end or folder is None:
        return state.log_history
    _, _, step = Path(folder).name.rpartition("-")
    return [entry for entry in state.log_history if entry.get("step", 0) <= int(step)]


def hyperparameters_of(args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
    """Return the arguments in `HYPERPARAMETERS`, without those at the value at which a card leaves them out."""
    values = {}
    for name, neutral in HYPERPARAMETERS.items():
        value = getattr(args, name, neutral)
        value = getattr(value, "value", value)  # Some are enums.
        if value != neutral:
            values[name] = value
    if state.train_batch_size:
        # `auto_find_batch_size` may have changed it.
        values["per_device_train_batch_size"] = state.train_batch_size // max(1, args.n_gpu)
    if args.max_steps > 0:
        del values["num_train_epochs"]
    if args.world_size > 1:
        values["processes"] = args.world_size
    return values


def task_of(model: nn.Module) -> str | None:
    """Return what the Hub calls the task of `model`, if it is one of `KINDS`; None otherwise."""
    names = {each.__name__ for each in type(unwrap(model)).__mro__}
    mappings: dict[str, Any] = TASK_MAPPING
    for task in KINDS:
        for classes in mappings.get(task, {}).values():
            if isinstance(classes, str):
                classes = [classes]
            if not names.isdisjoint(classes):
                return task
    return None


def library_of(model: nn.Module) -> str:
    """Return the name of the library that loads `model`."""
    if hasattr(model, "peft_config"):
        return "peft"
    whole = unwrap(model)
    if not isinstance(whole, PreTrainedModel):
        return "pytorch"  # Trainer saves nothing but its state dict.
    if whole.config.model_type == "timm_wrapper":
        return "timm"
    return "transformers"


def base_model_of(model: nn.Module, args: TrainingArguments) -> str:
    """Return the checkpoint that `model` was loaded from; "" if it is not known.

    Weights without transformers' mark may be random, loaded by `load_state_dict`, or shards.
    """
    name = checkpoint_name(unwrap(model))
    if not name or not were_loaded(model.parameters()):
        return ""
    path = Path(name).absolute()
    output = Path(args.output_dir or ".").absolute()
    if path.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-") and path.is_relative_to(output):
        return "a checkpoint of the same run"
    return name
