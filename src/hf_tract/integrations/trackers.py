"""Names TrAct's figures, and writes them to the trackers that Trainer reports to.

Trainer calls its own tracker callbacks before those of the user, so what a user's callback adds to the logs comes too
late for them. The figures are therefore written to the same run directly.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations

from hf_tract.apply import TrActHandle

logger = logging.getLogger(__name__)


class Trackers:
    """Writes figures to the runs that Trainer's tracker callbacks have begun, under the names that they would give."""

    def __init__(self, args: TrainingArguments) -> None:
        self._names = _tracker_names(args.report_to)
        self._tensorboard: Any = None
        if "tensorboard" in self._names:
            self._tensorboard = _open_tensorboard(args)
        unknown = [name for name in self._names if name not in ("tensorboard", "wandb", "trackio")]
        if unknown:
            logger.warning(
                "TrAct: its figures are in Trainer's logs, and not in %s, which reads the logs before any callback of "
                'yours. To have them there, set `report_to="none"` and name its callback behind this one: '
                "`callbacks=[TrActCallback(), ...]`.",
                ", ".join(unknown),
            )

    def write(self, figures: Mapping[str, float], step: int) -> None:
        """Write the figures of one logging step."""
        figures = {f"train/{name}": value for name, value in figures.items()}
        if self._tensorboard is not None:
            for name, value in figures.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        for name in ("wandb", "trackio"):
            # The tracker's own callback has imported it; without a run there is nothing to write to.
            module = sys.modules.get(name)
            is_running = name != "wandb" or getattr(module, "run", None) is not None
            if name in self._names and module is not None and is_running:
                module.log({**figures, "train/global_step": step})

    def close(self) -> None:
        """Close what was opened here; the runs themselves are Trainer's."""
        if self._tensorboard is not None:
            self._tensorboard.close()


def _tracker_names(report_to: str | list[str] | None) -> list[str]:
    """Return the trackers that Trainer reports to; `TrainingArguments.set_logging` leaves a word."""
    if report_to is None or report_to == "none":
        return []
    if report_to == "all":
        names: list[str] = get_available_reporting_integrations()
        return names
    if isinstance(report_to, str):
        return [report_to]
    return report_to


def _open_tensorboard(args: TrainingArguments) -> Any:
    """Return a writer into the folder of the run that TensorBoard's callback has begun; None if there is none."""
    try:
        library = importlib.import_module("torch.utils.tensorboard")
    except ImportError:
        library = importlib.import_module("tensorboardX")  # as Trainer's callback does
    root = Path(os.environ.get("TENSORBOARD_LOGGING_DIR") or args.output_dir or ".").expanduser()
    events = root.rglob("events.out.tfevents.*")
    newest = max(events, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        logger.warning("TrAct: no run of TensorBoard is in %s, so it does not get TrAct's figures.", root)
        return None
    return library.SummaryWriter(str(newest.parent), filename_suffix=".tract")


def stats_to_log(handle: TrActHandle) -> dict[str, float]:
    """Return the figures of `TrActHandle.stats` as `tract/...`, with the layer's name between if there are several."""
    stats = handle.stats()
    named = {}
    for layer, figures in stats.items():
        prefix = "tract" if len(handle.layers) == 1 else f"tract/{layer}"
        for name, value in figures.items():
            named[f"{prefix}/{name}"] = value
    return named
