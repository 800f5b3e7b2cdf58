"""Makes a model by its name, without its weights, and reads how its pixels are normalised."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from hf_tract.cli.scale import UNCHANGED, Normalization
from hf_tract.config import TrActError


class LoadedModel(NamedTuple):
    """Holds a model on the meta device, with the normalisation of its pixels (None if it is unknown)."""

    model: nn.Module
    normalization: Normalization | None
    source: str


def load(name: str, trust_remote_code: bool = False) -> LoadedModel:
    """Make the model called `name` on the meta device.

    Args:
        name: a folder with a config.json, a timm model, a transformers model_type (its default config), or a Hub id.
        trust_remote_code: run a model's own code from the Hub.

    Raises:
        TrActError: for a name that is none of these.
    """
    if Path(name).exists():
        return _from_checkpoint(name, "folder", trust_remote_code)
    import timm
    from transformers import CONFIG_MAPPING

    timm_name = name.removeprefix("timm/")
    if timm.is_model(timm_name) or name.startswith(("hf-hub:", "hf_hub:")):
        return _from_timm(timm_name)
    if name in CONFIG_MAPPING:
        model = _make(CONFIG_MAPPING[name]())
        return LoadedModel(model, None, f"transformers' default {name}")
    return _from_checkpoint(name, "Hub", trust_remote_code)


def _from_timm(name: str) -> LoadedModel:
    import timm

    try:
        with torch.device("meta"):
            model = timm.create_model(name)
    except Exception as error:  # what the Hub and timm raise has no common class
        raise TrActError(f"`model` (={name!r}) cannot be made by timm: {one_line(error)}") from error
    config = model.pretrained_cfg
    return LoadedModel(model, _normalization(config.get("mean"), config.get("std")), "timm")


def _from_checkpoint(name: str, source: str, trust_remote_code: bool) -> LoadedModel:
    """Make a model of transformers from a folder or the Hub."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise TrActError(f"`model` (={name!r}) {_why_unknown(name)}: {one_line(error)}") from error
    normalization = _read_processor(name)
    by_timm = getattr(config, "pretrained_cfg", None)
    if normalization is None and isinstance(by_timm, dict):
        normalization = _normalization(by_timm.get("mean"), by_timm.get("std"))
    return LoadedModel(_make(config, trust_remote_code), normalization, source)


def _why_unknown(name: str) -> str:
    if Path(name).exists():
        return "is a folder without a config that transformers knows"
    import timm

    near = difflib.get_close_matches(name, timm.list_models(), n=3)
    return (
        "is no folder, no timm model (the nearest: "
        f"{', '.join(near) or 'none'}), no model_type of transformers, and no "
        "model that the Hub gives"
    )


def _make(config: Any, trust_remote_code: bool = False) -> nn.Module:
    """Make a model of the class that the config names, or the bare model of its type."""
    import transformers

    model: nn.Module
    with torch.device("meta"):
        for name in config.architectures or ():
            if hasattr(transformers, name):
                model = getattr(transformers, name)(config)
                return model
        auto = "AutoModel"
        own_classes = getattr(config, "auto_map", None) or {}
        if trust_remote_code and auto not in own_classes:
            known = [name for name in own_classes if name.startswith(auto) and hasattr(transformers, name)]
            auto = next(iter(known), auto)
        try:
            model = getattr(transformers, auto).from_config(config, trust_remote_code=trust_remote_code)
        except (ValueError, ImportError) as error:
            raise TrActError(f"`model` (={config.model_type}) cannot be made: {one_line(error)}") from error
    return model


def _read_processor(name: str) -> Normalization | None:
    """Return the normalisation in the config of a checkpoint's image processor."""
    from transformers.image_processing_base import ImageProcessingMixin

    # The processor itself is not made, since that needs image libraries.
    try:
        config, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except (OSError, ValueError):
        return None
    normalization: Normalization | None = UNCHANGED
    if config.get("do_normalize") is not False:
        normalization = _normalization(config.get("image_mean"), config.get("image_std"))
    if normalization is None:
        return None
    # What the processor multiplies values from 0 to 1 by before it normalises them, and subtracts.
    factor = 255.0
    if config.get("do_rescale", True):
        factor *= config.get("rescale_factor", 1 / 255)
    offset = float(bool(config.get("offset") or config.get("rescale_offset")))
    mean = [(value + offset) / factor for value in normalization.mean]
    std = [value / factor for value in normalization.std]
    return Normalization(tuple(mean), tuple(std))


def _normalization(mean: Any, std: Any) -> Normalization | None:
    """Return the mean and deviation in a config, numbers or lists, as tuples; None if one is missing."""
    if mean is None or std is None:
        return None
    return Normalization(tuple(np.ravel(mean).tolist()), tuple(np.ravel(std).tolist()))


def one_line(error: Exception) -> str:
    """Return the start of an error's text without line breaks."""
    return " ".join(str(error).split())[:300]
