"""timm's models with the stems that CIFAR's small images need, as the paper's experiments have them."""

from typing import Any

import timm
from torch import nn

PREFIX, POOL = "cifar_", "pool_"


def cifar_model(name: str, classes: int, config: dict[str, Any]) -> nn.Module:
    """A timm model whose stem is a 3x3 convolution of stride 1.

    Args:
        name: cifar_NAME without the stem's max-pool, cifar_pool_NAME with it; NAME is a timm ResNet or DenseNet.
        classes: of the head.
        config: arguments of `timm.create_model`.
    """
    pool, name = name.startswith(PREFIX + POOL), name.removeprefix(PREFIX).removeprefix(POOL)
    model: Any = timm.create_model(name, num_classes=classes, **config)
    stem, conv, rest = (
        (model.features, "conv0", "pool0") if name.startswith("densenet") else (model, "conv1", "maxpool")
    )
    width = getattr(stem, conv).out_channels
    setattr(stem, conv, nn.Conv2d(3, width, 3, padding=1, bias=False))
    if not pool:
        setattr(stem, rest, nn.Identity())
    result: nn.Module = model
    return result
