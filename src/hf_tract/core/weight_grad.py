"""Computes the ordinary gradient of a weight in float32, from the input and output gradient of a 16-bit operation.

Shape letters as in core/README.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_tract.core.moments import CPU_MEMORY_LIMIT, MEMORY_LIMIT
from hf_tract.core.patches import PatchSpec
from hf_tract.core.pieces import as_images, factor_dtype, long_product, pad_argument, patch_rows


def weight_grad(x: Tensor, output_grad: Tensor, spec: PatchSpec, like: Tensor) -> Tensor:
    """Return the sum over all patches p of (gradient of the output at p) p^T.

    Autocast must be off. Only a bounded part of the tensors is converted to float32 at a time.

    Args:
        x: the input of the operation: a convolution's (N, c, *size) or (c, *size), a linear layer's (..., n).
        output_grad: the gradient of the operation's output.
        spec: the patches that the operation reads from `x`.
        like: a tensor of the gradient's shape.

    Returns:
        (m, ...), float32.
    """
    x = _with_batch(x, spec)
    output_grad = _with_batch(output_grad, spec)
    if len(x) == 0:
        return torch.zeros_like(like, dtype=torch.float32)
    bytes_each = 4 * (x[0].numel() + output_grad[0].numel())
    limit = CPU_MEMORY_LIMIT if x.is_cpu else MEMORY_LIMIT
    step = max(1, limit // bytes_each)
    total: Tensor | None = None
    for part, part_grad in zip(x.split(step), output_grad.split(step), strict=True):
        if not spec.kernel or _is_side_by_side(spec):
            new = _product_of_rows(part, part_grad, spec).view(like.shape)
        else:
            new = _convolution_grad(part.float(), part_grad.float(), spec, like)
        total = new if total is None else total + new
    assert total is not None
    return total


def differentiable_weight_grad(x: Tensor, output_grad: Tensor, spec: PatchSpec, like: Tensor) -> Tensor:
    """Return what `weight_grad` returns, as a differentiable function of `output_grad` that takes more memory."""
    x = _with_batch(x.float(), spec)
    output_grad = _with_batch(output_grad.float(), spec)
    if spec.kernel:
        return _convolution_grad(x, output_grad, spec, like)
    return output_grad.mT @ x


def _with_batch(x: Tensor, spec: PatchSpec) -> Tensor:
    """Return a convolution's input or output as (N, c, *size), a linear layer's as (b, n)."""
    if spec.kernel:
        return as_images(x, spec)
    return x.reshape(-1, x.shape[-1])


def _is_side_by_side(spec: PatchSpec) -> bool:
    """Return whether patches neither overlap nor leave a pixel out: they are the pixels in another order."""
    if spec.groups > 1 or any(spec.padding):
        return False
    return spec.kernel == spec.stride and set(spec.dilation) == {1}


def _product_of_rows(x: Tensor, output_grad: Tensor, spec: PatchSpec) -> Tensor:
    """Return the weight's gradient of a linear layer or of patches side by side, (1, m, n), as one product."""
    dtype = factor_dtype(x, torch.float32)
    if spec.kernel:
        outputs = range(spec.output_size(x.shape[2:])[0])
        rows = patch_rows(x, spec, outputs, dtype)
        output_grad = output_grad.flatten(2).mT.flatten(0, 1)
    else:
        rows = x.to(dtype).unsqueeze(0)
    return long_product(output_grad.to(dtype).unsqueeze(0), rows, torch.float32)


def _convolution_grad(x: Tensor, output_grad: Tensor, spec: PatchSpec, weight: Tensor) -> Tensor:
    """Return the weight's gradient as torch computes it; only the shape and dtype of `weight` matter."""
    dims = len(spec.kernel)
    padding = spec.padding[::2]
    if padding != spec.padding[1::2]:
        # The operator takes the same padding on both sides of a dimension.
        x = F.pad(x, pad_argument(spec.padding))
        padding = (0,) * dims
    grads = torch.ops.aten.convolution_backward(
        output_grad,
        x,
        weight,
        bias_sizes=None,
        stride=spec.stride,
        padding=padding,
        dilation=spec.dilation,
        transposed=False,
        output_padding=(0,) * dims,
        groups=spec.groups,
        output_mask=(False, True, False),
    )
    grad: Tensor = grads[1]
    return grad
