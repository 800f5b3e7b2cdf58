"""Which patches an operation or a layer reads: the one table of operations, and the one mode that sees them run.

Shape letters as in `moments`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from hf_tract.core.moments import PatchSpec


def _linear_window(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> PatchSpec:
    return PatchSpec()


def _conv_window(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> PatchSpec:
    kernel = tuple(weight.shape[2:])
    dilations = _per_dimension(dilation, len(kernel))
    if padding == "same":  # the odd zero goes behind, as in torch
        total = [d * (k - 1) for k, d in zip(kernel, dilations, strict=True)]
        pads = [side for t in total for side in (t // 2, t - t // 2)]
    else:
        each = _per_dimension(0 if isinstance(padding, str) else padding, len(kernel))
        pads = [side for side in each for _ in range(2)]
    return PatchSpec(kernel, _per_dimension(stride, len(kernel)), tuple(pads), dilations, groups)


def _per_dimension(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


CONV_OPS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: torch.conv1d,
    nn.Conv2d: torch.conv2d,
    nn.Conv3d: torch.conv3d,
}
PATCH_OPS: dict[Callable[..., Tensor], Callable[..., PatchSpec]] = {
    F.linear: _linear_window,
    **dict.fromkeys(CONV_OPS.values(), _conv_window),
}


class PatchOpMode(TorchFunctionMode):
    """Sees every operation of `PATCH_OPS` that runs inside."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs `func`, or has `run_op` run it."""
        kwargs = kwargs or {}
        return self.run_op(func, *args, **kwargs) if func in PATCH_OPS else func(*args, **kwargs)

    def run_op(self, op: Callable[..., Tensor], input: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs `op`, and does what a subclass is for; the arguments have torch's names."""
        raise NotImplementedError


def fits(x: Tensor, weight: Tensor, spec: PatchSpec) -> bool:
    """Says whether the operation can read `x` at all."""
    if not spec.kernel:
        return x.dim() > 0 and x.shape[-1] == weight.shape[-1]
    dims = len(spec.kernel)
    return x.dim() in (dims + 1, dims + 2) and x.shape[-dims - 1] == weight.shape[1] * spec.groups


def is_supported(layer: nn.Module) -> bool:
    """Says whether `layer` is a convolution or linear layer whose weight is made of real numbers."""
    if not isinstance(layer, (nn.Linear, *CONV_OPS)):
        return False
    if parametrize.is_parametrized(layer, "weight"):  # to read it may change buffers, as spectral norm's
        return all(original.is_floating_point() for original in layer.parametrizations["weight"].parameters())  # type: ignore[index, union-attr]
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and weight.is_floating_point() and not isinstance(weight, UninitializedParameter)


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
