"""Preconditions a layer's weight where another module reads it, by `F.conv2d` or `F.linear` in its own forward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hf_tract.core.attach import preconditioner_of
from hf_tract.core.forward import run_preconditioned
from hf_tract.core.patches import PatchOpMode
from hf_tract.core.tract_class import READ_LAYERS, TrActClass, original_class, swap_class


class TrActCaller(TrActClass):
    """Is a module whose own forward runs an operation with the weight of a layer that has TrAct."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Returns a copy that reads the copied layers."""
        copied = self.deepcopy_ordinary(memo)
        attach_caller(copied, copy.deepcopy(self.__dict__[READ_LAYERS], memo))
        return copied


def attach_caller(module: nn.Module, layers: list[nn.Module]) -> None:
    """Preconditions the weights of `layers` in the forward of `module`, which reads them itself."""
    cls = original_class(type(module))
    module.__dict__[READ_LAYERS] = layers
    namespace = {"__module__": cls.__module__, "forward": _forward_of(cls)}
    # The name stays: transformers writes that of a model's class into its config.
    swap_class(module, type(cls.__name__, (TrActCaller, cls), namespace))


def detach_caller(module: nn.Module) -> None:
    """Makes `module` what it was before `attach_caller`; another module stays as it is."""
    if isinstance(module, TrActCaller):
        swap_class(module, original_class(type(module)))
        del module.__dict__[READ_LAYERS]


def _forward_of(cls: Any) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A library may have captured this forward, and TrAct been removed since: then there are no layers.
        with _WeightMode(self.__dict__.get(READ_LAYERS, [])):
            return cls.forward(self, *args, **kwargs)

    return forward


class _WeightMode(PatchOpMode):
    """Preconditions every operation inside that reads the weight of one of `layers`."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = layers

    def run_op(self, op: Callable[..., Tensor], input: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs `op`."""
        preconditioner = None
        for layer in self.layers:
            if layer.weight is weight:
                preconditioner = preconditioner_of(layer)
        return run_preconditioned(preconditioner, op, input, weight, *args, **kwargs)
