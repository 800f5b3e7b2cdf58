"""What is measured: the paper's models and others of today, with their bounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import timm
from torch import nn


@dataclasses.dataclass(frozen=True)
class Case:
    """A model as it is trained, and how much more than without TrAct it may take."""

    make: Callable[[], nn.Module]
    first: str  # name of the first layer
    size: int  # of the images
    classes: int
    batch: dict[str, int]  # of a step, by device
    layer_batch: int  # of the first layer alone: the paper's
    step_bound: dict[str, float]  # time of a step over vanilla's, by device
    layer_bound: float  # time that the first layer takes above vanilla's, over torch_tract's


def _resnet18_cifar() -> nn.Module:
    """The paper's: a 3x3 stem of stride 1, the max-pool kept."""
    model: nn.Module = timm.create_model("resnet18", num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    return model


def _vit_cifar() -> nn.Module:
    """The paper's: 7 layers, 12 heads, width 384, MLP 384, patches of 4."""
    settings = {
        "img_size": 32,
        "patch_size": 4,
        "num_classes": 10,
        "embed_dim": 384,
        "depth": 7,
        "num_heads": 12,
        "mlp_ratio": 1,
    }
    model: nn.Module = timm.models.VisionTransformer(**settings)
    return model


def _imagenet(name: str, first: str, step_bound: float = 1.01, layer_bound: float = 0.5) -> Case:
    bounds = {"cpu": step_bound, "cuda": 1.01}
    return Case(lambda: timm.create_model(name), first, 224, 1000, {"cpu": 16, "cuda": 256}, 256, bounds, layer_bound)


def _cifar(make: Callable[[], nn.Module], first: str) -> Case:
    return Case(make, first, 32, 10, {"cpu": 128, "cuda": 128}, 128, {"cpu": 1.02, "cuda": 1.02}, 0.5)


CASES = {
    "ViT-S/16": _imagenet("vit_small_patch16_224", "patch_embed.proj"),
    "ViT-B/16": _imagenet("vit_base_patch16_224", "patch_embed.proj"),
    "ConvNeXt-T": _imagenet("convnext_tiny", "stem.0"),
    "ResNet-50": _imagenet("resnet50", "conv1", 1.015, 0.25),
    "Swin-T": _imagenet("swin_tiny_patch4_window7_224", "patch_embed.proj"),
    "ResNet-18 @32": _cifar(_resnet18_cifar, "conv1"),
    "ViT @32": _cifar(_vit_cifar, "patch_embed.proj"),
}
