"""Computes dense float64 references, without the library's own patch code."""

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVS = {1: (nn.Conv1d, F.conv1d), 2: (nn.Conv2d, F.conv2d), 3: (nn.Conv3d, F.conv3d)}


def patches(x: Tensor, layer: nn.Module) -> Tensor:
    """Returns the patch matrix (g, b, n) in float64; a convolution by one-hot kernels reads each patch's entries."""
    x = x.double()
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, layer.in_features)
    dims = len(layer.kernel_size)
    n = layer.in_channels // layer.groups * math.prod(layer.kernel_size)
    one_hot = torch.eye(n, dtype=torch.float64).view(n, -1, *layer.kernel_size).repeat(layer.groups, *[1] * (dims + 1))
    padding = layer.padding
    if layer.padding_mode != "zeros":
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
    x = x if x.dim() == dims + 2 else x[None]
    entries = CONVS[dims][1](x, one_hot, None, layer.stride, padding, layer.dilation, layer.groups)
    return entries.unflatten(1, (layer.groups, n)).movedim(2, -1).movedim(1, 0).reshape(layer.groups, -1, n)


def moment(x: Tensor | list[Tensor], layer: nn.Module) -> Tensor:
    """Returns C = (1/b) sum of p p^T, (g, n, n), over the patches of all inputs."""
    p = torch.cat([patches(part, layer) for part in (x if isinstance(x, list) else [x])], dim=1)
    return p.mT @ p / p.shape[1]


def precondition(grad: Tensor, c: Tensor, lam: float) -> Tensor:
    """Returns grad inv(C + lam I), by an explicit inverse, in float64."""
    rows = grad.double().reshape(len(c), -1, c.shape[-1])
    return (rows @ torch.linalg.inv(c + lam * torch.eye(c.shape[-1], dtype=torch.float64))).reshape(grad.shape)


def expected(grad: Tensor, x: Tensor | list[Tensor], layer: nn.Module, lam: float) -> Tensor:
    """Returns the gradient that TrAct hands on for the ordinary gradient of `layer` on `x`."""
    return precondition(grad, moment(x, layer), lam)


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Compares relative to the norm; the message has the ratio of norms, in which a wrong scale shows at once."""
    got, want = got.detach().double(), want.detach().double()
    error = (got - want).norm() / want.norm().clamp(min=1e-300)
    assert error <= tolerance, (
        f"relative error {error:.2e} > {tolerance:.0e}; norms {got.norm() / want.norm():.6f} : 1"
    )


def says(*parts: str) -> str:
    """Returns a `match=` pattern for an error's text: these parts, in this order."""
    return "(?s)" + ".*".join(re.escape(part) for part in parts)
