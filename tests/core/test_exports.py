"""Exports, traces, scripts and transforms see the ordinary layer, and second derivatives are those of the formula."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from helpers.oracle import assert_close, expected, moment
from hf_tract import apply_tract, remove_tract
from hf_tract.core.forward import _warned


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))
    apply_tract(net, lam=0.1)
    return net


def x(count: int = 5) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8)


def names_of(graph: torch.fx.Graph) -> str:
    return " ".join(str(node.target) for node in graph.nodes)


def test_torch_export_leaves_the_operator_out(model):
    program = torch.export.export(model, (x(2),))
    assert "hf_tract" not in names_of(program.graph)
    assert "conv2d" in names_of(program.graph)
    part = x(2)
    assert_close(program.module()(part), model(part), 1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_torch_jit_trace_and_script_leave_the_operator_out(model):
    part = x(2)
    for scripted in (torch.jit.trace(model, part), torch.jit.script(model)):
        assert "hf_tract" not in scripted.inlined_graph.str(False)  # without the names of source files
        assert_close(scripted(part), model(part), 1e-6)
        scripted(part).sum().backward()
        plain = copy.deepcopy(model)
        remove_tract(plain)
        plain(part).sum().backward()
        assert_close(model[0].weight.grad, plain[0].weight.grad, 1e-6)
        model.zero_grad()


def test_a_symbolic_trace_keeps_the_layer_whole(model):
    """torch.fx takes it for a leaf, as the ordinary one, and so it trains on with TrAct."""
    traced, part = torch.fx.symbolic_trace(model), x()
    assert [node.op for node in traced.graph.nodes] == ["placeholder", *["call_module"] * 4, "output"]
    plain = copy.deepcopy(model)
    remove_tract(plain)
    traced(part).square().sum().backward()
    plain(part).square().sum().backward()
    assert_close(model[0].weight.grad, expected(plain[0].weight.grad, part, plain[0], 0.1), 1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", ["is_grads_batched", "vmap"])
def test_several_backwards_at_once_give_ordinary_gradients_and_say_so(how, precision, caplog):
    plain = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten(), nn.Linear(16, 2))
    model = copy.deepcopy(plain)
    handle = apply_tract(model)
    x, found = torch.randn(5, 3, 8, 8), []
    for net in (plain, model):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            losses = net(x).float().square().mean(0)
        weights = list(net.parameters())
        if how == "vmap":
            rows = torch.vmap(lambda v, losses=losses, weights=weights: torch.autograd.grad(losses, weights, v))
            found.append(rows(torch.eye(2)))
        else:
            found.append(torch.autograd.grad(losses, weights, torch.eye(2), is_grads_batched=True))
    for got, wanted in zip(*found, strict=True):
        assert_close(got, wanted, 1e-2 if precision == "bfloat16" else 1e-6)
    assert handle.stats() == {}
    assert "in several backwards at once" in caplog.text


@pytest.mark.parametrize("what", ["torch.func", "forward mode"])
def test_transforms_have_the_ordinary_gradient_and_say_so_once(model, what, caplog):
    _warned.clear()
    parameters, part = dict(model.named_parameters()), x()
    plain = copy.deepcopy(model)
    remove_tract(plain)

    def loss(values, net):
        return torch.func.functional_call(net, values, (part,)).square().sum()

    with caplog.at_level(logging.WARNING, "hf_tract"):
        for _ in range(2):
            if what == "torch.func":
                got, wanted = (torch.func.grad(loss)(parameters, net)["0.weight"] for net in (model, plain))
            else:
                with forward_ad.dual_level():
                    dual = forward_ad.make_dual(part, torch.ones_like(part))
                    got, wanted = (forward_ad.unpack_dual(net(dual)).tangent for net in (model, plain))
            assert torch.equal(got, wanted)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "the first layer has its ordinary gradient" in message


def test_functional_call_with_other_weights_has_the_rule(model):
    """As in meta-learning and ensembles: the gradient goes to the weights that were given."""
    plain, part = copy.deepcopy(model), x()
    remove_tract(plain)
    for net in (model, plain):
        given = {name: (2 * value.detach()).requires_grad_() for name, value in net.named_parameters()}
        torch.func.functional_call(net, given, (part,)).square().sum().backward()
        net.given = given["0.weight"].grad
    assert_close(model.given, expected(plain.given, part, plain[0], 0.1), 1e-5)
    assert model[0].weight.grad is None


def test_functional_call_with_other_weights_of_a_frozen_layer_has_the_rule(model):
    plain, part = copy.deepcopy(model), x()
    remove_tract(plain)
    for net in (model, plain):
        net[0].requires_grad_(False)
        net.given = net[0].weight.detach().clone().requires_grad_()
        torch.func.functional_call(net, {"0.weight": net.given}, (part,)).square().sum().backward()
    assert_close(model.given.grad, expected(plain.given.grad, part, plain[0], 0.1), 1e-5)


def cubes(y: torch.Tensor) -> torch.Tensor:
    return y.pow(3).sum()


@pytest.mark.parametrize("kind", ["Conv2d", "Linear"])
def test_a_preconditioned_gradient_is_differentiated_as_the_linear_map_that_made_it(kind, caplog):
    layer = nn.Conv2d(3, 4, 4, 4) if kind == "Conv2d" else nn.Linear(6, 4)
    layer.double()
    plain, part = copy.deepcopy(layer), (x() if kind == "Conv2d" else torch.randn(9, 6)).double()
    apply_tract(layer, lam=0.1)
    inverse = torch.linalg.inv(moment(part, plain)[0] + 0.1 * torch.eye(plain.weight[0].numel()).double())
    (got,) = torch.autograd.grad(cubes(layer(part)), layer.weight, create_graph=True)
    (ordinary,) = torch.autograd.grad(cubes(plain(part)), plain.weight, create_graph=True)
    wanted = ordinary.flatten(1) @ inverse
    assert_close(got.flatten(1), wanted, 1e-10)
    with caplog.at_level(logging.WARNING, "hf_tract"):
        (second,) = torch.autograd.grad(got.square().sum(), layer.weight, create_graph=True)
    (wanted_second,) = torch.autograd.grad(wanted.square().sum(), plain.weight, create_graph=True)
    assert_close(second, wanted_second, 1e-10)
    (third,) = torch.autograd.grad(second.square().sum(), layer.weight)
    (wanted_third,) = torch.autograd.grad(wanted_second.square().sum(), plain.weight)
    assert_close(third, wanted_third, 1e-10)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "is the exact derivative of that preconditioned gradient" in message


def test_hessian_vector_products_and_the_next_ordinary_step_are_right():
    """AdaHessian's way: `backward(create_graph=True)`, then a product with a random vector."""
    layer = nn.Linear(6, 4).double()
    plain, part, v = copy.deepcopy(layer), torch.randn(9, 6).double(), torch.randn(4, 6).double()
    apply_tract(layer, lam=0.1)
    inverse = torch.linalg.inv(moment(part, plain)[0] + 0.1 * torch.eye(6).double())
    (grad,) = torch.autograd.grad(cubes(layer(part)), layer.weight, create_graph=True)
    (product,) = torch.autograd.grad(grad, layer.weight, v)
    (ordinary,) = torch.autograd.grad(cubes(plain(part)), plain.weight, create_graph=True)
    (wanted,) = torch.autograd.grad(ordinary @ inverse, plain.weight, v)
    assert_close(product, wanted, 1e-10)
    cubes(layer(part)).backward()
    cubes(plain(part)).backward()
    assert_close(layer.weight.grad, expected(plain.weight.grad, part, plain, 0.1), 1e-10)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_gradient_penalty_on_the_pixels_is_preconditioned_once(autocast):
    """Autocast computes the weight's gradient again, but not of these, which have second-order parts."""
    layer = nn.Conv2d(3, 4, 4, 4)
    plain, part = copy.deepcopy(layer), x().requires_grad_()
    apply_tract(layer, lam=0.1)
    for net in (layer, plain):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = net(part).tanh().float().sum()
        (slope,) = torch.autograd.grad(value, part, create_graph=True)
        (value + slope.square().sum()).backward(inputs=[net.weight])
    wanted = expected(plain.weight.grad, part.detach(), plain, 0.1)
    assert_close(layer.weight.grad, wanted, 2e-2 if autocast else 1e-5)


@pytest.mark.parametrize("steps_before", [0, 1])
def test_a_differentiated_backward_after_tract_was_removed_is_ordinary(steps_before):
    layer = nn.Linear(6, 4).double()
    plain, part = copy.deepcopy(layer), torch.randn(9, 6).double()
    handle = apply_tract(layer, lam=0.1)
    for _ in range(steps_before):
        layer(part).square().sum().backward()
    value = cubes(layer(part))
    handle.remove()
    (got,) = torch.autograd.grad(value, layer.weight, create_graph=True)
    (wanted,) = torch.autograd.grad(cubes(plain(part)), plain.weight, create_graph=True)
    assert torch.equal(got, wanted)
    (second,) = torch.autograd.grad(got.square().sum(), layer.weight)
    (wanted_second,) = torch.autograd.grad(wanted.square().sum(), plain.weight)
    assert torch.equal(second, wanted_second)


def test_second_order_of_two_calls_in_one_pass_has_the_inverse_of_both():
    layer = nn.Linear(6, 4).double()
    plain, parts = copy.deepcopy(layer), [torch.randn(9, 6).double(), 3 * torch.randn(5, 6).double()]
    apply_tract(layer, lam=0.1)
    inverse = torch.linalg.inv(moment(parts, plain)[0] + 0.1 * torch.eye(6).double())
    (got,) = torch.autograd.grad(sum(cubes(layer(part)) for part in parts), layer.weight, create_graph=True)
    (ordinary,) = torch.autograd.grad(sum(cubes(plain(part)) for part in parts), plain.weight, create_graph=True)
    wanted = ordinary @ inverse
    assert_close(got, wanted, 1e-10)
    (second,) = torch.autograd.grad(got.square().sum(), layer.weight)
    (wanted_second,) = torch.autograd.grad(wanted.square().sum(), plain.weight)
    assert_close(second, wanted_second, 1e-10)


@pytest.mark.parametrize("shape", [(5, 3, 8, 8), (3, 8, 8)])
def test_hooks_on_the_output_of_a_16_bit_operation_reach_the_weight(shape):
    layer = nn.Conv2d(3, 4, 4, 4)
    plain, part = copy.deepcopy(layer), torch.randn(shape)
    apply_tract(layer, lam=0.1)
    for net in (layer, plain):
        with torch.autocast("cpu", torch.bfloat16, enabled=net is layer):
            out = net(part)
        out.register_hook(lambda grad: 0.1 * grad)
        out.float().square().sum().backward()
    assert_close(layer.weight.grad, expected(plain.weight.grad, part, plain, 0.1), 3e-2)


@pytest.mark.parametrize("kind", ["Conv2d", "Linear"])
def test_a_16_bit_operation_on_pixels_has_second_derivatives_too(kind, caplog):
    """It reads the detached weight; all of its gradient comes through the output then."""
    layer = nn.Conv2d(3, 4, 4, 4) if kind == "Conv2d" else nn.Linear(6, 4)
    part = x() if kind == "Conv2d" else torch.randn(9, 6)
    copies = {autocast: copy.deepcopy(layer) for autocast in (False, True)}
    seconds = {}
    for autocast, net in copies.items():
        apply_tract(net, lam=0.1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = net(part).float().tanh().sum()
        (grad,) = torch.autograd.grad(value, net.weight, create_graph=True)
        (seconds[autocast],) = torch.autograd.grad(grad.square().sum(), net.weight)
    assert_close(seconds[True], seconds[False], 3e-2)
    assert "is the exact derivative of that preconditioned gradient" in caplog.text
