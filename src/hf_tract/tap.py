"""The tap: while a layer's own forward runs, its convolution or linear operation reads a preconditioned weight.

A tapped layer differs from an untapped one by its class, a subclass of its own, and by one private attribute. Its
forward values, parameters, buffers and names are those of the untapped layer.
"""

from __future__ import annotations

import copyreg
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.overrides import TorchFunctionMode

from hf_tract.config import TrActConfig, TrActError
from hf_tract.moments import Window
from hf_tract.operators import Precondition, gather
from hf_tract.step import LayerStep

STEP = "_tract_step"


def _linear_window(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Window:
    return Window()


def _conv_window(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Window:
    kernel = tuple(weight.shape[2:])
    dilations = _each(dilation, len(kernel))
    if padding == "same":  # the odd zero goes behind, as in torch
        total = [d * (k - 1) for k, d in zip(kernel, dilations, strict=True)]
        pads = [side for t in total for side in (t // 2, t - t // 2)]
    else:
        pads = [p for p in _each(0 if isinstance(padding, str) else padding, len(kernel)) for _ in range(2)]
    return Window(kernel, _each(stride, len(kernel)), tuple(pads), dilations, groups)


def _each(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


WINDOWS: dict[Callable[..., Tensor], Callable[..., Window]] = {
    F.linear: _linear_window,
    torch.conv1d: _conv_window,
    torch.conv2d: _conv_window,
    torch.conv3d: _conv_window,
}


class TapMode(TorchFunctionMode):
    """Taps the weight of every operation of `WINDOWS` that runs inside."""

    def __init__(self, step: LayerStep) -> None:
        super().__init__()
        self.step = step
        self.met = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs `func`, with its weight tapped if it is one of `WINDOWS`."""
        kwargs = kwargs or {}
        if func in WINDOWS:
            self.met = True
            args, kwargs = _tapped(self.step, WINDOWS[func], *args, **kwargs)
        return func(*args, **kwargs)


def _tapped(step: LayerStep, window_of: Callable[..., Window], input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
    window = window_of(input, weight, *args, **kwargs)
    # An input that does not fit goes untapped, so that torch itself says what is wrong with it.
    if weight.requires_grad and _fits(input, weight, window):
        wide = torch.float64 in (input.dtype, weight.dtype)
        sizes = [list(window.kernel), list(window.stride), list(window.padding), list(window.dilation)]
        payload = gather(_read(input.detach()), step.calls, step.key, *sizes, window.groups, wide)
        weight = Precondition.apply(weight, payload, step.key)
    return (input, weight, *args), kwargs


def _read(input: Tensor) -> Tensor:
    """The numbers that the operation reads: under autocast those of the lower precision, of which tensor cores make C."""
    if input.is_cuda and input.dtype == torch.float32 and torch.is_autocast_enabled("cuda"):
        return input.to(torch.get_autocast_dtype("cuda"))
    return input


def _fits(input: Tensor, weight: Tensor, window: Window) -> bool:
    if not window.kernel:
        return input.shape[-1] == weight.shape[-1]
    dims = len(window.kernel)
    return input.dim() in (dims + 1, dims + 2) and input.shape[-dims - 1] == weight.shape[1] * window.groups


class Tapped:
    """What a tapped layer's class adds to its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward; raises `TrActError` if no convolution or linear operation runs in it."""
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        mode = TapMode(self._tract_step)
        with mode:
            out = super().forward(*args, **kwargs)  # type: ignore[misc]
        if not mode.met:
            raise TrActError(f"{type(self).__name__}.forward ran no convolution or linear operation that TrAct knows.")
        return out

    _tract_step: LayerStep

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Classes made on the fly are made again on the other side."""
        reduced: Any = super().__reduce_ex__(protocol)
        cls = type(self)
        if cls.__module__ == __name__ or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        _, (_, *args), *rest = reduced
        return (_new_tapped, (cls.__bases__[1], *args), *rest)


class TrActLinear(Tapped, nn.Linear):
    """A tapped `Linear`."""


class TrActConv1d(Tapped, nn.Conv1d):
    """A tapped `Conv1d`."""


class TrActConv2d(Tapped, nn.Conv2d):
    """A tapped `Conv2d`."""


class TrActConv3d(Tapped, nn.Conv3d):
    """A tapped `Conv3d`."""


_CLASSES: dict[type, type] = {
    nn.Linear: TrActLinear,
    nn.Conv1d: TrActConv1d,
    nn.Conv2d: TrActConv2d,
    nn.Conv3d: TrActConv3d,
}


def _tapped_class(cls: type) -> type:
    if cls not in _CLASSES:
        _CLASSES[cls] = type(f"TrAct{cls.__name__}", (Tapped, cls), {"__module__": cls.__module__})
    return _CLASSES[cls]


def untapped_class(cls: type) -> type:
    """`cls` without ours, which may lie under a class that FSDP2 put on top."""
    if Tapped not in cls.__mro__:
        return cls
    if Tapped in cls.__bases__:
        return cls.__bases__[1]
    members = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls.__name__.replace("TrAct", "", 1), tuple(map(untapped_class, cls.__bases__)), members)


def _new_tapped(cls: type, *args: Any) -> Any:
    return copyreg.__newobj__(_tapped_class(cls), *args)  # type: ignore[attr-defined]


def can_tap(layer: nn.Module) -> bool:
    """Whether `layer` is a convolution or linear layer whose weight is made of real numbers."""
    if not isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return False
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and weight.is_floating_point() and not isinstance(weight, UninitializedParameter)


def is_frozen(layer: nn.Module) -> bool:
    """Whether nothing that the weight is made of can be trained."""
    weights = [parameter for name, parameter in layer.named_parameters() if name != "bias"]
    # FSDP1 may have replaced the parameter by a view of its own.
    return not any(tensor.requires_grad for tensor in [*weights, layer.weight] if isinstance(tensor, Tensor))


def columns(layer: nn.Module) -> int:
    """n of a layer that `can_tap`, from its settings: a sharded weight has another shape."""
    if isinstance(layer, nn.Linear):
        return int(layer.in_features)  # some models compute it by a tensor
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return layer.in_channels // layer.groups * math.prod(layer.kernel_size)


def rows(layer: nn.Module) -> int:
    """m of a layer that `can_tap`."""
    if isinstance(layer, nn.Linear):
        return int(layer.out_features)
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return layer.out_channels


def tap(layer: nn.Module, config: TrActConfig, process_group: Any = None) -> None:
    """Taps `layer`, or gives a tapped one these settings and a fresh step."""
    if isinstance(layer, Tapped):
        layer._tract_step.configure(config, process_group)
    else:
        layer.__dict__[STEP] = LayerStep(config, process_group)
        layer.__class__ = _tapped_class(type(layer))


def untap(layer: nn.Module) -> None:
    """Makes `layer` what it was before `tap`; an untapped one stays as it is."""
    if isinstance(layer, Tapped):
        layer.__class__ = untapped_class(type(layer))
        del layer.__dict__[STEP]
