"""Run by tests/test_trainer_distributed.py, alone or by torchrun: `trainer_job.py FOLDER NAME SETTINGS` trains by Trainer."""

import json
import sys
import warnings
from pathlib import Path

import torch

from helpers import small_vit, trainer, weights
from hf_tract import TrActCallback


def main(folder: Path, name: str, settings: dict) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    lam = settings.pop("lam", 0.1)
    run = trainer(folder / name, small_vit(), [TrActCallback(lam=lam)] if lam else [], num_train_epochs=5, **settings)
    run.train()
    if run.args.should_save:
        torch.save({"weights": weights(run.model), "steps": run.state.global_step}, folder / f"{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
