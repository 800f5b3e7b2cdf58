"""Works with: DeepSpeed ZeRO-1 to ZeRO-3, where gradients live outside of `.grad`, on two gloo processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.oracle import assert_close
from helpers.ranks import STEPS, Net, flat, images, loss_sum, one_process
from helpers.zero_scenarios import SCENARIOS, STAGES
from hf_tract import whiten_first_layer

JOB = str(Path(__file__).with_name("deepspeed_job.py"))
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(29900 + os.getpid() % 90)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, *TORCHRUN, JOB, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: f"ZeRO-{s[0]}, {s[1]}, {s[2]} micro-steps")
def test_equals_one_process_with_one_collective_for_each_backward(results, scenario):
    weights, collectives = results[scenario]
    assert_close(weights, one_process(12), 1e-5)
    assert collectives == STEPS * scenario[2]


@pytest.mark.parametrize("stage", STAGES)
def test_a_whitened_start_is_in_the_weights_and_in_what_zero_keeps_of_them(results, stage):
    model, x = Net().float(), images(0, 12).float()
    whiten_first_layer(model, x)
    start = flat(model)
    (loss_sum(model, x) / 12).backward()
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    assert_close(results[stage][0], start, 1e-6)
    assert_close(results[stage][1], flat(model), 1e-5)
    assert (flat(Net()) - start).norm() > 0.1 * start.norm()
