"""TrAct in transformers and accelerate, and the card of a trained model."""

from hf_tract.integrations.accelerate_hook import TrActHook
from hf_tract.integrations.model_card import TrainingRecord
from hf_tract.integrations.trainer_callback import TrActCallback, TrActTrainerCallback
from hf_tract.integrations.trainer_card import use_model_card

__all__ = ["TrActCallback", "TrActHook", "TrActTrainerCallback", "TrainingRecord", "use_model_card"]
