"""Works with: Trainer under torchrun. Two processes equal one, with accumulation, clipping, bf16, torch_compile."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.models import small_vit, weights
from helpers.oracle import assert_close

JOB = str(Path(__file__).with_name("trainer_job.py"))
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(29600 + os.getpid() % 300)]
SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
WHOLE = {"per_device_train_batch_size": 32, **SGD}
SPLIT = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, **SGD}
MODES = {
    "no clipping": ({}, 1e-5),
    "clipping": ({"max_grad_norm": 0.5}, 1e-5),
    "bf16": ({"bf16": True}, 2e-4),
    "torch_compile": ({"torch_compile": True}, 1e-5),
    "vanilla": ({"lam": 0}, 1e-5),
    "whitened": ({"whiten_init": True}, 1e-5),  # of four batches of each rank, which here are all images
}


def train(folder: Path, launcher: list[str], base: dict) -> dict[str, tuple[torch.Tensor, int]]:
    jobs = json.dumps({mode: {**base, **settings} for mode, (settings, _) in MODES.items()})
    command, environment = [sys.executable, *launcher, JOB, str(folder), jobs], {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "results.pt")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return train(tmp_path_factory.mktemp("one"), [], WHOLE)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return train(tmp_path_factory.mktemp("two"), TORCHRUN, SPLIT)


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_with_accumulation_end_where_one_large_batch_does(one, two, mode):
    tolerance = MODES[mode][1]
    (wanted, steps), (got, got_steps) = one[mode], two[mode]
    assert steps == got_steps == 10
    assert_close(got, wanted, tolerance)
    start = weights(small_vit())
    assert (wanted - start).norm() > 10 * tolerance * start.norm()


def test_without_tract_they_end_elsewhere(one):
    (tract, _), (vanilla, _) = one["no clipping"], one["vanilla"]
    assert (tract - vanilla).norm() > 1e-4 * vanilla.norm()
