"""Draws layers and inputs that fit them, as hypothesis strategies."""

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import nn

from helpers.oracle import CONVS


class Case(NamedTuple):
    layer: nn.Module
    x: torch.Tensor
    lam: float


@st.composite
def cases(draw, dtype: torch.dtype, min_images: int = 1, min_lam: float = 0.02) -> Case:
    """Draws a Linear or a convolution of 1, 2 or 3 dimensions, with any of torch's options, and an input."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    lam, images, bias = draw(st.floats(min_lam, 2.0)), draw(st.integers(min_images, 5)), draw(st.booleans())
    dims = draw(st.integers(0, 3))
    if dims == 0:
        n, leading = draw(st.integers(1, 9)), draw(st.lists(st.integers(1, 4), max_size=2))
        return Case(
            nn.Linear(n, draw(st.integers(1, 5)), bias=bias, dtype=dtype),
            torch.randn(images, *leading, n, dtype=dtype),
            lam,
        )

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel, stride, dilation = each(1, 5), each(1, 3), each(1, 2)
    padding = draw(st.sampled_from(["numbers", "numbers", "valid", "same"]))
    if padding == "same":
        stride = (1,) * dims
    layer = CONVS[dims][0](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        kernel,
        stride=stride,
        padding=each(0, 2) if padding == "numbers" else padding,
        dilation=dilation,
        groups=groups,
        bias=bias,
        padding_mode=draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"])),
        dtype=dtype,
    )
    # Large enough for the kernel's span, and for reflect and circular, which need more input than padding.
    size = tuple(max(5, d * (k - 1) + 1) + draw(st.integers(0, 3)) for k, d in zip(kernel, dilation, strict=True))
    x = torch.randn(images, layer.in_channels, *size, dtype=dtype)
    # torch's own convolution on the CPU reads beyond a channels-last image of one channel a group, with or without us.
    if dims in (2, 3) and layer.in_channels > groups and draw(st.booleans()):
        x = x.to(memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d)
    return Case(layer, x, lam)
