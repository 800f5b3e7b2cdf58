"""Replaces the model card that Trainer writes with hf-tract's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import Trainer

from hf_tract.integrations.training_record import TrainingRecord


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
