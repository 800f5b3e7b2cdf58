"""Trains the first layer of a vision model by TrAct, so that it learns like an embedding."""

from typing import TYPE_CHECKING, Any

from hf_tract.apply import TrActHandle, apply_tract, remove_tract
from hf_tract.config import TrActConfig, TrActError
from hf_tract.discovery.first_layer import FirstLayer, find_first_layers
from hf_tract.whitening.spectrum import Spectrum, first_layer_spectrum
from hf_tract.whitening.whiten import whiten_first_layer

if TYPE_CHECKING:
    from hf_tract.integrations import TrActCallback, TrActHook, TrActTrainerCallback

__version__ = "0.1.0"
__all__ = [
    "FirstLayer",
    "Spectrum",
    "TrActCallback",
    "TrActConfig",
    "TrActError",
    "TrActHandle",
    "TrActHook",
    "TrActTrainerCallback",
    "apply_tract",
    "find_first_layers",
    "first_layer_spectrum",
    "remove_tract",
    "whiten_first_layer",
]

# transformers and accelerate take seconds to import, so `hf_tract` imports these only when they are used.
_LAZY = ("TrActCallback", "TrActHook", "TrActTrainerCallback")


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.integrations"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
