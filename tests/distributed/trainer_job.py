"""Trains each of `{name: settings}`; under torchrun: `trainer_job.py FOLDER JSON`."""

import json
import sys
from pathlib import Path

import torch

from helpers.models import small_vit, trainer, weights
from helpers.ranks import leave
from hf_tract import TrActCallback


def train(folder: Path, jobs: dict[str, dict]) -> dict[str, tuple[torch.Tensor, int]]:
    """Returns the weights after each training, and how many steps that took."""
    results = {}
    for name, settings in jobs.items():
        lam, whiten_init = settings.pop("lam", 0.1), settings.pop("whiten_init", False)
        callbacks = [TrActCallback(lam=lam, whiten_init=whiten_init)] if lam else []
        run = trainer(folder / name, small_vit(), callbacks, num_train_epochs=5, **settings)
        run.train()
        results[name] = weights(run.model), run.state.global_step
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    results = train(target, json.loads(sys.argv[2]))
    if torch.distributed.get_rank() == 0:
        torch.save(results, target / "results.pt")
    leave()
