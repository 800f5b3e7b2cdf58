"""Runs TrAct in transformers and accelerate, and writes the card of a trained model."""

from hf_tract.integrations.accelerate_hook import TrActHook
from hf_tract.integrations.trackers import stats_to_log
from hf_tract.integrations.trainer_callback import TrActCallback, TrActTrainerCallback
from hf_tract.integrations.trainer_card import use_model_card
from hf_tract.integrations.training_record import TrainingRecord

__all__ = ["TrActCallback", "TrActHook", "TrActTrainerCallback", "TrainingRecord", "stats_to_log", "use_model_card"]
