"""How long Trainer's steps take."""

import statistics
import time
from typing import Any

from transformers import TrainerCallback


class StepClock(TrainerCallback):
    """Seconds of each optimizer step: forward, backward and update, without the data's loading."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Starts the clock."""
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stops it."""
        self.seconds.append(time.perf_counter() - self.start)

    def median(self) -> float:
        """Of the steps so far, in seconds."""
        return statistics.median(self.seconds)
