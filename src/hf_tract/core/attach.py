"""Puts TrAct's classes on modules, and takes them off again.

The class of a layer with TrAct is a subclass of its original one, and the layer has one more private attribute: the
preconditioner. A module whose own forward runs an operation with such a layer's weight, by `F.conv2d` or `F.linear`,
gets another subclass. Forward values, parameters, buffers and names stay as they are. `copy.deepcopy` makes a layer
with a preconditioner of its own; other copies, traces and exports contain the ordinary layer.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_tract.config import TrActConfig, TrActError
from hf_tract.core.forward import is_preconditioned, run_preconditioned
from hf_tract.core.patches import CONV_OPS, LINEAR, PatchOpMode, has_torchs_conv_forward, torchs_linear
from hf_tract.core.preconditioner import LayerPreconditioner
from hf_tract.core.tract_class import (
    ORIGINAL,
    PRECONDITIONER,
    READ_LAYERS,
    TrActClass,
    original_class,
    swap_class,
)
from hf_tract.core.weights import is_weight_of

_layer_classes: dict[type, type] = {}
# What `_caller_forward` has made.
_caller_forwards: WeakSet[Callable[..., Any]] = WeakSet()


class TrActLayer(TrActClass):
    """Is a layer whose weight's gradient is preconditioned."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return a copy with TrAct, which has a preconditioner of its own."""
        copied = self.deepcopy_ordinary(memo)
        preconditioner = preconditioner_of(self)
        if preconditioner is not None:
            attach(copied, preconditioner.config, preconditioner.process_group)
        return copied


def _forward_above(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Run what a class's own forward means by `super(type(self), self)`."""
    above: Any = super(original_class(type(self)), self)
    return above.forward(*args, **kwargs)


class TrActOddLayer(TrActLayer):
    """Is a layer with TrAct whose class has a forward of its own."""

    forward = _forward_above


class TrActCaller(TrActClass):
    """Is a module whose own forward runs an operation with the weight of a layer that has TrAct."""

    forward = _forward_above

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return a copy that reads the copied layers."""
        copied = self.deepcopy_ordinary(memo)
        attach_caller(copied, copy.deepcopy(self.__dict__[READ_LAYERS], memo))
        return copied


def attach(layer: nn.Module, config: TrActConfig, process_group: Any = None) -> None:
    """Apply TrAct to `layer`; if it has TrAct already, replace its settings, for all of the current step too."""
    preconditioner = preconditioner_of(layer)
    if preconditioner is not None and isinstance(layer, TrActLayer):
        preconditioner.config = config
        preconditioner.process_group = process_group
        return
    detach(layer)  # It may have been a caller.
    layer.__dict__[PRECONDITIONER] = LayerPreconditioner(layer, config, process_group)
    swap_class(layer, _layer_class(type(layer)))


def attach_caller(module: nn.Module, layers: Sequence[nn.Module | str]) -> None:
    """Precondition the weight gradients of `layers` in the forward of `module`, which uses the weights directly."""
    # By name, since a replica of DataParallel's has replicas of them.
    names: dict[Any, str] = {child: name for name, child in module.named_modules()}
    module.__dict__[READ_LAYERS] = [names.get(layer, layer) for layer in layers]
    swap_class(module, _caller_class(original_class(type(module))))
    captured = vars(module).get("forward")
    # accelerate's, for mixed precision.
    if isinstance(captured, MethodType) and not _is_around_ours(captured.__func__):
        module.__dict__["forward"] = MethodType(_caller_forward(captured.__func__), module)


def detach(module: nn.Module) -> None:
    """Take TrAct off a layer or a caller; an ordinary module stays as it is.

    A backward that is still to come returns the ordinary gradient.
    """
    if isinstance(module, TrActClass):
        swap_class(module, original_class(type(module)))
        forward: Any = vars(module).get("forward")
        if isinstance(forward, MethodType) and forward.__func__ in _caller_forwards:
            wrapper: Any = forward.__func__
            module.__dict__["forward"] = MethodType(wrapper.__wrapped__, module)
    module.__dict__.pop(READ_LAYERS, None)
    preconditioner = module.__dict__.pop(PRECONDITIONER, None)
    if preconditioner is not None:
        preconditioner.active = False


def preconditioner_of(layer: Any) -> LayerPreconditioner | None:
    """Return the preconditioner of a layer; None if it has no TrAct."""
    preconditioner: LayerPreconditioner | None = layer.__dict__.get(PRECONDITIONER)
    return preconditioner


def _layer_class(cls: Any) -> type:
    """Return the TrAct class for layers of class `cls`, which is created once."""
    if cls in _layer_classes:
        return _layer_classes[cls]
    # `__module__` is that of the original, so that torch.fx treats the layer as a leaf, like the original.
    namespace: dict[str, Any] = {"__module__": cls.__module__, ORIGINAL: cls}
    base: type = TrActLayer
    if has_torchs_conv_forward(cls):
        namespace["_conv_forward"] = _conv_forward_of(cls)
    elif cls.forward is nn.Linear.forward:
        namespace["forward"] = _linear_forward
    else:
        base = TrActOddLayer
        namespace["forward"] = _any_forward_of(cls)
    _layer_classes[cls] = type(f"TrAct{cls.__name__}", (base, cls), namespace)
    return _layer_classes[cls]


@functools.cache
def _caller_class(cls: Any) -> type:
    """Return the TrAct class for callers of class `cls`."""
    namespace = {"__module__": cls.__module__, ORIGINAL: cls}
    namespace["forward"] = _caller_forward(cls.forward)
    # It keeps its name, since transformers writes the name of a model's class into its config.
    return type(cls.__name__, (TrActCaller, cls), namespace)


def _conv_forward_of(cls: type) -> Callable[..., Any]:
    """Return a `_conv_forward` for a convolution: torch's forward calls it, even one that was captured earlier."""
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
    """Run the operation of `nn.Linear.forward`, preconditioned."""
    return run_preconditioned(preconditioner_of(self), LINEAR, input, self.weight, self.bias)


def _any_forward_of(cls: Any) -> Callable[..., Any]:
    """Return a forward for a layer whose class has a forward of its own."""

    @functools.wraps(cls.forward)  # Trainer reads its signature.
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        preconditioner = preconditioner_of(self)
        if preconditioner is None or not torch.is_grad_enabled():
            return cls.forward(self, *args, **kwargs)

        def owner_of(weight: Any) -> LayerPreconditioner | None:
            if is_weight_of(self, weight) and not is_preconditioned(weight):
                return preconditioner
            return None

        mode = _PreconditionMode(owner_of)
        with torchs_linear(mode.owns), mode:
            out = cls.forward(self, *args, **kwargs)
        if not mode.has_run_op:
            raise TrActError(
                f"{cls.__name__}.forward ran no convolution or linear operation with its weight that TrAct knows; "
                f"name another layer with `layers=`."
            )
        return out

    return forward


def _caller_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward for a module whose original one uses the weights of other layers directly."""

    @functools.wraps(original)  # Trainer reads its signature.
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        def owner_of(weight: Any) -> LayerPreconditioner | None:
            # If a library has captured this forward and TrAct was removed since, there are no layers.
            for each in self.__dict__.get(READ_LAYERS, []):
                layer = self.get_submodule(each) if isinstance(each, str) else each
                if layer.weight is weight:
                    return preconditioner_of(layer)
            return None

        mode = _PreconditionMode(owner_of)
        with torchs_linear(mode.owns), mode:
            return original(self, *args, **kwargs)

    _caller_forwards.add(forward)
    return forward


def _is_around_ours(forward: Any) -> bool:
    """Return whether a forward is one of `_caller_forward`, or a wrapper around one."""
    while forward is not None and forward not in _caller_forwards:
        forward = getattr(forward, "__wrapped__", None)
    return forward is not None


class _PreconditionMode(PatchOpMode):
    """Preconditions the weight gradients of the supported operations that run inside this context."""

    def __init__(self, owner_of: Callable[[Any], LayerPreconditioner | None]) -> None:
        super().__init__()
        # Returns the preconditioner of a weight, or None.
        self.owner_of = owner_of
        self.has_run_op = False

    def owns(self, weight: Any) -> bool:
        """Return whether this is the weight of a layer that has TrAct."""
        return self.owner_of(weight) is not None

    def run_op(self, op: Callable[..., Tensor], input: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        """Run `op`, with the gradient of its weight preconditioned."""
        owner = self.owner_of(weight)
        self.has_run_op = self.has_run_op or owner is not None
        return run_preconditioned(owner, op, input, weight, *args, **kwargs)
