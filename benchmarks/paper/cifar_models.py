"""Makes timm's models with the stems that CIFAR's small images need, as the paper's experiments have them."""

from typing import Any

import timm
from torch import nn

PREFIX = "cifar_"
POOL = "pool_"


def cifar_model(name: str, classes: int, config: dict[str, Any]) -> nn.Module:
    """Return a timm model whose stem is a 3x3 convolution of stride 1.

    Args:
        name: cifar_NAME without the stem's max-pool, cifar_pool_NAME with it; NAME is a timm ResNet or DenseNet.
        classes: of the head.
        config: arguments of `timm.create_model`.
    """
    keeps_pool = name.startswith(PREFIX + POOL)
    name = name.removeprefix(PREFIX).removeprefix(POOL)
    model: nn.Module = timm.create_model(name, num_classes=classes, **config)
    stem: Any = model
    conv, pool = "conv1", "maxpool"
    if name.startswith("densenet"):
        stem = model.features
        conv, pool = "conv0", "pool0"
    width = getattr(stem, conv).out_channels
    setattr(stem, conv, nn.Conv2d(3, width, 3, padding=1, bias=False))
    if not keeps_pool:
        setattr(stem, pool, nn.Identity())
    return model
