"""Saves and restores where a run is, so that one that was killed goes on."""

import shutil
from pathlib import Path

from accelerate import Accelerator

FIGURES = ("top1", "top5", "loss", "seconds")


class History:
    """Holds the figures of each finished epoch; saved and restored with accelerate's state."""

    def __init__(self) -> None:
        self.figures: dict[str, list[float]] = {name: [] for name in FIGURES}
        # The time that went by before the first epoch and counts as training: that of a whitened start.
        self.seconds_before = 0.0

    @property
    def epochs(self) -> int:
        """Count the finished epochs."""
        return len(self.figures["seconds"])

    @property
    def seconds(self) -> float:
        """Return the time of training until the last one's end."""
        if not self.epochs:
            return self.seconds_before
        return self.figures["seconds"][-1]

    def add(self, **figures: float) -> None:
        """Append an epoch."""
        for name, value in figures.items():
            self.figures[name].append(value)

    def state_dict(self) -> dict[str, list[float]]:
        """Return the figures."""
        return self.figures

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Take the figures over."""
        self.figures = state


def save(accelerator: Accelerator, checkpoints: Path, epoch: int) -> None:
    """Save the state after that many epochs, and then delete the checkpoint before."""
    partial = checkpoints / "partial"
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        partial.rename(checkpoints / str(epoch))
        shutil.rmtree(checkpoints / str(epoch - 1), ignore_errors=True)
    accelerator.wait_for_everyone()


def restore(accelerator: Accelerator, checkpoints: Path) -> None:
    """Restore the last checkpoint that was saved whole, if there is one."""
    whole = [int(path.name) for path in checkpoints.glob("*") if path.name.isdigit()]
    if whole:
        accelerator.load_state(str(checkpoints / str(max(whole))))
    accelerator.wait_for_everyone()
