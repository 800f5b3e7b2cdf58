"""The float32 gradient of a 16-bit operation's weight, from the very numbers that it read and gave."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from benchmarks.common.timing import peak_bytes
from helpers.oracle import assert_close, expected
from helpers.strategies import cases
from hf_tract import apply_tract
from hf_tract.core.moments import CPU_MEMORY_LIMIT
from hf_tract.core.patches import PatchSpec
from hf_tract.core.weight_grad import differentiable_weight_grad, weight_grad


def double_gradient(layer: nn.Module, x: torch.Tensor, output_grad: torch.Tensor) -> torch.Tensor:
    exact = layer.double()
    exact.zero_grad()
    exact(x.double()).backward(output_grad.double())
    return exact.weight.grad


def spec_of(layer: nn.Module) -> PatchSpec:
    if isinstance(layer, nn.Linear):
        return PatchSpec()
    if isinstance(layer.padding, str):
        zeros = layer.padding == "valid"
        spans = [d * (k - 1) for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        padding = [p for span in spans for p in ((0, 0) if zeros else (span // 2, span - span // 2))]
    else:
        padding = [p for each in layer.padding for p in (each, each)]
    return PatchSpec(layer.kernel_size, layer.stride, tuple(padding), layer.dilation, layer.groups)


def conv() -> nn.Conv2d:
    return nn.Conv2d(3, 4, 3, 2)


def keep_all():
    return create_selective_checkpoint_contexts(lambda *_, **__: CheckpointPolicy.MUST_SAVE)


def check(layer: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> None:
    x = x.to(dtype)
    with torch.no_grad():
        output_grad = torch.randn_like(layer.float()(x.float())).to(dtype)
    got = weight_grad(x, output_grad, spec_of(layer), torch.empty_like(layer.weight, dtype=torch.float32))
    assert got.dtype == torch.float32
    assert_close(got, double_gradient(layer, x, output_grad), 1e-5)


@settings(max_examples=100)
@given(cases(torch.float32), st.sampled_from([torch.bfloat16, torch.float16]))
def test_is_the_exact_gradient_for_every_layer(case, dtype):
    if getattr(case.layer, "padding_mode", "zeros") != "zeros":
        case.layer.padding_mode = "zeros"
    check(case.layer, case.x, dtype)


@settings(max_examples=50)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(0, 3), st.booleans())
def test_is_the_exact_gradient_for_patches_side_by_side(dims, side, channels, images, rest, last):
    """Also where the kernel leaves the last pixels out."""
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](channels, 4, side, side)
    x = torch.randn(images, channels, *[3 * side + min(rest, side - 1)] * dims)
    if last and dims == 2 and channels > 1:
        x = x.to(memory_format=torch.channels_last)
    check(layer, x, torch.bfloat16)


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (3, 8, 8)])
def test_no_image_and_no_batch_dimension_are_allowed(shape):
    layer = nn.Conv2d(3, 4, 4, 4)
    if shape[0]:
        check(layer, torch.randn(shape), torch.bfloat16)
    else:
        empty = torch.empty(shape, dtype=torch.bfloat16)
        out = torch.empty(0, 4, 2, 2, dtype=torch.bfloat16)
        assert not weight_grad(empty, out, spec_of(layer), layer.weight.detach()).any()


@pytest.mark.parametrize("layer, shape", [(nn.Linear(6, 4), (6,)), (nn.Linear(6, 4), (2, 5, 6)), (conv(), (3, 8, 8))])
def test_the_differentiable_gradient_is_the_same(layer, shape):
    x, like = torch.randn(shape).bfloat16(), torch.empty_like(layer.weight)
    with torch.no_grad():
        output_grad = torch.randn_like(layer(x.float())).bfloat16()
    got = differentiable_weight_grad(x, output_grad, spec_of(layer), like)
    assert_close(got, weight_grad(x, output_grad, spec_of(layer), like), 1e-6)


def test_a_gradient_to_be_differentiated_is_float32_inside_autocast_too():
    layer, x = nn.Linear(6, 4), torch.randn(50, 6)
    apply_tract(layer, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        (wanted,) = torch.autograd.grad(layer(x).float().square().sum(), layer.weight)
        (got,) = torch.autograd.grad(layer(x).float().square().sum(), layer.weight, create_graph=True)
    assert_close(got, wanted, 1e-6)


def test_16_bit_pixels_of_another_type_are_those_that_autocast_reads():
    layer, x = nn.Conv2d(3, 4, 4, 4), torch.randn(8, 3, 16, 16).half()
    plain = copy.deepcopy(layer)
    apply_tract(layer, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    output_grad = torch.randn_like(out)
    out.backward(output_grad)
    read = x.bfloat16()
    wanted = expected(double_gradient(plain, read, output_grad), read, plain, 0.1)
    assert_close(layer.weight.grad, wanted, 1e-5)


@pytest.mark.parametrize("pixels_have_gradients", [True, False])
@pytest.mark.parametrize("layer, shape", [(nn.Linear(6, 4), (2, 5, 6)), (conv(), (2, 3, 8, 8))])
def test_a_selective_checkpoint_keeps_a_16_bit_output(layer, shape, pixels_have_gradients):
    """It refuses an output that is marked as modified in place."""
    layer = copy.deepcopy(layer)
    apply_tract(layer, 0.1)
    x = torch.randn(shape).bfloat16().requires_grad_(pixels_have_gradients)
    grads = []
    for options in ({}, {"context_fn": keep_all}):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = checkpoint(lambda part: layer(part).tanh(), x, use_reentrant=False, **options)
        out.float().square().sum().backward()
        grads.append(layer.weight.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("layer, size", [(conv(), 64), (nn.Conv2d(3, 4, 4, 4), 128)])
def test_a_cpu_converts_a_piece_at_a_time(layer, size):
    """Small pieces stay in its cache, too."""
    x = torch.randn(400, 3, size, size).bfloat16()
    with torch.no_grad():
        output_grad = layer(x.float()).bfloat16()
    like = torch.empty_like(layer.weight)
    peak = peak_bytes(lambda: weight_grad(x, output_grad, spec_of(layer), like), x.device)
    assert peak <= 2.5 * CPU_MEMORY_LIMIT


class ConvolutionBackwards(TorchDispatchMode):
    """Notes of which arguments each backward of a convolution computes the gradient: input, weight, bias."""

    def __init__(self) -> None:
        super().__init__()
        self.output_masks = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default and args[0].dtype == torch.bfloat16:
            self.output_masks.append(list(args[-1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_pixels", [True, False])
def test_a_16_bit_convolution_computes_no_rounded_weight_gradient_for_nobody(is_pixels):
    layer = nn.Conv2d(3, 4, 3, 2)
    apply_tract(layer, 0.1)
    x = torch.randn(2, 3, 9, 9, requires_grad=not is_pixels)
    with ConvolutionBackwards() as seen:
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        out.float().square().sum().backward()
    # If the input has a gradient, second derivatives may need the operation's own.
    assert seen.output_masks == [[not is_pixels, not is_pixels, True]]
