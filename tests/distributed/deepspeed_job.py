"""Trains by DeepSpeed in the ranks of test_deepspeed.py, which alone import it."""

import contextlib
import os

import torch
import torch.distributed as dist

os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}

import deepspeed
import deepspeed.comm.torch

from helpers.ranks import COLUMNS, STEPS, Net, images, linear_net, loss_sum
from hf_tract import apply_tract, whiten_first_layer

deepspeed.comm.torch.build_shm_op = lambda: None  # else it compiles an operator that only inference uses


def engine_of(model: torch.nn.Module, stage: int, micros: int = 1) -> deepspeed.DeepSpeedEngine:
    config = {
        "train_micro_batch_size_per_gpu": 6 // micros,
        "gradient_accumulation_steps": micros,
        "gradient_clipping": 0.0,  # the default is 1.0
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def weights_of(model: torch.nn.Module, stage: int) -> torch.Tensor:
    weights = []
    for parameter in model.parameters():
        with deepspeed.zero.GatheredParameters([parameter]) if stage == 3 else contextlib.nullcontext():
            weights.append(parameter.detach().clone().flatten())
    return torch.cat(weights)


def whitened(rank: int, stage: int) -> list[torch.Tensor]:
    """All weights after a whitened start and after the step that follows, in which ZeRO's own copies come to light."""
    model = Net().float()
    engine = engine_of(model, stage)
    mine = images(0, 12).float().chunk(2)[rank]
    whiten_first_layer(model, mine)
    start = weights_of(model, stage)
    engine.backward(loss_sum(engine, mine) / 6)
    engine.step()
    return [start, weights_of(model, stage)]


def train_linear(rank: int, stage: int) -> torch.Tensor:
    """Under ZeRO-3 DeepSpeed replaces `F.linear`."""
    model = linear_net()
    apply_tract(model, lam=0.1)
    engine = engine_of(model, stage)
    mine = images(0, 12).float().chunk(2)[rank]
    engine.backward(loss_sum(engine, mine) / 6)
    engine.step()
    return weights_of(model, stage)


def train(rank: int, stage: int, when: str, micros: int) -> tuple[torch.Tensor, int]:
    model, calls = Net().float(), []
    if when == "before":
        handle = apply_tract(model, lam=0.1)
    engine = engine_of(model, stage, micros)
    if when == "after":
        handle = apply_tract(engine, lam=0.1)
    original = dist.all_reduce

    def watched(*args, **kwargs):
        if (args[0] if args else kwargs["tensor"]).numel() == COLUMNS**2 + 1:
            calls.append(1)
        return original(*args, **kwargs)

    dist.all_reduce = watched
    for step in range(STEPS):
        parts = images(step, 12).float().chunk(2)[rank].chunk(micros)
        for index, x in enumerate(parts):
            with contextlib.nullcontext() if index == micros - 1 else handle.no_sync():
                engine.backward(loss_sum(engine, x) * 2 * micros / 12)  # it averages over ranks and micro-steps
            engine.step()
    dist.all_reduce = original
    return weights_of(model, stage), len(calls)
