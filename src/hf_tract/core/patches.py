"""Holds the table of the operations that TrAct supports, the patches that each reads, and a mode that intercepts them.

Shape letters as in core/README.md.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode


class PatchSpec(NamedTuple):
    """Describes how an operation cuts its input into patches; `kernel == ()` stands for a linear layer.

    `padding` holds the number of zeros before and after each dimension: (top, bottom, left, right) in 2-D.
    """

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @property
    def extent(self) -> tuple[int, ...]:
        """Return how many input positions one patch spans along each dimension, including the gaps of its dilation."""
        dims = zip(self.kernel, self.dilation, strict=True)
        return tuple(d * (k - 1) + 1 for k, d in dims)

    def output_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Return the number of output positions along each dimension, for an input of spatial size `size`."""
        positions = []
        for dim, extent in enumerate(self.extent):
            before, after = self.padding[2 * dim : 2 * dim + 2]
            free = size[dim] + before + after - extent
            positions.append(max(0, free // self.stride[dim] + 1))
        return tuple(positions)

    def patch_size(self, shape: Sequence[int]) -> int:
        """Return n, the number of entries of one patch, for an input of this shape."""
        if not self.kernel:
            return shape[-1]
        channels = shape[-len(self.kernel) - 1]
        return channels // self.groups * math.prod(self.kernel)


def _linear_patches(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> PatchSpec:
    return PatchSpec()


def _conv_patches(  # noqa: PLR0913 the signature is torch's
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> PatchSpec:
    kernel = tuple(weight.shape[2:])
    dims = len(kernel)
    strides = _per_dimension(stride, dims)
    dilations = _per_dimension(dilation, dims)
    zeros = _zeros_around(padding, kernel, dilations)
    return PatchSpec(kernel, strides, zeros, dilations, groups)


def _zeros_around(
    padding: str | int | Sequence[int],
    kernel: tuple[int, ...],
    dilations: tuple[int, ...],
) -> tuple[int, ...]:
    """Convert the `padding` argument of a convolution into that of a `PatchSpec`."""
    if padding == "valid":
        padding = 0
    zeros: list[int] = []
    if isinstance(padding, str):
        for k, d in zip(kernel, dilations, strict=True):
            total = d * (k - 1)
            # For "same" the odd zero goes to the end, as in torch.
            zeros += [total // 2, total - total // 2]
    else:
        for each in _per_dimension(padding, len(kernel)):
            zeros += [each, each]
    return tuple(zeros)


def _per_dimension(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * dims
    values = tuple(value)
    if len(values) == 1:
        return values * dims
    return values


# Libraries replace `F.linear`: DeepSpeed's ZeRO-3 does so for the whole process.
LINEAR: Callable[..., Tensor] = torch._C._nn.linear
CONV_OPS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: torch.conv1d,
    nn.Conv2d: torch.conv2d,
    nn.Conv3d: torch.conv3d,
}
PATCH_OPS: dict[Callable[..., Tensor], Callable[..., PatchSpec]] = {
    LINEAR: _linear_patches,
    torch.conv1d: _conv_patches,
    torch.conv2d: _conv_patches,
    torch.conv3d: _conv_patches,
}


class PatchOpMode(TorchFunctionMode):
    """Passes every operation of `PATCH_OPS` that runs inside this context to `run_op`.

    It is to be entered in `torchs_linear()`, which is not its own `__enter__`: inside of a mode that has one,
    torch.compile cannot go on after a graph break.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, by `run_op` if it is in `PATCH_OPS`."""
        kwargs = kwargs or {}
        if func in PATCH_OPS:
            return self.run_op(func, *args, **kwargs)
        return func(*args, **kwargs)

    def run_op(self, op: Callable[..., Tensor], input: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        """Run `op`, with whatever a subclass does around it; the arguments are named as in torch."""
        raise NotImplementedError


def _always(weight: Any) -> bool:
    return True


def torchs_linear(wants: Callable[[Any], bool] = _always) -> contextlib.AbstractContextManager[None]:
    """Return a context in which `F.linear` is torch's own for the weights that are wanted.

    No mode sees what a library's may run instead.
    """
    if F.linear is LINEAR:
        return contextlib.nullcontext()
    return _linear_put_back(wants)


@contextlib.contextmanager
def _linear_put_back(wants: Callable[[Any], bool]) -> Iterator[None]:
    replaced = F.linear

    def linear(input: Any, weight: Any, bias: Any = None) -> Any:
        op = LINEAR if wants(weight) else replaced
        return op(input, weight, bias)

    F.linear = linear
    try:
        yield
    finally:
        F.linear = replaced


def is_supported(layer: nn.Module) -> bool:
    """Return whether `layer` is a convolution or linear layer whose weight holds real floating-point numbers."""
    if not isinstance(layer, (nn.Linear, *CONV_OPS)):
        return False
    if parametrize.is_parametrized(layer, "weight"):
        # Reading the computed weight may change buffers, as in spectral norm; the parameters behind it are checked.
        originals = layer.parametrizations["weight"].parameters()  # type: ignore[index, union-attr]
        return all(original.is_floating_point() for original in originals)
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or isinstance(weight, UninitializedParameter):
        return False
    return weight.is_floating_point()


def patch_size(layer: nn.Module) -> int:
    """Return n of a supported layer, the columns of its flattened weight.

    It comes from the layer's settings, since the shape of a sharded weight differs.
    """
    if isinstance(layer, nn.Linear):
        # Some models compute it as a tensor.
        return int(layer.in_features)
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return layer.in_channels // layer.groups * math.prod(layer.kernel_size)


def groups_of(layer: nn.Module) -> int:
    """Return the groups of a supported layer; 1 for a linear one."""
    groups: int = getattr(layer, "groups", 1)
    return groups


def out_features(layer: nn.Module) -> int:
    """Return m of a supported layer, the rows of its weight."""
    if isinstance(layer, nn.Linear):
        return int(layer.out_features)
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return layer.out_channels


def has_torchs_conv_forward(cls: Any) -> bool:
    """Return whether a class runs a convolution by torch's own methods."""
    kind: Any
    for kind in CONV_OPS:
        if issubclass(cls, kind):
            return cls.forward is kind.forward and cls._conv_forward is kind._conv_forward
    return False
