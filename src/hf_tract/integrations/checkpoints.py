"""Finds a run's checkpoint, and compares its settings with those of now."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_tract.config import TrActConfig
from hf_tract.integrations.training_record import CONFIG_FILE

logger = logging.getLogger(__name__)


def compare_with_checkpoint(args: TrainingArguments, state: TrainerState, config: TrActConfig) -> None:
    """Warn if a run resumes with other settings than those of its checkpoint."""
    folder = checkpoint_folder(args, state)
    if folder is None:
        return
    then: Any = "no TrAct"
    if (folder / CONFIG_FILE).exists():
        then = TrActConfig.from_json_file(folder / CONFIG_FILE).to_dict()
    now = config.to_dict()
    if then != now:
        logger.warning(
            "TrAct: this run resumes from %s, which was trained with other settings: %s then, %s now.",
            folder,
            then,
            now,
        )


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path | None:
    """Return the folder of this step's checkpoint, which Trainer writes or resumes from; None if there is none."""
    name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    output = Path(args.output_dir or ".")
    folders = [output / name]
    if state.is_hyper_param_search:
        # Each trial of a search has a folder of its own, and callbacks do not know its name: the newest is this one's.
        folders = sorted(output.glob(f"*/{name}"), key=lambda path: path.stat().st_mtime, reverse=True)
    elif isinstance(args.resume_from_checkpoint, str):
        folders.append(Path(args.resume_from_checkpoint))
    for folder in folders:
        if folder.is_dir():
            return folder
    return None
