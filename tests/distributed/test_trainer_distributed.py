"""Works with: Trainer under torchrun. Two processes equal one, with accumulation, clipping, bf16, torch_compile."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import trainer_job

from helpers.models import small_vit, weights
from helpers.oracle import assert_close
from helpers.ranks import on_two_ranks

JOB = str(Path(trainer_job.__file__))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
WHOLE = {"per_device_train_batch_size": 32, **SGD}
SPLIT = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, **SGD}
MODES = {
    "no clipping": ({}, 1e-5),
    "clipping": ({"max_grad_norm": 0.5}, 1e-5),
    "bf16": ({"bf16": True}, 2e-4),
    "torch_compile": ({"torch_compile": True, "torch_compile_backend": "aot_eager"}, 1e-5),
    "vanilla": ({"lam": 0}, 1e-5),
    "whitened": ({"whiten_init": True}, 1e-5),  # of four batches of each rank, which here are all images
}
Results = dict[str, tuple[torch.Tensor, int]]


def on_one(folder: Path, modes: dict) -> Results:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trainer_job.train(folder, {mode: {**WHOLE, **settings} for mode, (settings, _) in modes.items()})


def job(rank: int, arguments: str) -> tuple[torch.Tensor, int]:
    warnings.simplefilter("ignore")
    folder, mode, settings = json.loads(arguments)
    return trainer_job.train(Path(folder), {mode: settings})[mode]


def by_torchrun(folder: Path, modes: dict) -> Results:
    jobs = json.dumps({mode: {**SPLIT, **settings} for mode, (settings, _) in modes.items()})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*TORCHRUN, JOB, str(folder), jobs]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "results.pt")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return on_one(tmp_path_factory.mktemp("one"), MODES)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    names = {mode: json.dumps([str(folder), mode, {**SPLIT, **settings}]) for mode, (settings, _) in MODES.items()}
    first, _ = on_two_ranks(folder, job, list(names.values()))
    return {mode: first[name] for mode, name in names.items()}


def assert_alike(one: tuple[torch.Tensor, int], two: tuple[torch.Tensor, int], tolerance: float) -> None:
    (wanted, steps), (got, got_steps) = one, two
    assert steps == got_steps == 10
    assert_close(got, wanted, tolerance)
    start = weights(small_vit())
    assert (wanted - start).norm() > 10 * tolerance * start.norm()


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_with_accumulation_end_where_one_large_batch_does(one, two, mode):
    assert_alike(one[mode], two[mode], MODES[mode][1])


@pytest.mark.slow
def test_torchrun_does_so_too_with_inductor_s_code_as_well(tmp_path):
    modes = MODES | {"inductor": ({"torch_compile": True}, 1e-5)}
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    one, two = on_one(tmp_path / "one", modes), by_torchrun(tmp_path / "two", modes)
    for mode, (_, tolerance) in modes.items():
        assert_alike(one[mode], two[mode], tolerance)


def test_without_tract_they_end_elsewhere(one):
    (tract, _), (vanilla, _) = one["no clipping"], one["vanilla"]
    assert (tract - vanilla).norm() > 1e-4 * vanilla.norm()
