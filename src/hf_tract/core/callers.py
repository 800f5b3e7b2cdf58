"""Preconditions the weight of a layer in a module that reads it by itself, by `F.conv2d` or `F.linear`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hf_tract.core.attach import preconditioner_of
from hf_tract.core.patches import PatchOpMode
from hf_tract.core.run import run_where_acting
from hf_tract.core.tract_class import CALLED_LAYERS, TrActClass, original_class, swap_class


class TrActCaller(TrActClass):
    """A module whose own forward runs an operation with the weight of such a layer."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Returns a copy that reads the copied layers."""
        copied = self.deepcopy_ordinary(memo)
        attach_caller(copied, copy.deepcopy(self.__dict__[CALLED_LAYERS], memo))
        return copied


class _WeightMode(PatchOpMode):
    """Preconditions every operation inside that reads the weight of one of `layers`."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = layers

    def run_op(self, op: Callable[..., Tensor], input: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs `op`."""
        owner = next((layer for layer in self.layers if layer.weight is weight), None)
        preconditioner = None if owner is None else preconditioner_of(owner)
        return run_where_acting(preconditioner, op, input, weight, *args, **kwargs)


def _forward_of(cls: type) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        layers = self.__dict__.get(CALLED_LAYERS)
        if layers is None:  # captured by somebody, and TrAct was taken off since
            return cls.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        with _WeightMode(layers):
            return cls.forward(self, *args, **kwargs)  # type: ignore[attr-defined]

    return forward


def attach_caller(module: nn.Module, layers: list[nn.Module]) -> None:
    """Lets `module`, whose own forward runs operations with the weights of `layers`, precondition these."""
    cls = original_class(type(module))
    module.__dict__[CALLED_LAYERS] = layers
    namespace = {"__module__": cls.__module__, "forward": _forward_of(cls)}
    # The name is kept: transformers writes that of a model's class into its config.
    swap_class(module, type(cls.__name__, (TrActCaller, cls), namespace))


def detach_caller(module: nn.Module) -> None:
    """Makes `module` what it was before `attach_caller`; another one stays as it is."""
    if isinstance(module, TrActCaller):
        swap_class(module, original_class(type(module)))
        del module.__dict__[CALLED_LAYERS]
