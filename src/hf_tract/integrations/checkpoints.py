"""Finds a run's checkpoint, and compares its settings with those of now."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)

# The key under which Trainer's state, which every checkpoint holds, has the settings.
STATE_KEY = "hf_tract"


def remember_settings(state: TrainerState, settings: dict[str, Any]) -> None:
    """Write the settings into Trainer's state."""
    _states_of(state)[STATE_KEY] = {"args": settings, "attributes": {}}


def had_tract(state: TrainerState) -> bool:
    """Return whether TrAct was on in this run, or in the one that it resumes."""
    return STATE_KEY in _states_of(state)


def compare_with_checkpoint(state: TrainerState, now: dict[str, Any]) -> None:
    """Warn if a run resumes with other settings than those of its checkpoint, wherever that lies."""
    if not state.global_step:
        return
    then: Any = "no TrAct"
    if had_tract(state):
        then = _states_of(state)[STATE_KEY]["args"]
    if then != now:
        logger.warning(
            "TrAct: this run resumes from step %d of a run with other settings: %s then, %s now. To go on as before, "
            "give `TrActCallback` those of then.",
            state.global_step,
            then,
            now,
        )


def _states_of(state: TrainerState) -> dict[str, Any]:
    return cast("dict[str, Any]", state.stateful_callbacks)  # a list only until the state is made


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
