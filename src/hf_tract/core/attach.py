"""Gives a layer its TrAct class, and takes it off.

A layer with TrAct differs from the ordinary one by its class, a subclass made for it, and by one private attribute. Its
forward values, parameters, buffers and names are the ordinary layer's. Copies made by `copy.deepcopy` have a
preconditioner of their own; other copies, traces and exports hold the ordinary layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_tract.config import TrActConfig, TrActError
from hf_tract.core.patches import CONV_OPS, PatchOpMode
from hf_tract.core.preconditioner import LayerPreconditioner
from hf_tract.core.run import acts, run, run_where_acting
from hf_tract.core.tract_class import PRECONDITIONER, TrActClass, is_own_forward, original_class, swap_class


class TrActLayer(TrActClass):
    """A layer whose weight's gradient is preconditioned."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Returns a copy with TrAct, which shares no step with this layer."""
        copied, preconditioner = self.deepcopy_ordinary(memo), preconditioner_of(self)
        if preconditioner is not None:
            attach(copied, preconditioner.config, preconditioner.process_group)
        return copied


class _PreconditionMode(PatchOpMode):
    """Preconditions the weight of every known operation that runs inside."""

    def __init__(self, preconditioner: LayerPreconditioner) -> None:
        super().__init__()
        self.preconditioner = preconditioner
        self.met = False

    def run_op(self, op: Callable[..., Tensor], input: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs `op`."""
        self.met = True
        return run_where_acting(self.preconditioner, op, input, weight, *args, **kwargs)


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


def _linear_forward(self: Any, input: Tensor) -> Any:
    """Stands for `nn.Linear.forward`."""
    preconditioner = preconditioner_of(self)
    if preconditioner is None or not acts(self.weight, input):
        return nn.Linear.forward(self, input)
    return run(preconditioner, F.linear, input, self.weight, self.bias)


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
    preconditioner: LayerPreconditioner | None = layer.__dict__.get(PRECONDITIONER)
    return preconditioner


def _has_torchs_conv_forward(cls: Any) -> bool:
    kinds = [kind for kind in CONV_OPS if issubclass(cls, kind)]
    return any(cls.forward is kind.forward and cls._conv_forward is kind._conv_forward for kind in kinds)  # type: ignore[attr-defined]


_CLASSES: dict[type, type] = {}


def _tract_class(cls: Any) -> type:
    if cls not in _CLASSES:
        # The module is the original's, so that torch.fx takes the layer for the leaf that it is.
        namespace: dict[str, Any] = {"__module__": cls.__module__}
        if _has_torchs_conv_forward(cls):
            namespace["_conv_forward"] = _conv_forward_of(cls)
        else:
            namespace["forward"] = _linear_forward if cls.forward is nn.Linear.forward else _any_forward_of(cls)
        _CLASSES[cls] = type(f"TrAct{cls.__name__}", (TrActLayer, cls), namespace)
    return _CLASSES[cls]


def foreign_forward(layer: nn.Module) -> str:
    """Returns what replaced the forward of this one instance, if TrAct cannot act under it; else nothing.

    A convolution's own forward, captured by whoever, still calls `_conv_forward`, and what accelerate's hooks captured can
    be exchanged. A forward that another library wrapped around `nn.Linear`'s cannot be reached.
    """
    forward = vars(layer).get("forward")
    if forward is None or is_own_forward(layer, forward) or "_old_forward" in vars(layer):
        return ""
    if _has_torchs_conv_forward(original_class(type(layer))):
        return ""
    return getattr(forward, "__qualname__", None) or repr(forward)


def attach(layer: nn.Module, config: TrActConfig, process_group: Any = None) -> None:
    """Gives `layer` TrAct; where it has it already, these settings, which hold for the whole of the step it is in."""
    preconditioner = preconditioner_of(layer)
    if preconditioner is not None:
        preconditioner.config, preconditioner.process_group = config, process_group
        return
    layer.__dict__[PRECONDITIONER] = LayerPreconditioner(layer, config, process_group)
    swap_class(layer, _tract_class(type(layer)))


def detach(layer: nn.Module) -> None:
    """Makes `layer` what it was before `attach`; an ordinary one stays as it is.

    A backward that is still to come hands on the ordinary gradient.
    """
    if isinstance(layer, TrActLayer):
        swap_class(layer, original_class(type(layer)))
        layer.__dict__.pop(PRECONDITIONER).active = False
