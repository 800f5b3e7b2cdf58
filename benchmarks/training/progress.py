"""Where a run is, and how it goes on from a checkpoint."""

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator


class Progress:
    """Where training is; saved and restored with accelerate's state."""

    epoch = batch = step = 0
    seconds = 0.0
    loss: Any = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Returns the epoch, the batch within it and the optimizer step that come next, from 0; seconds; loss."""
        names = ("epoch", "batch", "step", "seconds")
        return {**{name: getattr(self, name) for name in names}, "loss": float(self.loss)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes these over."""
        self.epoch, self.batch, self.step, self.seconds = (state[key] for key in ("epoch", "batch", "step", "seconds"))
        self.loss = state.get("loss", 0.0)  # which checkpoints of earlier versions do not have


def start(accelerator: Accelerator, resume_from: str | None, kept: int, history: Path, progress: Progress) -> None:
    """Restores the checkpoint that is asked for, or sees to it that nothing of another run is in the way.

    Args:
        accelerator: whose state is restored.
        resume_from: a checkpoint's folder, "latest", or None.
        kept: how many objects are registered with the accelerator.
        history: the file of finished epochs, beside the folder of checkpoints.
        progress: one of the registered objects.
    """
    folder = history.parent / "checkpoints"
    found = sorted(folder.glob("checkpoint_*"), key=lambda path: int(path.name.split("_")[1]))
    whole = [path for path in found if (path / f"custom_checkpoint_{kept - 1}.pkl").exists()]  # what is written last
    if found and not resume_from:
        raise SystemExit(
            f"{folder} has checkpoints: add --resume_from_checkpoint latest, or name another --output_dir."
        )
    chosen = None
    if resume_from == "latest":
        chosen = whole[-1] if whole else None
    elif resume_from:
        chosen = Path(resume_from)
    lines = history.read_text().splitlines() if history.exists() else []
    if chosen:
        accelerator.load_state(str(chosen))
        accelerator.project_configuration.iteration = int(chosen.name.split("_")[1]) + 1
        accelerator.print(f"Resumed from {chosen}: epoch {progress.epoch + 1}, step {progress.step}.")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:  # what a killed run wrote after that checkpoint
        for path in found:
            if int(path.name.split("_")[1]) >= accelerator.project_configuration.iteration:
                shutil.rmtree(path)
        history.parent.mkdir(parents=True, exist_ok=True)
        history.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["epoch"] <= progress.epoch))
    accelerator.wait_for_everyone()


def add_epoch(history: Path, figures: dict[str, Any], accelerator: Accelerator) -> None:
    """Writes what an epoch came to, once."""
    if accelerator.is_main_process:
        with history.open("a") as file:
            file.write(json.dumps(figures) + "\n")
    accelerator.wait_for_everyone()


def read_epochs(history: Path) -> list[dict[str, Any]]:
    """What `add_epoch` wrote."""
    return [json.loads(line) for line in history.read_text().splitlines()]
