"""The ordinary gradient of a weight in float32, from the 16-bit numbers that its operation read and gave.

Shape letters as in `moments`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_tract.core.moments import MEMORY_LIMIT, last_dimension_first
from hf_tract.core.patches import PatchSpec


def weight_grad(x: Tensor, output_grad: Tensor, spec: PatchSpec, like: Tensor) -> Tensor:
    """Returns the sum over all patches p of (gradient of the output there) p^T.

    Autocast must be off. What is converted to float32 at a time is bounded.

    Args:
        x: what the operation read: a convolution's (N, c, *size) or (c, *size), a linear layer's (..., n).
        output_grad: of the operation's output.
        spec: the patches.
        like: of the gradient's shape.

    Returns:
        (m, ...), float32.
    """
    total = torch.zeros_like(like, dtype=torch.float32)
    if not spec.kernel:
        x, output_grad = x.reshape(-1, x.shape[-1]), output_grad.reshape(-1, output_grad.shape[-1])
    elif x.dim() < len(spec.kernel) + 2:
        x, output_grad = x.unsqueeze(0), output_grad.unsqueeze(0)
    if not len(x):
        return total
    bytes_each = 4 * (x[0].numel() + output_grad[0].numel())
    pieces = max(1, MEMORY_LIMIT // bytes_each)
    for part, part_grad in zip(x.split(pieces), output_grad.split(pieces), strict=True):
        if not spec.kernel:
            _add_product(total, part_grad.mT, part)
        elif _is_side_by_side(spec):
            _add_product(total.flatten(1), part_grad.transpose(0, 1).flatten(1), _patch_rows(part, spec))
        else:
            total += _convolution(part.float(), part_grad.float(), spec, total)
    return total


def _is_side_by_side(spec: PatchSpec) -> bool:
    """Says whether patches neither overlap nor leave a pixel between them, so that they are the pixels in another order."""
    return spec.kernel == spec.stride and spec.groups == 1 and not any(spec.padding) and set(spec.dilation) == {1}


def _patch_rows(x: Tensor, spec: PatchSpec) -> Tensor:
    """Returns the patches of (N, c, *size) that lie side by side, as (b, n)."""
    dims = len(spec.kernel)
    for dim, (size, count) in enumerate(zip(spec.kernel, spec.output_size(x.shape[2:]), strict=True)):
        x = x.narrow(2 + 2 * dim, 0, size * count).unflatten(2 + 2 * dim, (count, size))  # (N, c, o, k, o, k, ...)
    positions, kernel = range(2, 2 + 2 * dims, 2), range(3, 3 + 2 * dims, 2)
    return x.permute(0, *positions, 1, *kernel).flatten(0, dims).flatten(1)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds `left` @ `right` in float32: on a GPU tensor cores multiply 16-bit numbers exactly and sum in float32."""
    if total.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        total += torch.mm(left, right, out_dtype=torch.float32)
    else:
        total.addmm_(left.float(), right.float())


def _convolution(x: Tensor, output_grad: Tensor, spec: PatchSpec, weight: Tensor) -> Tensor:
    dims = len(spec.kernel)
    before, after = spec.padding[::2], spec.padding[1::2]
    if before != after:
        x = F.pad(x, last_dimension_first(spec.padding))
        before = (0,) * dims
    mask = (False, True, False)
    grads = torch.ops.aten.convolution_backward(
        output_grad, x, weight, None, spec.stride, before, spec.dilation, False, (0,) * dims, spec.groups, mask
    )
    grad: Tensor = grads[1]
    return grad
