"""Finds a run's checkpoint, and compares its settings with those of now."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_tract.config import TrActConfig

logger = logging.getLogger(__name__)

# The entry of Trainer's log that holds the settings; checkpoints hold the log, wherever they lie.
SETTINGS = "tract_config"


def log_settings(state: TrainerState, config: TrActConfig) -> None:
    """Add the settings to Trainer's log."""
    entry: dict[str, Any] = {"epoch": state.epoch or 0, "step": state.global_step, SETTINGS: config.to_dict()}
    state.log_history.append(entry)


def compare_with_checkpoint(state: TrainerState, config: TrActConfig) -> None:
    """Warn if a run resumes with other settings than those of its checkpoint."""
    if not state.global_step:
        return
    then: Any = "no TrAct"
    for entry in state.log_history:
        then = entry.get(SETTINGS, then)
    now = config.to_dict()
    if then != now:
        logger.warning(
            "TrAct: this run resumes from step %d of a run with other settings: %s then, %s now.",
            state.global_step,
            then,
            now,
        )


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path | None:
    """Return the folder of the checkpoint that Trainer has just written; None if there is none."""
    name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    output = Path(args.output_dir or ".")
    folders = [output / name]
    if state.is_hyper_param_search:
        # Each trial of a search has a folder of its own, and callbacks do not know its name: the newest is this one's.
        folders = list(output.glob(f"*/{name}"))
    folders = [folder for folder in folders if folder.is_dir()]
    return max(folders, key=lambda path: path.stat().st_mtime, default=None)
