"""Lists what is measured: the paper's models and others of today, with their bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import timm
import torch
from torch import Tensor, nn

from benchmarks.paper.cifar_models import cifar_model


@dataclass(frozen=True)
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
    # Time of a step over vanilla's, by device; without one there is no bound.
    step_bound: dict[str, float]
    # On the CPU, time that the first layer takes above vanilla's, over torch_tract's; None for no bound.
    layer_bound: float | None
    # From how many images on `layer_bound` holds.
    bounded_from: int

    def layer_batches(self, device: torch.device) -> list[int]:
        """Return the usual numbers of images for the first layer alone: those of a step, and the paper's."""
        return sorted({self.batch[device.type], self.layer_batch})

    def memory_bound(self) -> int:
        """Return how many bytes TrAct may need beside vanilla's: 128 MiB and four matrices of the size of C."""
        with torch.device("meta"):
            weight = self.make().get_submodule(self.first).weight
        assert isinstance(weight, Tensor)
        return 128 * 2**20 + 4 * 4 * weight[0].numel() ** 2


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


def _imagenet(name: str, first: str) -> Case:
    return Case(
        make=lambda: timm.create_model(name),
        first=first,
        size=224,
        classes=1000,
        batch={"cpu": 16, "cuda": 256},
        layer_batch=256,
        step_bound={"cpu": 1.01, "cuda": 1.01},
        layer_bound=0.45,
        bounded_from=256,
    )


def _cifar(make: Callable[[], nn.Module], first: str, layer_bound: float) -> Case:
    return Case(
        make=make,
        first=first,
        size=32,
        classes=10,
        batch={"cpu": 128, "cuda": 128},
        layer_batch=128,
        step_bound={"cpu": 1.02, "cuda": 1.02},
        layer_bound=layer_bound,
        bounded_from=128,
    )


_VIT_S = _imagenet("vit_small_patch16_224", "patch_embed.proj")
_VIT_B = _imagenet("vit_base_patch16_224", "patch_embed.proj")
_VIT_B_32 = _imagenet("vit_base_patch32_224", "patch_embed.proj")
_CONVNEXT = _imagenet("convnext_tiny", "stem.0")
_RESNET_50 = _imagenet("resnet50", "conv1")
_SWIN = _imagenet("swin_tiny_patch4_window7_224", "patch_embed.proj")

CASES = {
    "ViT-S/16": replace(_VIT_S, bounded_from=16),
    "ViT-B/16": replace(_VIT_B, bounded_from=16),
    # With n = 3072 the factor takes a tenth of a step on a CPU.
    "ViT-B/32": replace(_VIT_B_32, step_bound={"cuda": 1.01}, layer_bound=None),
    "ConvNeXt-T": replace(_CONVNEXT, layer_bound=0.3),
    "ResNet-50": replace(_RESNET_50, step_bound={"cpu": 1.015, "cuda": 1.01}, layer_bound=0.12),
    "Swin-T": replace(_SWIN, layer_bound=0.3),
    "ResNet-18 @32": _cifar(partial(cifar_model, "cifar_pool_resnet18", 10, {}), "conv1", 0.3),
    "ViT @32": _cifar(_vit_cifar, "patch_embed.proj", 0.6),
}
