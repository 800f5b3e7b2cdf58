"""What one optimizer step gathers: calls, micro-steps, dropped graphs, recomputation; after every backward."""

import contextlib
import copy
import gc
import itertools
import logging

import pytest
import torch
from accelerate.state import GradientState
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import hf_tract.core.accumulation
import hf_tract.core.forward
import hf_tract.core.preconditioner
from helpers.oracle import assert_close, expected
from hf_tract import apply_tract

LAM = 0.1


@pytest.fixture
def layers():
    """The same layer twice: plain, and to be preconditioned."""
    layer = nn.Conv2d(3, 4, 4, stride=4, dtype=torch.float64)
    return copy.deepcopy(layer), layer


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, dtype=torch.float64) * torch.rand(count, 1, 1, 1).double() * 3


def loss(y: torch.Tensor) -> torch.Tensor:
    return y.square().sum()


def plain_grad(layer: nn.Module, *batches: torch.Tensor) -> torch.Tensor:
    layer.zero_grad()
    sum(loss(layer(x)) for x in batches).backward()
    return layer.weight.grad


def backward(layer: nn.Module, *batches: torch.Tensor) -> None:
    for x in batches:
        loss(layer(x)).backward()


def assert_rule(layer: nn.Module, plain: nn.Module, *batches: torch.Tensor, lam: float = LAM) -> None:
    """The gradient is the rule's for the gradient and the patches of these batches."""
    wanted = expected(plain_grad(plain, *batches), list(batches), plain, lam)
    assert_close(layer.weight.grad, wanted, 1e-11)
    assert torch.equal(layer.bias.grad, plain.bias.grad) or len(batches) > 1


def test_the_rule_holds_after_each_backward_of_an_accumulation(layers):
    plain, layer = layers
    apply_tract(layer, LAM)
    parts = [images(count) for count in (3, 5, 2, 4)]
    for count in range(1, 5):
        backward(layer, parts[count - 1])
        assert_rule(layer, plain, *parts[:count])


@settings(max_examples=30)
@given(
    sizes=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3), min_size=1, max_size=3),
    emptied=st.sampled_from(["None", "zeros"]),
)
def test_any_loop_takes_the_step_of_one_large_batch(sizes, emptied):
    """Steps of any number of backwards, each over any number of calls, and both ways to empty a gradient."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 4, stride=2, dtype=torch.float64)
    plain = copy.deepcopy(layer)
    apply_tract(layer, LAM)
    for step in sizes:
        layer.zero_grad(set_to_none=emptied == "None")
        parts = [images(count) for count in [*step, 1]]
        for first, second in itertools.zip_longest(parts[::2], parts[1::2]):
            both = [part for part in (first, second) if part is not None]
            sum(loss(layer(part)) for part in both).backward()
        assert_rule(layer, plain, *parts)


@pytest.mark.parametrize("emptied", ["None", "zeros"])
def test_the_next_step_starts_anew(layers, emptied):
    plain, layer = layers
    apply_tract(layer, LAM)
    x, y = images(4), images(4)
    backward(layer, x, x)
    layer.zero_grad(set_to_none=emptied == "None")
    backward(layer, y)
    assert_rule(layer, plain, y)


def penalise(layer: nn.Module) -> None:
    (0.01 * layer.weight.abs().sum()).backward()


def assert_rule_beside_penalty(layer: nn.Module, plain: nn.Module, x: torch.Tensor) -> None:
    wanted = expected(plain_grad(plain, x), x, plain, LAM) + 0.01 * plain.weight.detach().sign()
    assert_close(layer.weight.grad, wanted, 1e-11)


@pytest.mark.parametrize("has_optimizer", [True, False])
def test_a_penalty_that_comes_before_the_loss_does_not_join_the_steps(layers, has_optimizer):
    """Its gradient is in `.grad` when the layer's backward comes; a batch of NaN spoils its own step alone."""
    plain, layer = layers
    apply_tract(layer, LAM)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    for number in range(5):
        x = images(3)
        if number == 2:
            x[0, 0, 0, 0] = torch.nan
        layer.zero_grad()
        penalise(layer)
        backward(layer, x)
        if number == 2:
            assert layer.weight.grad.isnan().any()
            continue
        if has_optimizer:
            optimizer.step()
        assert_rule_beside_penalty(layer, plain, x)


def test_a_penalty_in_one_step_alone_begins_a_step(layers):
    plain, layer = layers
    apply_tract(layer, LAM)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    first, second = images(3), images(3)
    backward(layer, first)
    optimizer.step()
    layer.zero_grad()
    penalise(layer)
    backward(layer, second)
    assert_rule_beside_penalty(layer, plain, second)


def test_gradients_that_are_replaced_between_micro_steps_are_those_of_the_step(layers):
    plain, layer = layers
    apply_tract(layer, LAM)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        batches = [images(2) for _ in range(4)]
        for x in batches:
            backward(layer, x)
            for parameter in layer.parameters():
                parameter.grad = torch.nan_to_num(parameter.grad)
        optimizer.step()
        assert_rule(layer, plain, *batches)


@pytest.mark.parametrize("on_host", [True, False], ids=["host", "as on an accelerator"])
def test_a_step_without_a_gradient_is_over_after_the_optimizers(layers, on_host, monkeypatch):
    """A head of zeros gives the first layer none, and `.grad` is then emptied by zeros."""
    plain, layer = layers
    apply_tract(layer, LAM)
    monkeypatch.setattr(hf_tract.core.accumulation, "on_host", lambda _: on_host)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    (0 * loss(layer(5 * images(2)))).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    x = images(3)
    backward(layer, x)
    assert_rule(layer, plain, x)


def test_a_long_step_keeps_no_forward_calls(layers):
    _, layer = layers
    apply_tract(layer, LAM)
    for _ in range(10):
        backward(layer, images(1))
    assert len(layer._tract_preconditioner.last_step.counted_calls) <= 1


def test_a_model_with_gradients_moves_by_swapping(layers):
    _, layer = layers
    apply_tract(layer, LAM)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    backward(layer, images(2))
    optimizer.step()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert layer.weight.dtype == layer.weight.grad.dtype == torch.float32


def test_gradients_that_nobody_empties_add_up_over_optimizer_steps(layers):
    plain, layer = layers
    apply_tract(layer, LAM)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    batches = [images(2) for _ in range(3)]
    for x in batches:
        backward(layer, x)
        optimizer.step()
    assert_rule(layer, plain, *batches)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_an_accumulation_with_second_derivatives_is_one_step(layers):
    """Autograd replaces `.grad` by a sum then, in place of adding to it."""
    plain, layer = layers
    apply_tract(layer, LAM)
    batches = [images(2) for _ in range(4)]
    for x in batches:
        loss(layer(x)).backward(create_graph=True)
    layer.weight.grad = layer.weight.grad.detach()
    layer.bias.grad = layer.bias.grad.detach()
    assert_rule(layer, plain, *batches)


def test_two_layers_that_share_a_weight_each_have_their_rule(layers):
    plain, layer = layers
    model = nn.ModuleList([layer, copy.deepcopy(layer)])
    model[1].weight = layer.weight
    apply_tract(model, layers=["0", "1"])
    for _ in range(3):
        model.zero_grad()
        parts = [images(2), 3 * images(3)]
        for each, x in zip(model, parts, strict=True):
            backward(each, x)
        wanted = [expected(plain_grad(plain, x), x, plain, LAM) for x in parts]
        assert_close(layer.weight.grad, sum(wanted), 1e-11)


def test_a_part_of_a_weight_that_no_optimizer_holds_does_not_join_the_steps():
    layer = parametrizations.weight_norm(nn.Conv2d(3, 4, 4, stride=4, dtype=torch.float64))
    fresh = copy.deepcopy(layer)
    apply_tract(layer)
    direction = layer.parametrizations.weight.original1
    optimizer = torch.optim.SGD([direction, layer.bias], lr=0.0)
    for _ in range(3):
        x = images(3)
        optimizer.zero_grad()
        backward(layer, x)
        optimizer.step()
        alone = copy.deepcopy(fresh)
        apply_tract(alone)
        backward(alone, x)
        assert_close(direction.grad, alone.parametrizations.weight.original1.grad, 1e-11)


@pytest.mark.parametrize("on_host", [True, False], ids=["host", "as on an accelerator"])
def test_micro_steps_whose_gradient_is_zero_count(layers, on_host, monkeypatch):
    """Their patches are read, as those of a satisfied hinge loss are, and `.grad` holds the zeros that they gave."""
    plain, layer = layers
    apply_tract(layer, LAM)
    monkeypatch.setattr(hf_tract.core.accumulation, "on_host", lambda _: on_host)
    batches = [images(2), images(3)]
    (0 * loss(layer(batches[0]))).backward()
    backward(layer, batches[1])
    wanted = expected(plain_grad(plain, batches[1]), batches, plain, LAM)
    assert_close(layer.weight.grad, wanted, 1e-11)


@pytest.mark.parametrize("where", ["factor", "sums"])
def test_an_error_in_the_backward_leaves_the_step_as_it_was(layers, where, monkeypatch):
    """Out of memory in one micro-step, and the loop goes on."""
    plain, layer = layers
    apply_tract(layer, LAM)
    batches = [images(2), images(3), images(4)]

    def fail(*_):
        raise torch.OutOfMemoryError("no memory")

    backward(layer, batches[0])
    with monkeypatch.context() as patch:
        if where == "factor":
            patch.setattr(torch.linalg, "cholesky_ex", fail)
        else:
            patch.setattr(hf_tract.core.preconditioner, "patch_sums", fail)
        with pytest.raises(torch.OutOfMemoryError):
            backward(layer, batches[1])
    backward(layer, batches[2])
    wanted = expected(plain_grad(plain, batches[0], batches[2]), [batches[0], batches[2]], plain, LAM)
    assert_close(layer.weight.grad, wanted, 1e-11)


def test_a_weight_frozen_between_forward_and_backward_gets_no_gradient(layers):
    _, layer = layers
    apply_tract(layer, LAM)
    y = loss(layer(images(2)))
    layer.weight.requires_grad_(False)
    y.backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None


def test_zeros_are_told_on_a_device_without_asking_it(layers, monkeypatch):
    """As if the gradient lay on an accelerator: the old sums are masked there."""
    plain, layer = layers
    apply_tract(layer, LAM)
    monkeypatch.setattr(hf_tract.core.accumulation, "on_host", lambda _: False)
    x, y, z = images(4), images(3), images(2)
    backward(layer, x * torch.nan)
    layer.zero_grad(set_to_none=False)
    backward(layer, x, y)
    assert_rule(layer, plain, x, y)
    layer.zero_grad(set_to_none=False)
    value = loss(layer(z))
    value.backward(retain_graph=True)
    layer.zero_grad(set_to_none=False)
    value.backward()  # in a new step its patches count anew
    assert_rule(layer, plain, z)


def test_no_sync_is_harmless_where_gradients_live_in_grad(layers):
    plain, layer = layers
    handle, x, y = apply_tract(layer, LAM), images(4), images(3)
    with handle.no_sync():
        backward(layer, x)
        assert_rule(layer, plain, x)
    backward(layer, y)
    assert_rule(layer, plain, x, y)


@pytest.mark.parametrize("flag", [False, True])
def test_accelerates_flag_is_neither_trusted_nor_written(layers, flag):
    plain, layer = layers
    state = GradientState()
    try:
        state.sync_gradients = flag
        apply_tract(layer, LAM)
        x, y = images(4), images(2)
        backward(layer, x, y)
        assert_rule(layer, plain, x, y)
        layer.zero_grad()
        backward(layer, y)
        assert_rule(layer, plain, y)
        assert state.sync_gradients == flag
    finally:
        state.sync_gradients = True


def test_a_micro_step_may_leave_the_layer_out(layers):
    """Its gradient is there all the same: a text-only batch at the end of an accumulation."""
    plain, layer = layers
    apply_tract(layer, LAM)
    x, y = images(3), images(2)
    backward(layer, x)
    torch.nn.Linear(2, 2)(torch.ones(1, 2)).sum().backward()
    assert_rule(layer, plain, x)
    layer.zero_grad()
    backward(layer, y)
    assert_rule(layer, plain, y)


def test_a_gradient_of_the_bias_alone_begins_no_step(layers):
    """Its gradient is not emptied, and comes before the weight's in each pass."""
    plain, layer = layers
    apply_tract(layer, LAM)
    x, y = images(3), images(2)
    backward(layer, x)
    layer.weight.grad = None
    backward(layer, y)
    assert_close(layer.weight.grad, expected(plain_grad(plain, y), y, plain, LAM), 1e-12)


@pytest.mark.parametrize("kind", ["weight norm", "pruned"])
def test_a_weight_that_is_made_of_other_parameters_accumulates_too(kind):
    whole, parts = (nn.Conv2d(3, 4, 4, stride=4, dtype=torch.float64) for _ in range(2))
    parts.load_state_dict(whole.state_dict())
    for net in (whole, parts):
        parametrizations.weight_norm(net) if kind == "weight norm" else prune.l1_unstructured(net, "weight", 40)
        apply_tract(net, LAM)
    for _ in range(2):
        x = images(5)
        for net in (whole, parts):
            net.zero_grad()
        backward(whole, x)
        backward(parts, *x.split(2))
        for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
            assert_close(other.grad, one.grad, 1e-11)


def test_sharpness_aware_minimisation_has_the_rule_in_each_of_its_two_passes(layers):
    """Ascent and descent empty the gradient between them, so each pass has the second moment of its own patches."""
    plain, layer = layers
    apply_tract(layer, LAM)
    for x in (images(4), images(3)):
        for _ in ("ascent", "descent"):
            layer.zero_grad()
            backward(layer, x)
            assert_rule(layer, plain, x)


def test_a_gradient_that_is_returned_does_not_mix_with_an_accumulation(layers):
    """A probe by `torch.autograd.grad` between two micro-steps has the second moment of its own patches."""
    plain, layer = layers
    apply_tract(layer, LAM)
    x, y, probed = images(3), images(2), images(4)
    backward(layer, x)
    (got,) = torch.autograd.grad(loss(layer(probed)), layer.weight)
    assert_close(got, expected(plain_grad(plain, probed), probed, plain, LAM), 1e-12)
    backward(layer, y)
    assert_rule(layer, plain, x, y)


def test_backward_with_named_inputs_adds_to_the_step(layers):
    plain, layer = layers
    apply_tract(layer, LAM)
    x, y = images(3), images(2)
    backward(layer, x)
    loss(layer(y)).backward(inputs=[layer.weight])
    assert_close(layer.weight.grad, expected(plain_grad(plain, x, y), [x, y], plain, LAM), 1e-11)


def test_two_calls_in_one_backward_share_one_moment(layers):
    plain, layer = layers
    apply_tract(layer, LAM)
    x, y = images(3), images(5)
    (loss(layer(x)) + loss(layer(y))).backward()
    assert_close(layer.weight.grad, expected(plain_grad(plain, x, y), [x, y], plain, LAM), 1e-12)


def test_two_backwards_after_two_forwards_share_one_moment(layers):
    plain, layer = layers
    apply_tract(layer, LAM)
    x, y = images(3), images(5)
    losses = [loss(layer(x)), loss(layer(y))]
    for part in losses:
        part.backward()
    assert_close(layer.weight.grad, expected(plain_grad(plain, x, y), [x, y], plain, LAM), 1e-12)


def test_a_second_backward_through_one_graph_is_preconditioned_once(layers):
    plain, layer = layers
    apply_tract(layer, LAM)
    x = images(3)
    value = loss(layer(x))
    value.backward(retain_graph=True)
    value.backward()
    assert_close(layer.weight.grad, 2 * expected(plain_grad(plain, x), x, plain, LAM), 1e-12)


def test_a_graph_that_is_run_twice_counts_its_patches_once_beside_others(layers):
    plain, layer = layers
    apply_tract(layer, LAM)
    x, y = images(3), images(5)
    value = loss(layer(x))
    value.backward(retain_graph=True)
    value.backward()
    backward(layer, y)
    raw = 2 * plain_grad(plain, x).clone() + plain_grad(plain, y)
    assert_close(layer.weight.grad, expected(raw, [x, y], plain, LAM), 1e-12)


def test_a_graph_that_is_run_again_in_a_new_step_counts_again(layers):
    plain, layer = layers
    apply_tract(layer, LAM)
    x, y = images(3), images(5)
    value = loss(layer(x))
    value.backward(retain_graph=True)
    layer.zero_grad()
    backward(layer, y)
    value.backward()
    assert_rule(layer, plain, y, x)


def test_local_scope_is_the_rule_of_each_call(layers):
    plain, layer = layers
    apply_tract(layer, LAM, scope="local")
    x, y = images(3), images(5)
    (loss(layer(x)) + loss(layer(y))).backward()
    each = sum(expected(plain_grad(plain, part).clone(), part, plain, LAM) for part in (x, y))
    assert_close(layer.weight.grad, each, 1e-12)


def test_a_forward_without_backward_leaves_nothing(layers):
    plain, layer = layers
    apply_tract(layer, LAM)
    x, skipped = images(4), images(4) * torch.nan
    alive = [loss(layer(skipped))]  # `if not loss.isfinite(): continue`, and the graph stays alive
    backward(layer, x)
    assert alive[0].isnan()
    assert_rule(layer, plain, x)


def test_forwards_of_an_attack_on_the_pixels_do_not_count(layers):
    """Their backward asks for the pixels' gradient alone."""
    plain, layer = layers
    apply_tract(layer, LAM)
    x = images(4)
    for _ in range(2):
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss(layer(x)), x)
        x = x + 0.5 * slope.sign()
    backward(layer, x.detach())
    assert_rule(layer, plain, x.detach())


def test_an_exception_between_forward_and_backward_leaves_nothing(layers):
    plain, layer = layers
    apply_tract(layer, LAM)
    x = images(4)
    with contextlib.suppress(KeyboardInterrupt):
        out = layer(images(2))
        raise KeyboardInterrupt
    backward(layer, x)
    assert out.requires_grad
    assert_rule(layer, plain, x)


def test_nan_pixels_give_nan_gradients_in_that_step_alone(layers):
    plain, layer = layers
    apply_tract(layer, LAM)
    x, bad = images(4), images(4)
    bad[1, 2, 3, 4] = torch.nan
    backward(layer, bad, x)
    assert layer.weight.grad.isnan().all()
    layer.zero_grad()
    backward(layer, x)
    assert_rule(layer, plain, x)


def test_new_settings_hold_for_the_whole_step_they_come_in(layers):
    plain, layer = layers
    apply_tract(layer, LAM)
    x, y = images(4), images(3)
    backward(layer, x)
    value = loss(layer(y))
    apply_tract(layer, 0.4)  # also between a forward and its backward
    value.backward()
    assert_rule(layer, plain, x, y, lam=0.4)


@pytest.mark.parametrize("how", ["removed", "collected"])
def test_a_backward_after_the_end_hands_on_the_ordinary_gradient(layers, how):
    plain, layer = layers
    handle, x = apply_tract(layer, LAM), images(4)
    weight, value = layer.weight, loss(layer(x))
    if how == "removed":
        handle.remove()
    del layer, handle, layers
    gc.collect()
    value.backward()
    raw = plain_grad(plain, x)
    wanted = raw if how == "removed" else expected(raw, x, plain, LAM)  # the graph keeps what it needs
    assert_close(weight.grad, wanted, 1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("calls", [1, 2])
def test_activation_checkpointing_over_the_layer_has_the_rule(layers, reentrant, calls):
    plain, layer = layers
    apply_tract(layer, LAM)
    parts = [images(count) for count in (3, 5, 2, 4)]
    for each in (parts[:2], parts[2:]):  # two micro-steps
        for some in [each] if calls == 2 else [[part] for part in each]:
            inputs = [part.clone().requires_grad_() for part in some]
            sum(loss(checkpoint(layer, part, use_reentrant=reentrant)) for part in inputs).backward()
    assert_rule(layer, plain, *parts)
    layer.zero_grad()
    loss(checkpoint(layer, parts[0].clone().requires_grad_(), use_reentrant=reentrant)).backward()
    assert_rule(layer, plain, parts[0])


def test_a_checkpoint_that_is_run_backward_twice_has_the_rule(layers):
    plain, layer = layers
    apply_tract(layer, LAM)
    x, y = images(3), images(5)
    value = loss(checkpoint(layer, x.clone().requires_grad_(), use_reentrant=False))
    value.backward(retain_graph=True)
    value.backward()
    backward(layer, y)
    raw = 2 * plain_grad(plain, x).clone() + plain_grad(plain, y)
    assert_close(layer.weight.grad, expected(raw, [x, y], plain, LAM), 1e-12)


def test_saved_tensors_may_be_moved_elsewhere(layers):
    """As `save_on_cpu` does on a GPU: what comes back is another tensor."""
    plain, layer = layers
    apply_tract(layer, LAM)
    x, y = images(4), images(3)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        value = loss(layer(x)) + loss(layer(y))
    value.backward()
    assert_rule(layer, plain, x, y)


def test_an_all_black_batch_gives_zeros(layers):
    _, layer = layers
    apply_tract(layer, LAM)
    (layer(torch.zeros(2, 3, 8, 8, dtype=torch.float64)) - 1).square().sum().backward()
    assert not layer.weight.grad.any()
    assert layer.bias.grad.isfinite().all()


def test_an_empty_batch_gives_zeros(layers):
    _, layer = layers
    apply_tract(layer, LAM)
    loss(layer(images(0))).backward()
    assert not layer.weight.grad.any()


def test_no_grad_and_a_frozen_weight_cost_nothing(layers, monkeypatch):
    _, layer = layers
    apply_tract(layer, LAM)
    monkeypatch.setattr(hf_tract.core.preconditioner, "patch_sums", lambda *a: pytest.fail("a moment was taken"))
    monkeypatch.setattr(hf_tract.core.forward, "ForwardCall", lambda *a: pytest.fail("a backward was prepared"))
    with torch.no_grad():
        layer(images(1))
    with torch.inference_mode():
        layer(images(1))
    layer.weight.requires_grad_(False)
    loss(layer(images(1))).backward()
    with torch.autocast("cpu", torch.bfloat16):
        loss(layer.float()(images(1).float())).backward()
    assert layer.weight.grad is None


def test_an_unsolvable_moment_is_told_once(layers, caplog, monkeypatch):
    _, layer = layers
    handle = apply_tract(layer, LAM)
    # What no user can ask for: C + lam I is negative.
    object.__setattr__(layer._tract_preconditioner.config, "lam", -1e6)
    with caplog.at_level(logging.WARNING, "hf_tract"):
        for _ in range(2):
            loss(layer(images(2))).backward()
    assert [record.message for record in caplog.records] == [
        "TrAct: C + lam I (lam=-1e+06) could not be factorised, in float64 neither: the first layer keeps its "
        "ordinary gradient in such steps. Standardise the pixels or raise lam. This is shown once."
    ]
    assert handle.stats()[""]["condition"] == float("inf")


def test_stats_are_the_figures_of_the_last_step(layers):
    plain, layer = layers
    handle, x = apply_tract(layer, LAM), images(6)
    assert handle.stats() == {}
    backward(layer, x[:2], x[2:])
    raw = plain_grad(plain, x)
    (figures,) = handle.stats().values()
    assert figures["grad_norm_raw"] == pytest.approx(raw.norm().item())
    assert figures["grad_norm"] == pytest.approx(layer.weight.grad.norm().item())
    assert figures["condition"] > 1


@pytest.mark.parametrize("kind", ["plain", "weight norm", "compiled"])
def test_a_returned_gradient_stays_apart_however_the_weight_is_made_or_run(kind):
    layer = nn.Conv2d(3, 4, 4, stride=4, dtype=torch.float64)
    if kind == "weight norm":
        parametrizations.weight_norm(layer)
    alone = copy.deepcopy(layer)
    apply_tract(layer, LAM)
    apply_tract(alone, LAM)
    run = torch.compile(layer, backend="aot_eager") if kind == "compiled" else layer
    x, y, probed = images(3), images(2), images(4)
    loss(run(x)).backward()
    got = torch.autograd.grad(loss(run(probed)), list(layer.parameters()))
    loss(run(y)).backward()
    wanted = torch.autograd.grad(loss(alone(probed)), list(alone.parameters()))
    (loss(alone(x)) + loss(alone(y))).backward()
    for mine, theirs in zip(got, wanted, strict=True):
        assert_close(mine, theirs, 1e-11)
    for mine, theirs in zip(layer.parameters(), alone.parameters(), strict=True):
        assert_close(mine.grad, theirs.grad, 1e-11)


@pytest.mark.parametrize("kind", [nn.Parameter, torch.Tensor.requires_grad_])
def test_parameters_that_functional_call_is_given_accumulate_too(layers, kind):
    plain, layer = layers
    apply_tract(layer, LAM)
    parameters = {name: kind(value.detach().clone()) for name, value in layer.named_parameters()}
    x, y = images(3), images(2)
    for part in (x, y):
        loss(torch.func.functional_call(layer, parameters, (part,))).backward()
    raw = plain_grad(plain, x, y)
    assert_close(parameters["weight"].grad, expected(raw, [x, y], plain, LAM), 1e-11)


def test_the_weight_that_the_graph_knows_counts_and_not_the_layers_own_of_now(layers):
    plain, layer = layers
    apply_tract(layer, LAM)
    x, y, old = images(3), images(2), layer.weight
    losses = [loss(layer(part)) for part in (x, y)]
    layer.weight = nn.Parameter(torch.zeros_like(old))
    for value in losses:
        value.backward()
    assert_close(old.grad, expected(plain_grad(plain, x, y), [x, y], plain, LAM), 1e-11)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_a_step_keeps_no_graph_alive(layers):
    _, layer = layers
    apply_tract(layer, LAM)
    x = images(3)
    loss(layer(x)).backward(create_graph=True)
    assert not layer._tract_preconditioner.last_step.grad.requires_grad
    layer.weight.grad = layer.bias.grad = None
