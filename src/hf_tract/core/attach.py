"""Gives modules their TrAct classes, and takes them off.

A layer with TrAct has a subclass of its own class, and one private attribute more: the preconditioner. A module whose
own forward runs an operation with such a layer's weight, by `F.conv2d` or `F.linear`, has another subclass. Forward
values, parameters, buffers and names stay as they are. `copy.deepcopy` makes a layer with a preconditioner of its own;
other copies, traces and exports hold the ordinary layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_tract.config import TrActConfig, TrActError
from hf_tract.core.forward import run_preconditioned
from hf_tract.core.patches import CONV_OPS, PatchOpMode
from hf_tract.core.preconditioner import LayerPreconditioner
from hf_tract.core.tract_class import (
    PRECONDITIONER,
    READ_LAYERS,
    TrActClass,
    is_own_forward,
    original_class,
    swap_class,
)

_layer_classes: dict[type, type] = {}


class TrActLayer(TrActClass):
    """Is a layer whose weight's gradient is preconditioned."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return a copy with TrAct, which shares no step with this layer."""
        copied = self.deepcopy_ordinary(memo)
        preconditioner = preconditioner_of(self)
        if preconditioner is not None:
            attach(copied, preconditioner.config, preconditioner.process_group)
        return copied


class TrActCaller(TrActClass):
    """Is a module whose own forward runs an operation with the weight of a layer that has TrAct."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return a copy that reads the copied layers."""
        copied = self.deepcopy_ordinary(memo)
        attach_caller(copied, copy.deepcopy(self.__dict__[READ_LAYERS], memo))
        return copied


def attach(layer: nn.Module, config: TrActConfig, process_group: Any = None) -> None:
    """Give `layer` TrAct; one that has it gets these settings, which hold for the whole of the step it is in."""
    preconditioner = preconditioner_of(layer)
    if preconditioner is not None:
        preconditioner.config = config
        preconditioner.process_group = process_group
        return
    detach(layer)  # It may have been a caller.
    layer.__dict__[PRECONDITIONER] = LayerPreconditioner(layer, config, process_group)
    swap_class(layer, _layer_class(type(layer)))


def attach_caller(module: nn.Module, layers: list[nn.Module]) -> None:
    """Precondition the weights of `layers` in the forward of `module`, which reads them itself."""
    cls = original_class(type(module))
    module.__dict__[READ_LAYERS] = layers
    namespace = {"__module__": cls.__module__, "forward": _caller_forward_of(cls)}
    # The name stays: transformers writes that of a model's class into its config.
    swap_class(module, type(cls.__name__, (TrActCaller, cls), namespace))


def detach(module: nn.Module) -> None:
    """Make a layer or a caller what it was before; an ordinary module stays as it is.

    A backward that is still to come hands on the ordinary gradient.
    """
    if not isinstance(module, TrActClass):
        return
    swap_class(module, original_class(type(module)))
    module.__dict__.pop(READ_LAYERS, None)
    preconditioner = module.__dict__.pop(PRECONDITIONER, None)
    if preconditioner is not None:
        preconditioner.active = False


def preconditioner_of(layer: Any) -> LayerPreconditioner | None:
    """Return the preconditioner of a layer; None if it has no TrAct."""
    preconditioner: LayerPreconditioner | None = layer.__dict__.get(PRECONDITIONER)
    return preconditioner


def foreign_forward(layer: nn.Module) -> str:
    """Return the name of a forward that another library gave the layer, if TrAct cannot act under it; "" otherwise.

    It can act under a captured forward of a convolution, which still calls `_conv_forward`, and under accelerate's
    hooks, in which `swap_class` exchanges what they captured.
    """
    forward = vars(layer).get("forward")
    if forward is None or is_own_forward(layer, forward):
        return ""
    if "_old_forward" in vars(layer):  # accelerate's hooks
        return ""
    if _has_torchs_conv_forward(original_class(type(layer))):
        return ""
    return getattr(forward, "__qualname__", None) or repr(forward)


def _layer_class(cls: Any) -> type:
    """Return the class that a layer of class `cls` gets, always the same one."""
    if cls in _layer_classes:
        return _layer_classes[cls]
    # The module is the original's, so that torch.fx takes the layer for a leaf, as it does the original.
    namespace: dict[str, Any] = {"__module__": cls.__module__}
    if _has_torchs_conv_forward(cls):
        namespace["_conv_forward"] = _conv_forward_of(cls)
    elif cls.forward is nn.Linear.forward:
        namespace["forward"] = _linear_forward
    else:
        namespace["forward"] = _any_forward_of(cls)
    _layer_classes[cls] = type(f"TrAct{cls.__name__}", (TrActLayer, cls), namespace)
    return _layer_classes[cls]


def _has_torchs_conv_forward(cls: Any) -> bool:
    kind: Any
    for kind in CONV_OPS:
        if issubclass(cls, kind):
            return cls.forward is kind.forward and cls._conv_forward is kind._conv_forward
    return False


def _conv_forward_of(cls: type) -> Callable[..., Any]:
    """Return a `_conv_forward` for a convolution: torch's forward calls it, also one that was captured before."""
    op = next(op for kind, op in CONV_OPS.items() if issubclass(cls, kind))

    def _conv_forward(self: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        settings = (bias, self.stride, padding, self.dilation, self.groups)
        return run_preconditioned(preconditioner_of(self), op, input, weight, *settings)

    return _conv_forward


def _linear_forward(self: Any, input: Tensor) -> Any:
    """Run what `nn.Linear.forward` runs."""
    return run_preconditioned(preconditioner_of(self), F.linear, input, self.weight, self.bias)


def _any_forward_of(cls: Any) -> Callable[..., Any]:
    """Return a forward for a layer with a forward of its own."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        preconditioner = preconditioner_of(self)
        if preconditioner is None or not torch.is_grad_enabled():
            return cls.forward(self, *args, **kwargs)
        mode = _PreconditionMode(lambda _: preconditioner)
        with mode:
            out = cls.forward(self, *args, **kwargs)
        if not mode.has_run_op:
            raise TrActError(
                f"{cls.__name__}.forward ran no convolution or linear operation that TrAct knows; "
                f"name another layer with `layers=`."
            )
        return out

    return forward


def _caller_forward_of(cls: Any) -> Callable[..., Any]:
    """Return a forward for a module that reads the weights of other layers."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        def owner_of(weight: Any) -> LayerPreconditioner | None:
            # A library may have captured this forward, and TrAct been removed since: then there are no layers.
            for layer in self.__dict__.get(READ_LAYERS, []):
                if layer.weight is weight:
                    return preconditioner_of(layer)
            return None

        with _PreconditionMode(owner_of):
            return cls.forward(self, *args, **kwargs)

    return forward


class _PreconditionMode(PatchOpMode):
    """Preconditions the weights of the known operations that run inside."""

    def __init__(self, owner_of: Callable[[Any], LayerPreconditioner | None]) -> None:
        super().__init__()
        # Returns the preconditioner of a weight.
        self.owner_of = owner_of
        self.has_run_op = False

    def run_op(self, op: Callable[..., Tensor], input: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        """Run `op`."""
        self.has_run_op = True
        return run_preconditioned(self.owner_of(weight), op, input, weight, *args, **kwargs)
