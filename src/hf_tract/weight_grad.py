"""The ordinary gradient of a weight in float32, from the 16-bit numbers that its operation read and gave.

Shape letters as in `moments`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_tract.moments import SCRATCH_BYTES, Window, last_dimension_first


def weight_grad(x: Tensor, output_grad: Tensor, window: Window, like: Tensor) -> Tensor:
    """Returns the sum over all patches p of (gradient of the output there) p^T.

    Autocast must be off. What is converted to float32 at a time is bounded.

    Args:
        x: what the operation read: a convolution's (N, c, *size) or (c, *size), a linear layer's (..., n).
        output_grad: of the operation's output.
        window: the patches.
        like: of the gradient's shape.

    Returns:
        (m, ...), float32.
    """
    total = torch.zeros_like(like, dtype=torch.float32)
    if not window.kernel:
        x, output_grad = x.reshape(-1, x.shape[-1]), output_grad.reshape(-1, output_grad.shape[-1])
    elif x.dim() < len(window.kernel) + 2:
        x, output_grad = x.unsqueeze(0), output_grad.unsqueeze(0)
    if not len(x):
        return total
    bytes_each = 4 * (x[0].numel() + output_grad[0].numel())
    pieces = max(1, SCRATCH_BYTES // bytes_each)
    for part, part_grad in zip(x.split(pieces), output_grad.split(pieces), strict=True):
        if window.kernel:
            total += _convolution(part.float(), part_grad.float(), window, total)
        else:
            total.addmm_(part_grad.float().mT, part.float())
    return total


def _convolution(x: Tensor, output_grad: Tensor, window: Window, weight: Tensor) -> Tensor:
    dims = len(window.kernel)
    before, after = window.padding[::2], window.padding[1::2]
    if before != after:
        x = F.pad(x, last_dimension_first(window.padding))
        before = (0,) * dims
    mask = (False, True, False)
    grads = torch.ops.aten.convolution_backward(
        output_grad, x, weight, None, window.stride, before, window.dilation, False, (0,) * dims, window.groups, mask
    )
    grad: Tensor = grads[1]
    return grad
