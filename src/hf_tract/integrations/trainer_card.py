"""`use_model_card`: the card that Trainer writes tells of TrAct."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import Trainer

from hf_tract.integrations.trainer_callback import TrActCallback
from hf_tract.integrations.trainer_record import save_trainer_card


def use_model_card(
    trainer: Trainer, *, dataset: str, license: str | None = None, base_model: str | None = None, split: str = "test"
) -> None:
    """Lets `trainer.create_model_card`, and so `trainer.push_to_hub`, write hf-tract's card, with TrAct or without it.

    Trainer writes its own card at the very end of a push, and no callback comes after that. What it finds by itself, such
    as tags and the license of the checkpoint, is taken over.

    Args:
        trainer: any Trainer.
        dataset: a Hub id, or words.
        license: of the model, as the Hub abbreviates it.
        base_model: the checkpoint that training began with, by default what the model's config says.
        split: the data set's part that is evaluated on.
    """
    ordinary = trainer.create_model_card

    def create_model_card(*args: Any, **kwargs: Any) -> None:
        ordinary(*args, **kwargs)
        if not trainer.is_world_process_zero():
            return
        folder = Path(trainer.args.output_dir or ".")
        model = trainer.accelerator.unwrap_model(trainer.model)
        said = ModelCard.load(folder / "README.md").data
        callbacks = trainer.callback_handler.callbacks
        handles = [(each, each.handle_of(trainer.model)) for each in callbacks if isinstance(each, TrActCallback)]
        callback, used = next((pair for pair in handles if pair[1]), (None, None))
        save_trainer_card(
            trainer.args, trainer.state, model, used.config if used else None,
            [layer.name for layer in used.layers] if used else [],
            model_id=trainer.hub_model_id or trainer.args.hub_model_id, tags=said.tags or (),
            dataset=dataset, base_model=base_model, license=license or said.license, split=split,
            more=callback.hyperparameters if callback else None,
        )  # fmt: skip

    trainer.create_model_card = create_model_card  # type: ignore[method-assign]
