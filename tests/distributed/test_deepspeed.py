"""Works with: DeepSpeed ZeRO-1 to ZeRO-3, where gradients live outside of `.grad`, on two gloo processes."""

import warnings
from typing import Any

import pytest
import torch

from helpers.oracle import assert_close
from helpers.ranks import STEPS, Net, flat, images, linear_net, loss_sum, on_two_ranks, one_process
from hf_tract import apply_tract, whiten_first_layer

STAGES = {f"ZeRO-{stage}": stage for stage in (1, 2, 3)}
LINEAR = {f"{name}, linear": stage for name, stage in STAGES.items() if stage > 1}
SCENARIOS = {
    f"{name}, {when}, {micros} micro-steps": (stage, when, micros)
    for name, stage in STAGES.items()
    for when in ("before", "after")
    for micros in (1, 2)
}


def job(rank: int, name: str) -> Any:
    import deepspeed_job

    warnings.simplefilter("ignore")
    if name in LINEAR:
        return deepspeed_job.train_linear(rank, LINEAR[name])
    if name in STAGES:
        return deepspeed_job.whitened(rank, STAGES[name])
    return deepspeed_job.train(rank, *SCENARIOS[name])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return on_two_ranks(tmp_path_factory.mktemp("deepspeed"), job, [*SCENARIOS, *STAGES, *LINEAR])[0]


@pytest.mark.parametrize("name", SCENARIOS)
def test_equals_one_process_with_one_collective_for_each_backward(results, name):
    (weights, collectives), (_, _, micros) = results[name], SCENARIOS[name]
    assert_close(weights, one_process(12), 1e-5)
    assert collectives == STEPS * micros


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_first_layer_equals_one_process(results, name):
    model = linear_net()
    apply_tract(model, lam=0.1)
    (loss_sum(model, images(0, 12).float()) / 12).backward()
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    assert_close(results[name], flat(model), 1e-5)


@pytest.mark.parametrize("name", STAGES)
def test_a_whitened_start_is_in_the_weights_and_in_what_zero_keeps_of_them(results, name):
    model, x = Net().float(), images(0, 12).float()
    whiten_first_layer(model, x)
    start = flat(model)
    (loss_sum(model, x) / 12).backward()
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    assert_close(results[name][0], start, 1e-6)
    assert_close(results[name][1], flat(model), 1e-5)
    assert (flat(Net()) - start).norm() > 0.1 * start.norm()
