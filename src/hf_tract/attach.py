"""Gives a layer its TrAct class, and takes it off.

A layer with TrAct differs from the ordinary one by its class, a subclass made for it, and by one private attribute. Its
forward values, parameters, buffers and names are the ordinary layer's. Copies made by `copy.deepcopy` have a
preconditioner of their own; pickles, scripts, traces and exports hold the ordinary layer.
"""

from __future__ import annotations

import copy
import copyreg
import math
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.overrides import TorchFunctionMode

from hf_tract.config import TrActConfig, TrActError
from hf_tract.patches import PATCH_OPS
from hf_tract.preconditioner import LayerPreconditioner
from hf_tract.run import acts, run

_PRECONDITIONER = "_tract_step"
_CALLED_LAYERS = "_tract_layers"
CONV_OPS: dict[type, Callable[..., Tensor]] = {
    nn.Conv1d: torch.conv1d,
    nn.Conv2d: torch.conv2d,
    nn.Conv3d: torch.conv3d,
}


class TrActClass:
    """What a class of ours adds to the one it was made for, besides acting: copies, pickles and scripts without it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Makes an ordinary layer: libraries build layers like another by `type(layer)(...)`."""
        super().__init__(*args, **kwargs)
        self.__class__ = original_class(type(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles the ordinary layer, which loads where this library is not installed."""
        function, arguments, *rest = _ordinary(self).__reduce_ex__(protocol)
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]
            # pickle holds this one against the object's own class; the other says the same
            function, arguments = copyreg._reconstructor, (arguments[0], object, None)  # type: ignore[attr-defined]
        return (function, arguments, *rest)

    def __prepare_scriptable__(self) -> Any:
        """Gives `torch.jit.script` the ordinary layer."""
        return _ordinary(self)

    def _deepcopy_ordinary(self, memo: dict[int, Any]) -> Any:
        original: Any = original_class(type(self))
        copied = original.__new__(original)
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(_ordinary_state(self), memo))
        return copied


class TrActLayer(TrActClass):
    """A layer whose weight's gradient is preconditioned."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Returns a copy with TrAct, which shares no step with this layer."""
        copied, preconditioner = self._deepcopy_ordinary(memo), preconditioner_of(self)
        if preconditioner is not None:
            attach(copied, preconditioner.config, preconditioner.process_group)
        return copied


class TrActCaller(TrActClass):
    """A module whose own forward runs an operation with the weight of such a layer."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module's own forward; operations that read a layer's weight are preconditioned."""
        with _WeightMode(self.__dict__[_CALLED_LAYERS]):
            return super().forward(*args, **kwargs)  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Returns a copy that calls the copied layers."""
        copied = self._deepcopy_ordinary(memo)
        attach_caller(copied, copy.deepcopy(self.__dict__[_CALLED_LAYERS], memo))
        return copied


class _WeightMode(TorchFunctionMode):
    """Preconditions every known operation inside that reads the weight of one of `layers`."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = layers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs `func`."""
        kwargs = kwargs or {}
        if func in PATCH_OPS:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            for layer in self.layers:
                preconditioner = preconditioner_of(layer)
                if layer.weight is weight and preconditioner is not None:
                    return _run_known(preconditioner, func, *args, **kwargs)
        return func(*args, **kwargs)


class _PreconditionMode(TorchFunctionMode):
    """Preconditions the weight of every known operation that runs inside."""

    def __init__(self, preconditioner: LayerPreconditioner) -> None:
        super().__init__()
        self.preconditioner = preconditioner
        self.met = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs `func`."""
        kwargs = kwargs or {}
        if func not in PATCH_OPS:
            return func(*args, **kwargs)
        self.met = True
        return _run_known(self.preconditioner, func, *args, **kwargs)


def _run_known(preconditioner: LayerPreconditioner, op: Any, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
    if not acts(weight, input):
        return op(input, weight, *args, **kwargs)
    return run(preconditioner, op, input, weight, *args, **kwargs)


def _conv_forward_of(cls: type) -> Callable[..., Any]:
    """Makes the `_conv_forward` of a convolution class: what torch's own forward calls, also one captured before."""
    op = next(op for kind, op in CONV_OPS.items() if issubclass(cls, kind))

    def _conv_forward(self: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        preconditioner = preconditioner_of(self)
        if preconditioner is None or not acts(weight, input):
            return cls._conv_forward(self, input, weight, bias)  # type: ignore[attr-defined]
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        return run(preconditioner, op, input, weight, bias, self.stride, padding, self.dilation, self.groups)

    return _conv_forward


def _linear_forward_of(cls: type) -> Callable[..., Any]:
    """Makes the forward of a class that has `nn.Linear`'s."""

    def forward(self: Any, input: Tensor) -> Any:
        preconditioner = preconditioner_of(self)
        if preconditioner is None or not acts(self.weight, input):
            return cls.forward(self, input)  # type: ignore[attr-defined]
        return run(preconditioner, F.linear, input, self.weight, self.bias)

    return forward


def _any_forward_of(cls: type) -> Callable[..., Any]:
    """Makes the forward of a class with one of its own; it raises `TrActError` if no known operation runs in it."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        preconditioner = preconditioner_of(self)
        if preconditioner is None or not torch.is_grad_enabled():
            return cls.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        mode = _PreconditionMode(preconditioner)
        with mode:
            out = cls.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        if not mode.met:
            raise TrActError(
                f"{cls.__name__}.forward ran no convolution or linear operation that TrAct knows; name another layer with "
                f"`layers=`."
            )
        return out

    return forward


def preconditioner_of(layer: Any) -> LayerPreconditioner | None:
    """Returns the preconditioner of a layer that has TrAct."""
    preconditioner: LayerPreconditioner | None = layer.__dict__.get(_PRECONDITIONER)
    return preconditioner


def _forward_override(cls: type) -> str:
    """Returns how layers of `cls` are met: in `_conv_forward`, in `nn.Linear`'s forward, or around any other."""
    for kind in CONV_OPS:
        if issubclass(cls, kind) and cls.forward is kind.forward and cls._conv_forward is kind._conv_forward:  # type: ignore[attr-defined]
            return "_conv_forward"
    return "linear" if cls.forward is nn.Linear.forward else "any"  # type: ignore[attr-defined]


_CLASSES: dict[type, type] = {}


def _tract_class(cls: type) -> type:
    if cls not in _CLASSES:
        override = _forward_override(cls)
        # The module is the original's, so that torch.fx takes the layer for the leaf that it is.
        namespace: dict[str, Any] = {"__module__": cls.__module__}
        if override == "_conv_forward":
            namespace["_conv_forward"] = _conv_forward_of(cls)
        else:
            namespace["forward"] = _linear_forward_of(cls) if override == "linear" else _any_forward_of(cls)
        _CLASSES[cls] = type(f"TrAct{cls.__name__}", (TrActLayer, cls), namespace)
    return _CLASSES[cls]


def original_class(cls: type) -> type:
    """Returns `cls` without ours, which may lie under a class that FSDP2 put on top."""
    if TrActClass not in cls.__mro__:
        return cls
    if TrActLayer in cls.__bases__ or TrActCaller in cls.__bases__:
        return cls.__bases__[1]
    members = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls.__name__.replace("TrAct", "", 1), tuple(map(original_class, cls.__bases__)), members)


def _ordinary_state(layer: Any) -> dict[str, Any]:
    return {name: value for name, value in layer.__dict__.items() if name not in (_PRECONDITIONER, _CALLED_LAYERS)}


def _ordinary(layer: Any) -> Any:
    """Returns an ordinary layer that shares everything with `layer`."""
    original: Any = original_class(type(layer))
    ordinary = original.__new__(original)
    ordinary.__dict__.update(_ordinary_state(layer))
    return ordinary


def is_supported(layer: nn.Module) -> bool:
    """Says whether `layer` is a convolution or linear layer whose weight is made of real numbers."""
    if not isinstance(layer, (nn.Linear, *CONV_OPS)):
        return False
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and weight.is_floating_point() and not isinstance(weight, UninitializedParameter)


def is_frozen(layer: nn.Module) -> bool:
    """Says whether nothing that the weight is made of can be trained."""
    weights = [parameter for name, parameter in layer.named_parameters() if name != "bias"]
    # FSDP1 may have replaced the parameter by a view of its own.
    return not any(tensor.requires_grad for tensor in [*weights, layer.weight] if isinstance(tensor, Tensor))


def patch_size(layer: nn.Module) -> int:
    """Returns n of a supported layer, from its settings: a sharded weight has another shape."""
    if isinstance(layer, nn.Linear):
        return int(layer.in_features)  # some models compute it by a tensor
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return layer.in_channels // layer.groups * math.prod(layer.kernel_size)


def out_features(layer: nn.Module) -> int:
    """Returns m of a supported layer."""
    if isinstance(layer, nn.Linear):
        return int(layer.out_features)
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return layer.out_channels


def foreign_forward(layer: nn.Module) -> str:
    """Returns what replaced the forward of this one instance, if TrAct cannot act under it; else nothing.

    A convolution's own forward, captured by whoever, still calls `_conv_forward`, and what accelerate's hooks captured can
    be exchanged. A forward that another library wrapped around `nn.Linear`'s cannot be reached.
    """
    forward = vars(layer).get("forward")
    if forward is None or _is_own_forward(layer, forward) or "_old_forward" in vars(layer):
        return ""
    if _forward_override(original_class(type(layer))) == "_conv_forward":
        return ""
    return getattr(forward, "__qualname__", None) or repr(forward)


def attach(layer: nn.Module, config: TrActConfig, process_group: Any = None) -> None:
    """Gives `layer` TrAct; where it has it already, these settings, which hold for the whole of the step it is in."""
    preconditioner = preconditioner_of(layer)
    if isinstance(layer, TrActLayer) and preconditioner is not None:
        preconditioner.config, preconditioner.process_group = config, process_group
        return
    layer.__dict__[_PRECONDITIONER] = LayerPreconditioner(layer, config, process_group)
    layer.__class__ = _tract_class(type(layer))
    _rebind_captured_forwards(layer)


def detach(layer: nn.Module) -> None:
    """Makes `layer` what it was before `attach`; an ordinary one stays as it is.

    A backward that is still to come hands on the ordinary gradient.
    """
    if isinstance(layer, TrActLayer):
        layer.__class__ = original_class(type(layer))
        layer.__dict__.pop(_PRECONDITIONER).active = False
        _rebind_captured_forwards(layer)
    elif isinstance(layer, TrActCaller):
        layer.__class__ = original_class(type(layer))
        del layer.__dict__[_CALLED_LAYERS]
        _rebind_captured_forwards(layer)


def attach_caller(module: nn.Module, layers: list[nn.Module]) -> None:
    """Lets `module`, whose own forward runs an operation with the weights of `layers`, precondition these too."""
    if not isinstance(module, TrActClass):
        cls = type(module)  # whose name is kept: transformers writes a model's into its config
        module.__class__ = type(cls.__name__, (TrActCaller, cls), {"__module__": cls.__module__})
        _rebind_captured_forwards(module)
    module.__dict__[_CALLED_LAYERS] = layers


def _rebind_captured_forwards(layer: nn.Module) -> None:
    """Lets accelerate's hooks call the forward of the class that `layer` has now."""
    for name in ("forward", "_old_forward"):
        captured = vars(layer).get(name)
        if captured is not None and _is_own_forward(layer, captured):
            layer.__dict__[name] = MethodType(type(layer).forward, layer)


def _is_own_forward(layer: nn.Module, forward: Any) -> bool:
    """Says whether `forward` is that of a class of `layer`, or one that TrAct put there, bound to it."""
    if not isinstance(forward, MethodType) or forward.__self__ is not layer:
        return False
    function = forward.__func__
    return function.__module__ == __name__ or any(vars(cls).get("forward") is function for cls in type(layer).__mro__)
