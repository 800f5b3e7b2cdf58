"""Recognises gradients that are taken example by example, as for differentially private training.

Opacus clips the gradient of each example and adds noise to their sum, so that the sum tells little of any example. C
would tell of their pixels without noise, and a preconditioned gradient would not keep to the clipping.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils._expanded_weights.expanded_weights_impl import ExpandedWeight


def is_per_example(layer: nn.Module | None, weight: Any) -> bool:
    """Return whether the gradient of this weight of `layer` is taken example by example."""
    if isinstance(weight, ExpandedWeight):
        return True
    if hasattr(weight, "grad_sample"):
        return True
    if layer is None:
        return False
    # FSDP2 exchanges the weight that has Opacus' mark.
    for hook in layer._forward_hooks.values():
        source = str(getattr(hook, "__module__", ""))
        if source.startswith("opacus."):
            return True
    return False
