"""Trains each of `{name: settings}`, alone or by torchrun: `trainer_job.py FOLDER JSON`."""

import json
import sys
import warnings
from pathlib import Path

import torch

from helpers.models import small_vit, trainer, weights
from helpers.ranks import leave
from hf_tract import TrActCallback


def main(folder: Path, jobs: dict[str, dict]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = {}
    for name, settings in jobs.items():
        lam, whiten_init = settings.pop("lam", 0.1), settings.pop("whiten_init", False)
        callbacks = [TrActCallback(lam=lam, whiten_init=whiten_init)] if lam else []
        run = trainer(folder / name, small_vit(), callbacks, num_train_epochs=5, **settings)
        run.train()
        results[name] = weights(run.model), run.state.global_step
    if run.args.should_save:
        torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    leave()
