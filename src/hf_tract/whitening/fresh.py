"""Whether a layer's weights are fresh, as a whitened start asks."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


def checkpoint_of(model: nn.Module, parameters: Iterable[Tensor]) -> str:
    """The checkpoint from which transformers loaded any of these parameters of `model`, or "".

    A name in the config alone says nothing: `from_config` with the config of a checkpoint draws random weights.
    """
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    return name if any(getattr(parameter, "_is_hf_initialized", False) for parameter in parameters) else ""
