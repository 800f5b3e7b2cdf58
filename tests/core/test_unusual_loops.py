"""Works with: optimizers that call closures, step inside of a backward, or need the gradients of several losses."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.oracle import assert_close, expected
from hf_tract import apply_tract

LAM = 0.1


class Problem:
    """A small model with TrAct, its batch, and what `.grad` of the first weight ought to be at its present weights."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(), nn.ReLU(), nn.Linear(32, 5)).double()
        self.plain = copy.deepcopy(self.model)
        self.pixels = torch.randn(16, 3, 8, 8).double()
        self.labels = torch.randint(0, 5, (16,))
        apply_tract(self.model, lam=LAM)

    @property
    def weight(self) -> Tensor:
        return self.model[0].weight

    def loss(self, model: nn.Module | None = None) -> Tensor:
        return F.cross_entropy((model or self.model)(self.pixels), self.labels)

    def other_loss(self, model: nn.Module | None = None) -> Tensor:
        return (model or self.model)(self.pixels).square().mean()

    def wanted(self, loss=loss) -> Tensor:
        self.plain.load_state_dict(self.model.state_dict())
        self.plain.zero_grad()
        loss(self, self.plain).backward()
        return expected(self.plain[0].weight.grad, self.pixels, self.plain[0], LAM)

    def sgd(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=0.1)


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("make", [torch.optim.LBFGS, torch.optim.SGD])
def test_each_call_of_a_closure_is_a_step_of_its_own(make, to_none):
    problem = Problem()
    optimizer = make(problem.model.parameters(), lr=0.1)
    calls = []

    def closure():
        optimizer.zero_grad(set_to_none=to_none)
        loss = problem.loss()
        loss.backward()
        assert_close(problem.weight.grad, problem.wanted(), 1e-9)
        calls.append(loss.item())
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert calls[-1] < calls[0]


def test_sharpness_aware_minimisation_preconditions_both_of_its_gradients():
    problem = Problem()
    optimizer = problem.sgd()
    for _ in range(3):
        wanted = problem.wanted()
        problem.loss().backward()
        assert_close(problem.weight.grad, wanted, 1e-9)
        ascent = [0.05 * parameter.grad for parameter in problem.model.parameters()]
        _move(problem.model, ascent, 1)
        optimizer.zero_grad()
        problem.loss().backward()
        assert_close(problem.weight.grad, problem.wanted(), 1e-9)
        _move(problem.model, ascent, -1)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def _move(model: nn.Module, directions: list[Tensor], sign: int) -> None:
    for parameter, direction in zip(model.parameters(), directions, strict=True):
        parameter.add_(direction, alpha=sign)


def test_an_optimizer_may_step_inside_of_the_backward():
    """As LOMO, layer-wise GaLore and others do, which never hold all gradients at once."""
    problem = Problem()
    optimizers = {parameter: torch.optim.SGD([parameter], lr=1.0) for parameter in problem.model.parameters()}

    def step(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        before, wanted = problem.weight.detach().clone(), problem.wanted()
        problem.loss().backward()
        assert_close(before - problem.weight, wanted, 1e-9)


def test_losses_may_have_their_gradients_apart():
    """As gradient surgery (PCGrad) has them: one forward, a backward for each loss, and what is made of them."""
    problem = Problem()
    optimizer = problem.sgd()
    for _ in range(3):
        output = problem.model(problem.pixels)
        parts = []
        for loss, kind in (
            (F.cross_entropy(output, problem.labels), Problem.loss),
            (output.square().mean(), Problem.other_loss),
        ):
            optimizer.zero_grad()
            loss.backward(retain_graph=True)
            assert_close(problem.weight.grad, problem.wanted(kind), 1e-9)
            parts.append([parameter.grad.clone() for parameter in problem.model.parameters()])
        for parameter, one, other in zip(problem.model.parameters(), *parts, strict=True):
            parameter.grad = one + other
        optimizer.step()
        optimizer.zero_grad()


def test_a_fake_quantised_weight_has_the_gradient_of_what_the_operation_reads():
    """Quantisation-aware training: the rule holds for the rounded weight, and the rounding's own gradient follows."""
    problem = Problem()
    for model in (problem.model, problem.plain):
        nn.utils.parametrize.register_parametrization(model[0], "weight", _Rounded())
    weight = problem.model[0].parametrizations.weight.original
    apply_tract(problem.model, lam=LAM)
    problem.loss().backward()
    rounded = problem.plain[0].weight.detach().requires_grad_()
    layer = problem.plain[0]
    F.cross_entropy(
        problem.plain[1:](F.conv2d(problem.pixels, rounded, layer.bias, layer.stride)), problem.labels
    ).backward()
    wanted = expected(rounded.grad, problem.pixels, layer, LAM)
    assert_close(weight.grad, wanted * (weight.abs() < _Rounded.largest), 1e-9)
    assert (weight.grad == 0).any()


class _Rounded(nn.Module):
    """Rounds to steps, and clips to a range outside of which no gradient comes through."""

    largest = 0.12

    def forward(self, weight: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(weight, self.largest / 7.5, 0, -7, 7)
