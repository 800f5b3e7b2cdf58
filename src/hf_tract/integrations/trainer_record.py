"""What transformers' Trainer knows of a run, as a record for its model's card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerState, TrainingArguments

from hf_tract.config import TrActConfig
from hf_tract.core.sharding import is_sharded
from hf_tract.integrations.model_card import CONFIG_FILE, TrainingRecord, save_card, without_local_path
from hf_tract.whitening.fresh import checkpoint_of

HYPERPARAMETERS = (
    *(
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "optim",
        "weight_decay",
        "max_grad_norm",
        "label_smoothing_factor",
    ),
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "fp16"),
)
UNSET = {"warmup_steps": 0, "label_smoothing_factor": 0, "max_steps": -1, "bf16": False, "fp16": False}
SCORES = {"eval_accuracy": "accuracy", "eval_top1": "accuracy", "eval_top5": "top5"}


def trainer_record(
    args: TrainingArguments,
    state: TrainerState,
    model: nn.Module,
    tract: TrActConfig | None,
    layers: Sequence[str] = (),
    *,
    dataset: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    split: str = "test",
    more: Mapping[str, Any] | None = None,
) -> TrainingRecord:
    """The record of a run of Trainer up to now.

    Args:
        args: Trainer's arguments.
        state: Trainer's state, whose log history becomes the curve and the metrics.
        model: what is trained.
        tract: the settings, None without TrAct.
        layers: the layers that TrAct took.
        dataset: a Hub id, or words.
        base_model: the checkpoint that training began with, by default the one that the model was loaded from.
        license: of the model.
        split: the data set's part that is evaluated on.
        more: hyperparameters that Trainer's arguments do not have.
    """
    config = getattr(model, "config", None)
    rows = history(state.log_history)
    name = getattr(config, "_name_or_path", "") if is_sharded(model) else checkpoint_of(model, model.parameters())
    base_model = base_model or name or None
    return TrainingRecord(
        name=(args.hub_model_id or Path(args.output_dir or "model").absolute().name).split("/")[-1],
        library="timm" if getattr(config, "model_type", None) == "timm_wrapper" else "transformers",
        dataset=without_local_path(dataset) if dataset else "a data set that its author did not name",
        tract=tract,
        layers=list(layers),
        base_model=without_local_path(base_model) if base_model else None,
        license=license,
        metrics={name: rows[-1][name] for name in dict.fromkeys(SCORES.values()) if rows and name in rows[-1]},
        history=rows,
        hyperparameters={
            **_settings(args),
            **({"processes": args.world_size} if args.world_size > 1 else {}),
            **(more or {}),
        },
        split=split,
        seed=args.seed,
    )


def save_trainer_card(
    args: TrainingArguments,
    state: TrainerState,
    model: nn.Module,
    tract: TrActConfig | None,
    layers: Sequence[str] = (),
    *,
    model_id: str | None = None,
    tags: Iterable[str] = (),
    **about: Any,
) -> None:
    """Writes the card of a run, up to now, into its output folder; an adapter's card is peft's, and gets the settings alone.

    Args:
        args: as for `trainer_record`, like those that are not named here.
        state: the same.
        model: the same.
        tract: the same.
        layers: the same.
        model_id: where the model will be on the Hub.
        tags: more of them.
        about: `dataset`, `base_model`, `license`, `split` and `more`.
    """
    folder = Path(args.output_dir or ".")
    if not hasattr(model, "peft_config"):
        save_card(trainer_record(args, state, model, tract, layers, **about), folder, model_id, tags)
    elif tract is not None:
        tract.to_json_file(folder / CONFIG_FILE)


def _settings(args: TrainingArguments) -> dict[str, Any]:
    """What was set of the arguments that matter to the weights."""
    values = {name: getattr(args, name) for name in HYPERPARAMETERS}
    values = {name: getattr(value, "value", value) for name, value in values.items()}  # enums
    return {name: value for name, value in values.items() if value != UNSET.get(name)}


def history(log: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """A row for each evaluation: its epoch, the training loss that was logged last, and its scores."""
    rows: list[dict[str, float]] = []
    loss: float | None = None
    for entry in log:
        loss = entry.get("loss", loss)
        scores = {name: entry[key] for key, name in {"eval_loss": "eval_loss", **SCORES}.items() if key in entry}
        if scores:
            rows.append(
                {"epoch": round(entry.get("epoch", 0), 2), **({"loss": loss} if loss is not None else {}), **scores}
            )
    return rows
