"""A model by its name, without its weights, and how its pixels are normalised."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_tract.config import TrActError


class Normalization(NamedTuple):
    """What an image processor does to values from 0 to 1: minus `mean` over `std`, by channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Loaded(NamedTuple):
    """A model on the meta device; `pixels` is None where nothing says how they are normalised."""

    model: nn.Module
    pixels: Normalization | None
    kind: str


def load(name: str, *, trust_remote_code: bool = False) -> Loaded:
    """The model called `name`, on the meta device: its structure and no weights.

    Args:
        name: a folder with a config.json, a timm model, a transformers model_type (its default config), or a Hub id.
        trust_remote_code: run a model's own code from the Hub.

    Raises:
        TrActError: for a name that is none of these.
    """
    if name.startswith(("hf-hub:", "hf_hub:")):
        return _from_timm_on_the_hub(name)
    if not Path(name).exists():
        if (timm := _timm()) is not None and timm.is_model(name.removeprefix("timm/")):
            return _from_timm(timm, name.removeprefix("timm/"))
        from transformers import CONFIG_MAPPING

        if name in CONFIG_MAPPING:
            return Loaded(_made(CONFIG_MAPPING[name]()), None, f"transformers' default {name}")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise TrActError(_unknown(name, error)) from error
    kind = "folder" if Path(name).exists() else "Hub"
    return Loaded(_made(config, trust_remote_code), _processor(name), kind)


def _timm() -> Any:
    try:
        import timm
    except ImportError:
        return None
    return timm


def _from_timm(timm: Any, name: str) -> Loaded:
    with torch.device("meta"):
        model = timm.create_model(name)
    config = model.pretrained_cfg
    return Loaded(model, _pixels(config.get("mean"), config.get("std")), "timm")


def _from_timm_on_the_hub(name: str) -> Loaded:
    """Makes a model as `timm.create_model("hf-hub:OWNER/NAME")` does."""
    if (timm := _timm()) is None:
        raise TrActError(f"`model` (={name!r}) needs the package timm: pip install 'hf-tract[cli]'.")
    try:
        return _from_timm(timm, name)
    except Exception as error:  # what the Hub and timm raise has no common class
        raise TrActError(f"`model` (={name!r}) is no timm model that the Hub gives: {in_a_line(error)}") from error


def _made(config: Any, trust_remote_code: bool = False) -> nn.Module:
    """The class that the checkpoint names, or the bare model of its type."""
    import transformers

    cls = next(
        (getattr(transformers, name) for name in config.architectures or () if hasattr(transformers, name)), None
    )
    with torch.device("meta"):
        if cls is not None:
            return cls(config)  # type: ignore[no-any-return]
        try:
            return transformers.AutoModel.from_config(config, trust_remote_code=trust_remote_code)  # type: ignore[no-any-return]
        except (ValueError, ImportError) as error:
            raise TrActError(f"`model` (={config.model_type}) cannot be made: {error}") from error


def _processor(name: str) -> Normalization | None:
    """What the checkpoint's image processor says; it is read and not made, since making one needs image libraries."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except (OSError, ValueError):
        return None
    if values.get("do_normalize") is False:
        return Normalization((0.0,), (1.0,) if values.get("do_rescale", True) else (1 / 255,))
    return _pixels(values.get("image_mean"), values.get("image_std"))


def _pixels(mean: Any, std: Any) -> Normalization | None:
    if mean is None or std is None:
        return None
    return Normalization(
        *(tuple(value) if isinstance(value, (list, tuple)) else (float(value),) for value in (mean, std))
    )


def _unknown(name: str, error: Exception) -> str:
    names = timm.list_models() if (timm := _timm()) is not None else []
    near = ", ".join(difflib.get_close_matches(name, names, n=3)) or "none"
    what = "is a folder without a config that transformers knows" if Path(name).exists() else NO_NAME.format(near)
    return f"`model` (={name!r}) {what}: {in_a_line(error)}"


def in_a_line(error: Exception) -> str:
    """Returns the start of an error's text without line breaks."""
    return " ".join(str(error).split())[:300]


NO_NAME = (
    "is no folder, no timm model (the nearest: {}), no model_type of transformers, and no model that the Hub gives"
)
