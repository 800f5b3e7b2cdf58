"""Works with: Trainer under torchrun, two processes against one, with accumulation, clipping, bf16 and torch_compile."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import small_vit, weights
from oracle import assert_close

JOB = str(Path(__file__).with_name("trainer_job.py"))
SGD = {"optim": "sgd", "lr_scheduler_type": "constant"}
MODES = {
    "clipping": ({"max_grad_norm": 0.5}, 1e-5),
    "no clipping": ({"max_grad_norm": 0.0}, 1e-5),
    "bf16": ({"bf16": True}, 1e-3),
    "torch_compile": ({"torch_compile": True}, 1e-5),
}


def train(folder: Path, name: str, processes: int, settings: dict) -> tuple[torch.Tensor, int]:
    port = str(29600 + os.getpid() % 300)
    launcher = (
        ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", port] if processes > 1 else []
    )
    command = [sys.executable, *launcher, JOB, str(folder), name, json.dumps({**SGD, **settings})]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = torch.load(folder / f"{name}.pt")
    return result["weights"], result["steps"]


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_with_accumulation_end_where_one_large_batch_does(tmp_path, mode):
    settings, tolerance = MODES[mode]
    one, steps = train(tmp_path, "one", 1, {"per_device_train_batch_size": 32, **settings})
    two = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, **settings}
    both, both_steps = train(tmp_path, "two", 2, two)
    assert steps == both_steps == 10
    assert_close(both, one, tolerance)
    start = weights(small_vit())
    assert (one - start).norm() > 10 * tolerance * start.norm()


def test_without_tract_they_end_elsewhere(tmp_path):
    settings = {"per_device_train_batch_size": 32, "max_grad_norm": 0.0}
    tract, _ = train(tmp_path, "tract", 1, settings)
    vanilla, _ = train(tmp_path, "vanilla", 1, {**settings, "lam": 0})
    assert (tract - vanilla).norm() > 1e-4 * vanilla.norm()
