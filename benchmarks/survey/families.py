"""Lists models of other libraries for the survey, where these are installed; hf-tract needs none of them."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import nn


class Family(NamedTuple):
    """Holds a class or function of a library, and what it is called with."""

    path: str
    options: dict[str, Any]


_VIT = {"image_size": 32, "num_classes": 10, "dim": 32, "depth": 1, "heads": 2, "mlp_dim": 64}
_HEADS = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
_UNET = {"block_out_channels": (32, 64), "layers_per_block": 1}
_BLOCKS = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
_JOINT = {"num_layers": 1, "num_attention_heads": 2, "joint_attention_dim": 64}
_RANDOM = {"weights": None}
_VOLUME = {"in_channels": 1, "out_channels": 2}
_PATCHES = {"img_size": (32, 32, 32), "hidden_size": 48, "num_heads": 4, "mlp_dim": 64}
_SWIN = {"feature_size": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
FAMILIES: dict[str, dict[str, Family]] = {
    "torchvision": {
        **{
            name: Family(f"torchvision.models.{name}", _RANDOM)
            for name in ("resnet18", "vgg11", "densenet121", "convnext_tiny", "swin_t", "maxvit_t", "vit_b_32")
        },
        **{name: Family(f"torchvision.models.video.{name}", _RANDOM) for name in ("r3d_18", "swin3d_t")},
    },
    "diffusers": {
        "UNet2DModel": Family("diffusers.UNet2DModel", {**_UNET, **_BLOCKS, "sample_size": 32, "norm_num_groups": 8}),
        "AutoencoderKL": Family("diffusers.AutoencoderKL", {"sample_size": 32}),
        "VQModel": Family("diffusers.VQModel", {"sample_size": 32}),
        "DiTTransformer2DModel": Family("diffusers.DiTTransformer2DModel", _HEADS),
        "SD3Transformer2DModel": Family(
            "diffusers.SD3Transformer2DModel", {**_JOINT, "pooled_projection_dim": 64, "caption_projection_dim": 128}
        ),
        "FluxTransformer2DModel": Family(
            "diffusers.FluxTransformer2DModel", {**_JOINT, "num_single_layers": 1, "pooled_projection_dim": 64}
        ),
        "ChromaTransformer2DModel": Family("diffusers.ChromaTransformer2DModel", {**_JOINT, "num_single_layers": 1}),
        "QwenImageTransformer2DModel": Family("diffusers.QwenImageTransformer2DModel", _JOINT),
    },
    "monai": {
        "UNet": Family(
            "monai.networks.nets.UNet", {"spatial_dims": 3, **_VOLUME, "channels": (8, 16), "strides": (2,)}
        ),
        "UNETR": Family("monai.networks.nets.UNETR", {**_VOLUME, **_PATCHES}),
        "SwinUNETR": Family("monai.networks.nets.SwinUNETR", {**_VOLUME, **_SWIN}),
        "SegResNet": Family("monai.networks.nets.SegResNet", {}),
        "DenseNet121": Family("monai.networks.nets.DenseNet121", {"spatial_dims": 2, **_VOLUME}),
        "ViT": Family(
            "monai.networks.nets.ViT", {"in_channels": 1, "patch_size": (16, 16, 16), **_PATCHES, "num_layers": 1}
        ),
    },
    "segmentation_models_pytorch": {
        name: Family(f"segmentation_models_pytorch.{name}", {"encoder_name": "resnet18", "encoder_weights": None})
        for name in ("Unet", "FPN", "DeepLabV3Plus", "Segformer", "UPerNet", "Linknet")
    },
    "vit_pytorch": {
        "ViT": Family("vit_pytorch.ViT", {**_VIT, "patch_size": 4}),
        "SimpleViT": Family("vit_pytorch.SimpleViT", {**_VIT, "patch_size": 4}),
        "CCT": Family("vit_pytorch.cct.CCT", {"img_size": 32}),
        "T2TViT": Family("vit_pytorch.t2t.T2TViT", _VIT),
    },
}


def batch(name: str) -> dict[str, Any] | None:
    """Return what the forward of a diffusion transformer takes, of which nobody could guess all."""
    if name not in FAMILIES["diffusers"] or not name.endswith("Transformer2DModel"):
        return None
    common: dict[str, Any] = {"timestep": torch.ones(1)}
    text = {"encoder_hidden_states": torch.rand(1, 8, 64)}
    rows = {"hidden_states": torch.rand(1, 16, 64)}
    ids = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(8, 3)}
    pooled = {"pooled_projections": torch.rand(1, 64)}
    batches: dict[str, dict[str, Any]] = {
        "DiTTransformer2DModel": {
            "hidden_states": torch.rand(1, 4, 32, 32),
            "class_labels": torch.ones(1, dtype=torch.long),
        },
        "SD3Transformer2DModel": {"hidden_states": torch.rand(1, 16, 32, 32), **text, **pooled},
        "FluxTransformer2DModel": {**rows, **text, **pooled, **ids},
        "ChromaTransformer2DModel": {**rows, **text, **ids, "attention_mask": torch.ones(1, 24, dtype=torch.bool)},
        "QwenImageTransformer2DModel": {
            **rows,
            **text,
            "encoder_hidden_states_mask": torch.ones(1, 8),
            "img_shapes": [[(1, 4, 4)]],
        },
    }
    return batches[name] | common


def installed() -> list[str]:
    """Return the libraries that are there."""
    return [library for library in FAMILIES if find_spec(library)]


def make(library: str, name: str) -> nn.Module:
    """Return a model with random weights."""
    path, options = FAMILIES[library][name]
    module, _, attribute = path.rpartition(".")
    model: nn.Module = getattr(importlib.import_module(module), attribute)(**options)
    return model
