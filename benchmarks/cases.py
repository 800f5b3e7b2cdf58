"""Lists what is measured: the paper's models and others of today, with their bounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Case:
    """Holds a model as it is trained, and how much more than without TrAct it may take."""

    make: Callable[[], nn.Module]
    # Name of the first layer.
    first: str
    # Side of the images.
    size: int
    classes: int
    # Images of a step, by device.
    batch: dict[str, int]
    # Images where the first layer is measured alone: the paper's.
    layer_batch: int
    # Time of a step over vanilla's, by device.
    step_bound: dict[str, float]
    # Time that the first layer takes above vanilla's, over torch_tract's.
    layer_bound: float

    def batch_of(self, scope: str, device: torch.device) -> int:
        """Return the usual number of images, for a step or for the first layer alone."""
        if scope == "layer":
            return self.layer_batch
        return self.batch[device.type]

    def memory_bound(self) -> int:
        """Return how many bytes TrAct may need beside vanilla's: 128 MiB and four matrices of the size of C."""
        with torch.device("meta"):
            weight = self.make().get_submodule(self.first).weight
        assert isinstance(weight, Tensor)
        return 128 * 2**20 + 4 * 4 * weight[0].numel() ** 2


def _resnet18_cifar() -> nn.Module:
    """Return the paper's: a 3x3 stem of stride 1, the max-pool kept."""
    model: nn.Module = timm.create_model("resnet18", num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    return model


def _vit_cifar() -> nn.Module:
    """Return the paper's: 7 layers, 12 heads, width 384, MLP 384, patches of 4."""
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
