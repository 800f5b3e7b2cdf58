"""Reads from transformers' Trainer the facts about a run that a model's card lists."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.modelcard import TASK_MAPPING
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_tract.apply import TrActHandle
from hf_tract.core.sharding import is_sharded
from hf_tract.discovery.wrappers import unwrap
from hf_tract.integrations.model_card import KINDS
from hf_tract.whitening.fresh import checkpoint_of

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
# The names of scores in Trainer's log, and in a record.
SCORES = {"eval_loss": "eval_loss", "eval_accuracy": "accuracy", "eval_top1": "accuracy", "eval_top5": "top5"}


def find_handle(trainer: Trainer) -> tuple[TrActHandle | None, dict[str, Any]]:
    """Return TrAct's handle on the model of `trainer`, and the settings that only its callback knows."""
    for callback in trainer.callback_handler.callbacks:
        # `TrActCallback` cannot be named here: its module imports this one.
        if hasattr(callback, "handle_of"):
            handle = callback.handle_of(trainer.model)
            if handle is not None:
                return handle, callback.hyperparameters
    return None, {}


def history_of(log: Iterable[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Return a row for each evaluation in Trainer's log: its epoch, the last training loss before it, its scores."""
    rows = []
    loss = None
    for entry in log:
        loss = entry.get("loss", loss)
        scores = {name: entry[key] for key, name in SCORES.items() if key in entry}
        if not scores:
            continue
        row = {"epoch": round(entry.get("epoch", 0), 2)}
        if loss is not None:
            row["loss"] = loss
        row.update(scores)
        rows.append(row)
    return rows


def log_of_weights(args: TrainingArguments, state: TrainerState) -> list[dict[str, Any]]:
    """Return Trainer's log up to the step of the weights that the model has after training, the best or the last."""
    best = state.best_global_step
    if not args.load_best_model_at_end or not best:
        return state.log_history
    return [entry for entry in state.log_history if entry.get("step", 0) <= best]


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
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) == "timm_wrapper":
        return "timm"
    return "transformers"


def base_model_of(model: nn.Module, args: TrainingArguments) -> str | None:
    """Return the checkpoint that `model` was loaded from; None if there is none."""
    if is_sharded(model):
        # The parameters are shards now, and do not show whether they were loaded.
        config = getattr(model, "config", None)
        name = getattr(config, "_name_or_path", None)
    else:
        name = checkpoint_of(model, model.parameters())
    if not name:
        return None
    path = Path(name).absolute()
    output = Path(args.output_dir or ".").absolute()
    if path.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-") and path.is_relative_to(output):
        return "a checkpoint of the same run"
    return str(name)
