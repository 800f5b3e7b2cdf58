"""Writes the card of a run of Trainer, also in the place of Trainer's own."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from torch import nn
from transformers import Trainer, TrainerState, TrainingArguments

from hf_tract.apply import TrActHandle
from hf_tract.integrations.checkpoints import had_tract
from hf_tract.integrations.trainer_facts import facts_of_run
from hf_tract.integrations.training_record import RECORD_FILE, TrainingRecord

logger = logging.getLogger(__name__)


def write_card(
    args: TrainingArguments,
    state: TrainerState,
    model: nn.Module,
    handle: TrActHandle | None,
    settings: Mapping[str, Any],
    is_trained: bool,
) -> None:
    """Write the record of a run and its card; the arguments are those of `facts_of_run`."""
    try:
        facts = facts_of_run(args, state, model, handle, settings, is_trained)
        TrainingRecord(**facts).save(args.output_dir or ".", args.hub_model_id)
    # Weights that are not saved yet are worth more.
    except Exception as error:
        logger.warning("TrAct: the model card could not be written: %s", error)


def replace_card(args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
    """Write the card of a run without TrAct in the place of an earlier run's, which tells of other weights."""
    record = Path(args.output_dir or ".", RECORD_FILE)
    if state.is_world_process_zero and record.exists() and not had_tract(state):
        write_card(args, state, model, None, {}, is_trained=True)


def use_model_card(
    trainer: Trainer,
    *,
    dataset: str,
    license: str | None = None,
    base_model: str | None = None,
    split: str = "evaluation",
) -> None:
    """Make `trainer.create_model_card`, and so `trainer.push_to_hub`, write hf-tract's card, also without TrAct.

    Trainer writes its own card at the very end of a push, and no callback comes after that. The tags and the license
    that Trainer finds are kept.

    Args:
        trainer: any Trainer.
        dataset: as in `TrainingRecord`.
        license: by default the one that Trainer finds.
        base_model: as in `TrainingRecord.from_trainer`.
        split: as in `TrainingRecord.from_trainer`.
    """
    write_ordinary_card = trainer.create_model_card

    def create_model_card(*args: Any, **kwargs: Any) -> None:
        write_ordinary_card(*args, **kwargs)
        if not trainer.is_world_process_zero():
            return
        folder = Path(trainer.args.output_dir or ".")
        ordinary = ModelCard.load(folder / "README.md").data
        record = TrainingRecord.from_trainer(
            trainer,
            dataset=dataset,
            base_model=base_model,
            license=license or ordinary.license,
            split=split,
        )
        record.save(folder, trainer.hub_model_id or trainer.args.hub_model_id, ordinary.tags or ())

    trainer.create_model_card = create_model_card  # type: ignore[method-assign]
