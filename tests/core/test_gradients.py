"""The rule itself: every layer type and option against the dense oracle and the paper's own code."""

import copy

import pytest
import torch
import torch_tract
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers import oracle
from helpers.oracle import assert_close, expected
from helpers.strategies import cases
from hf_tract import apply_tract


def run(layer: nn.Module, x: torch.Tensor, weights: torch.Tensor | None = None):
    """Output and the gradients of weight, bias and input of a loss that is a mean over everything."""
    layer.zero_grad()
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y) if weights is None else weights
    (y * weights).sum().div(len(x)).backward()
    return y.detach(), layer.weight.grad, None if layer.bias is None else layer.bias.grad, x.grad


def check(case, tolerance: float, scope: str) -> None:
    plain = copy.deepcopy(case.layer)
    y, grad, bias, x_grad = run(plain, case.x)
    with apply_tract(case.layer, case.lam, scope=scope):
        y_tract, grad_tract, bias_tract, x_grad_tract = run(case.layer, case.x)
    assert torch.equal(y, y_tract)
    assert torch.equal(x_grad, x_grad_tract)
    assert (bias is None and bias_tract is None) or torch.equal(bias, bias_tract)
    assert grad_tract.dtype == grad.dtype
    assert_close(grad_tract, expected(grad, case.x, plain, case.lam), tolerance)


@settings(max_examples=200)
@given(cases(torch.float64), st.sampled_from(["global", "local"]))
def test_the_gradient_is_the_formulas_in_float64(case, scope):
    check(case, 1e-10, scope)


@settings(max_examples=200)
@given(cases(torch.float32, min_lam=0.1), st.sampled_from(["global", "local"]))
def test_the_gradient_is_the_formulas_in_float32(case, scope):
    # Rounding is enlarged by the condition number, which is in the hundreds for a single long patch.
    largest = torch.linalg.eigvalsh(oracle.moment(case.x, case.layer)).max().item()
    condition = 1 + largest / case.lam
    check(case, max(1e-5, 4 * torch.finfo(torch.float32).eps * condition), scope)


@given(cases(torch.float32, min_lam=0.1), st.sampled_from([torch.bfloat16, torch.float16]))
def test_low_precision_weights_get_a_gradient_that_is_rounded_once(case, dtype):
    """Everything is float32 but what the operation reads and gives: the result is rounded once, at its end."""
    layer, x = case.layer.to(dtype), case.x.to(dtype)
    exact = copy.deepcopy(layer).double()
    weights = torch.randn(exact(x.double()).shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    y, _, bias, x_grad = run(layer, x, weights)
    output_grad = torch.ones((), dtype=dtype).div(len(x)) * weights  # as the loss rounds it; parts of it may cancel
    wanted = expected(run(exact, x.double(), output_grad.double() * len(x))[1], x, exact, case.lam)
    with apply_tract(layer, case.lam):
        y_tract, grad, bias_tract, x_grad_tract = run(layer, x, weights)
    assert torch.equal(y, y_tract)
    assert torch.equal(x_grad, x_grad_tract)
    assert bias is None or torch.equal(bias, bias_tract)
    assert grad.dtype == dtype
    assert_close(grad, wanted, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Linear(12, 5), (40, 12)),
        (nn.Linear(12, 5), (4, 9, 12)),
        (nn.Linear(12, 5), (6, 12)),  # fewer patches than n: the paper's code inverts a b x b matrix there
        (nn.Conv2d(3, 8, 4, stride=4), (6, 3, 16, 16)),
        (nn.Conv2d(3, 8, 3, padding=1), (3, 3, 8, 8)),
        (nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False), (2, 3, 32, 32)),
    ],
)
def test_equals_the_papers_own_code(layer, shape):
    x = torch.randn(shape)
    theirs = torch_tract.TrAct(copy.deepcopy(layer), l=0.1)
    weights = torch.randn_like(layer(x))
    (theirs(x) * weights).mean().backward()
    apply_tract(layer, lam=0.1)
    (layer(x) * weights).mean().backward()
    assert_close(layer.weight.grad, theirs.weight.grad, 1e-5)


def test_a_non_contiguous_input_has_the_rule():
    layer, x = nn.Linear(6, 4), torch.randn(6, 5, 3).transpose(0, 2)
    assert not x.is_contiguous()
    plain = copy.deepcopy(layer)
    grad = run(plain, x)[1]
    apply_tract(layer, lam=0.1)
    assert_close(run(layer, x)[1], expected(grad, x, plain, 0.1), 1e-5)


def test_several_layers_are_preconditioned_each_by_its_own_moment():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    plain = copy.deepcopy(model)
    x = torch.randn(20, 6)
    for net in (plain, model):
        if net is model:
            apply_tract(model, lam=0.2, layers="*")
        net(x).square().mean().backward()
    assert_close(model[0].weight.grad, expected(plain[0].weight.grad, x, plain[0], 0.2), 1e-5)
    hidden = plain[1](plain[0](x))
    assert_close(model[2].weight.grad, expected(plain[2].weight.grad, hidden, plain[2], 0.2), 1e-5)


def test_a_gradient_penalty_on_the_input_goes_through():
    """Double backward through the layer reaches the weight once, preconditioned once."""
    layer = nn.Conv2d(3, 4, 3).double()
    plain, x = copy.deepcopy(layer), torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    for net in (plain, layer):
        if net is layer:
            apply_tract(layer, lam=0.1)
        (slope,) = torch.autograd.grad(net(x).tanh().sum(), x, create_graph=True)
        slope.square().sum().backward(inputs=[net.weight])
    assert_close(layer.weight.grad, expected(plain.weight.grad, x.detach(), plain, 0.1), 1e-10)


def test_the_oracle_is_not_the_identity():
    layer, x = nn.Linear(6, 4).double(), torch.randn(30, 6, dtype=torch.float64)
    grad = run(layer, x)[1]
    assert (oracle.expected(grad, x, layer, 0.1) - grad).norm() > 0.05 * grad.norm()
