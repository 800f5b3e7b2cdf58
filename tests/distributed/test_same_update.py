"""The same weights however 64 images are split: over micro-steps, over two processes, over shards."""

import contextlib

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from helpers.oracle import assert_close
from helpers.ranks import flat, fsdp2_no_sync, on_two_ranks
from hf_tract import apply_tract

STEPS, IMAGES = 8, 64


def vit() -> nn.Module:
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(**shape, image_size=16, patch_size=4, num_labels=4))


def resnet() -> nn.Module:
    """Its 7x7 stride 2 stem; frozen statistics, without which the model itself depends on how the batch is split."""
    shape = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**shape, num_labels=4)).eval()


def convnext() -> nn.Module:
    return ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=4)
    )


MODELS = {"vit": vit, "resnet": resnet, "convnext": convnext}
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=2e-2, momentum=0.9, weight_decay=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, eps=1e-4, weight_decay=1e-2),
}
ALONE = {"64": 1, "4 x 16": 4}
TOGETHER = {"DDP 2 x 32": ("ddp", 1), "DDP 2 x 2 x 16": ("ddp", 2), "FSDP2 2 x 2 x 16": ("fsdp2", 2)}


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    pixels = torch.randn(IMAGES, 3, 16, 16, generator=generator) * 2 * torch.rand(IMAGES, 1, 1, 1, generator=generator)
    return pixels, torch.randint(0, 4, (IMAGES,), generator=generator)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, micros: int, rank=0, ranks=1, no_sync=contextlib.nullcontext
):
    for step in range(STEPS):
        pixels, labels = (part.chunk(ranks)[rank].chunk(micros) for part in batch(step))
        for micro in range(micros):
            with no_sync() if micro < micros - 1 else contextlib.nullcontext():
                (model(pixel_values=pixels[micro], labels=labels[micro]).loss / micros).backward()
        optimizer.step()
        optimizer.zero_grad()
    return flat(model)


def alone(family: str, optimizer: str, micros: int) -> torch.Tensor:
    torch.manual_seed(0)
    model = MODELS[family]()
    apply_tract(model, lam=0.1)
    return train(model, OPTIMIZERS[optimizer](model.parameters()), micros)


def job(rank: int, name: str) -> torch.Tensor:
    family, optimizer, how = name.split("/")
    kind, micros = TOGETHER[how]
    torch.manual_seed(0)
    model = MODELS[family]()
    handle = apply_tract(model, lam=0.1)
    if kind == "ddp":
        wrapped = DistributedDataParallel(model)
        return train(wrapped, OPTIMIZERS[optimizer](wrapped.parameters()), micros, rank, 2, wrapped.no_sync)
    sharded = fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return train(
        sharded, OPTIMIZERS[optimizer](sharded.parameters()), micros, rank, 2, lambda: fsdp2_no_sync(sharded, handle)
    )


NAMES = [f"{family}/{optimizer}" for family in MODELS for optimizer in OPTIMIZERS]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    names = [f"{name}/{how}" for name in NAMES for how in TOGETHER]
    return on_two_ranks(tmp_path_factory.mktemp("same"), job, names)


@pytest.fixture(scope="module")
def reference():
    return {name: alone(*name.split("/"), micros=1) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_micro_steps_end_where_one_batch_does(reference, name):
    assert_close(alone(*name.split("/"), micros=4), reference[name], 1e-5)


@pytest.mark.parametrize("how", TOGETHER)
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_end_where_one_does(reference, together, name, how):
    first, second = (rank[f"{name}/{how}"] for rank in together)
    assert torch.equal(first, second)
    assert_close(first, reference[name], 1e-5)


@pytest.mark.parametrize("family", MODELS)
def test_the_training_moves_the_weights(reference, family):
    """What agrees above has moved: by far more than the tolerance."""
    torch.manual_seed(0)
    start = flat(MODELS[family]())
    for optimizer in OPTIMIZERS:
        assert (reference[f"{family}/{optimizer}"] - start).norm() > 1e-2 * start.norm()
