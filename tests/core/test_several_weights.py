"""One layer that runs with several weights, or with parts of one: each has the rule by itself."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from helpers.oracle import assert_close
from hf_tract import apply_tract

LAM = 0.1
M, N, B = 4, 6, 50


def layer():
    torch.manual_seed(0)
    made = nn.Linear(N, M, bias=False).double()
    apply_tract(made, lam=LAM, layers=made)
    return made


def weights(count):
    return [torch.randn(M, N).double().requires_grad_() for _ in range(count)]


def batches(count):
    """Batches whose second moments differ much."""
    return [3.0**-i * torch.randn(B, N).double() for i in range(count)]


def run(made, weight, x):
    return functional_call(made, {"weight": weight}, (x,)).square().mean()


def rule(weight, *inputs):
    """The gradient of the sum of losses over these batches, times inv(C + lam I) of all of their patches."""
    leaf = weight.detach().requires_grad_()
    sum((x @ leaf.T).square().mean() for x in inputs).backward()
    x = torch.cat(inputs)
    return leaf.grad @ torch.linalg.inv(x.T @ x / len(x) + LAM * torch.eye(N).double())


def test_members_of_an_ensemble_in_one_backward_have_their_own_second_moments(recwarn):
    made, members, inputs = layer(), weights(3), batches(3)
    sum(run(made, weight, x) for weight, x in zip(members, inputs, strict=True)).backward()
    for weight, x in zip(members, inputs, strict=True):
        assert_close(weight.grad, rule(weight, x), 1e-12)
    assert not recwarn.list


@pytest.mark.parametrize("set_to_none", [True, False])
def test_weights_that_accumulate_in_turn_have_a_step_each(set_to_none):
    made, members = layer(), weights(2)
    optimizers = [torch.optim.SGD([weight], lr=0.1) for weight in members]
    for _ in range(3):
        inputs = batches(4)
        for i, x in enumerate(inputs):
            run(made, members[i % 2], x).backward()
        for i, weight in enumerate(members):
            assert_close(weight.grad, rule(weight, inputs[i], inputs[i + 2]), 1e-12)
            optimizers[i].step()
            optimizers[i].zero_grad(set_to_none=set_to_none)


def test_the_own_weight_and_another_one_in_one_backward():
    made, (twin,), (x, y) = layer(), weights(1), batches(2)
    for _ in range(2):
        (made(x).square().mean() + run(made, twin, y)).backward()
        assert_close(made.weight.grad, rule(made.weight, x), 1e-12)
        assert_close(twin.grad, rule(twin, y), 1e-12)
        made.weight.grad = twin.grad = None


def test_each_weight_of_a_hypernetwork_has_its_own_second_moment():
    made, inputs = layer(), batches(2)
    makes = nn.Linear(5, M * N, bias=False).double()
    tasks = torch.randn(2, 5).double()
    for _ in range(2):
        made_weights = [makes(task).view(M, N) for task in tasks]
        sum(run(made, weight, x) for weight, x in zip(made_weights, inputs, strict=True)).backward()
        wanted = 0
        for weight, x, task in zip(made_weights, inputs, tasks, strict=True):
            wanted = wanted + torch.outer(rule(weight, x).flatten(), task)
        assert_close(makes.weight.grad, wanted, 1e-12)
        makes.weight.grad = None


class Slimmable(nn.Linear):
    """Runs with its first outputs alone, as many as asked for."""

    def forward(self, x, width):
        return F.linear(x, self.weight[:width])


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_several_widths_in_one_step(together, set_to_none):
    torch.manual_seed(0)
    made = Slimmable(N, M, bias=False).double()
    apply_tract(made, lam=LAM, layers=made)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    for widths in ((M, 2), (2, M), (M, 2)):
        inputs = batches(2)
        losses = [made(x, width).square().mean() for x, width in zip(inputs, widths, strict=True)]
        if together:
            sum(losses).backward()
        else:
            for loss in losses:
                loss.backward()
        wanted = torch.zeros(M, N).double()
        for x, width in zip(inputs, widths, strict=True):
            wanted[:width] += rule(made.weight[:width], x)
        assert_close(made.weight.grad, wanted, 1e-12)
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)


def test_patches_of_several_sizes_in_one_step():
    """As a FlexiViT whose embedding resizes its own weight."""

    class Resized(nn.Conv2d):
        def forward(self, x, size):
            weight = F.interpolate(self.weight, (size, size), mode="bilinear")
            return F.conv2d(x, weight, None, size)

    torch.manual_seed(0)
    made = Resized(2, 3, 4, 4, bias=False).double()
    apply_tract(made, lam=LAM, layers=made)
    images = [torch.randn(4, 2, 8, 8).double() for _ in range(2)]
    for _ in range(2):
        made.weight.grad = None
        wanted = 0
        for x, size in zip(images, (4, 2), strict=True):
            made(x, size).square().mean().backward()
            weight = F.interpolate(made.weight, (size, size), mode="bilinear").detach().requires_grad_()
            F.conv2d(x, weight, None, size).square().mean().backward()
            p = F.unfold(x, size, stride=size).mT.flatten(0, 1)
            inverse = torch.linalg.inv(p.T @ p / len(p) + LAM * torch.eye(p.shape[1]).double())
            grad = (weight.grad.flatten(1) @ inverse).view_as(weight)
            wanted = (
                wanted
                + torch.autograd.grad(F.interpolate(made.weight, (size, size), mode="bilinear"), made.weight, grad)[0]
            )
        assert_close(made.weight.grad, wanted, 1e-12)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_loop_may_replace_the_gradients_between_micro_steps(set_to_none):
    made = layer()
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    for _ in range(3):
        inputs = batches(2)
        for x in inputs:
            made(x).square().mean().backward()
            made.weight.grad = torch.nan_to_num(made.weight.grad)
        assert_close(made.weight.grad, rule(made.weight, *inputs), 1e-12)
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)


def test_a_weight_that_nobody_uses_any_more_is_not_kept():
    """As the fast weights of meta-learning, which an optimizer of their own has moved."""
    made, (weight,), (x,) = layer(), weights(1), batches(1)
    run(made, weight, x).backward()
    torch.optim.SGD([weight], lr=0.1).step()
    gone = weakref.ref(weight)
    del weight
    gc.collect()
    assert gone() is None
