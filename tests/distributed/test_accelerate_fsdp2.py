"""Works with: FSDP2 as accelerate itself prepares it, for the vision models and wrap policies that it can prepare.

accelerate selects FSDP on GPUs only, so its own preparing function is called here, on two gloo processes.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    SiglipConfig,
    SiglipForImageClassification,
    SiglipTextConfig,
    SiglipVisionConfig,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

from helpers.models import Images, small_vit
from helpers.oracle import assert_close, expected
from helpers.ranks import on_two_ranks
from hf_tract import apply_tract, find_first_layers

SMALL = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def siglip() -> nn.Module:
    vision = SiglipVisionConfig(**SMALL, image_size=16, patch_size=4)
    return SiglipForImageClassification(
        SiglipConfig(text_config=SiglipTextConfig(**SMALL), vision_config=vision, num_labels=4)
    )


def timm_resnet() -> nn.Module:
    config = TimmWrapperConfig.from_dict({"architecture": "resnet10t", "num_classes": 4})
    return TimmWrapperForImageClassification(config).eval()


MODELS = {"vit": small_vit, "siglip": siglip, "timm": timm_resnet}


def job(rank: int, name: str) -> dict[str, torch.Tensor]:
    """Gradient of the stem: ordinary, on all images in one process; and TrAct's, on half of them and sharded."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    when, family = name.split(", ")
    torch.manual_seed(0)
    model, batch = MODELS[family](), Images(12).batch()
    plain, stem = copy.deepcopy(model), find_first_layers(model)[0].name
    plain(**batch).loss.backward()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=False
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        device=torch.device("cpu"),
        mixed_precision="no",
        is_main_process=rank == 0,
        parallelism_config=None,
    )
    if when == "before":
        apply_tract(model, lam=0.1)
    model = fsdp2_prepare_model(accelerator, model)
    if when == "after":
        apply_tract(model, lam=0.1, layers=stem)
    model(**{key: value.chunk(2)[rank] for key, value in batch.items()}).loss.backward()
    ordinary = plain.get_submodule(stem)
    wanted = expected(ordinary.weight.grad, batch["pixel_values"], ordinary, 0.1)
    return {"wanted": wanted, "got": model.get_submodule(stem).weight.grad.full_tensor()}


NAMES = [f"{when}, {family}" for when in ("before", "after") for family in MODELS]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return on_two_ranks(tmp_path_factory.mktemp("accelerate"), job, NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_sharded_gradient_is_the_preconditioned_one(results, name):
    for rank in results:
        assert_close(rank[name]["got"], rank[name]["wanted"], 1e-4)
