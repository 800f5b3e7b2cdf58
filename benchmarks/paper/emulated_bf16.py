"""Emulates bfloat16 products on CPUs that have none: in float32, of bfloat16 numbers, rounded to bfloat16 at the end.

That is what a GPU's tensor cores give. torch's own CPU kernels for bfloat16 are several times slower where the
processor has no instructions for it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

ATEN = torch.ops.aten
PRODUCTS = (
    ATEN.mm.default,
    ATEN.addmm.default,
    ATEN.bmm.default,
    ATEN.baddbmm.default,
    ATEN.convolution.default,
    ATEN.convolution_backward.default,
    ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default,
)


class EmulatedBF16(TorchDispatchMode):
    """Runs every product of bfloat16 numbers inside in that way, forward and backward."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`."""
        kwargs = kwargs or {}
        if func not in PRODUCTS or not any(_is(arg, torch.bfloat16) for arg in args):
            return func(*args, **kwargs)
        out = func(*tree_map(_to_float32, args), **kwargs)
        return tree_map(_to_bfloat16, out)


def _to_float32(value: Any) -> Any:
    if _is(value, torch.bfloat16):
        return value.float()
    return value


def _to_bfloat16(value: Any) -> Any:
    if _is(value, torch.float32):
        return value.bfloat16()
    return value


def _is(value: Any, dtype: torch.dtype) -> bool:
    return isinstance(value, Tensor) and value.dtype == dtype
