"""What one optimizer step gathers: calls, micro-steps, dropped graphs, recomputation."""

import contextlib
import copy
import gc
import logging

import pytest
import torch
from accelerate.state import GradientState
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_tract import apply_tract
from oracle import assert_close, expected

LAM = 0.1


@pytest.fixture
def layers():
    """The same layer twice: plain, and to be tapped."""
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


def test_accumulation_with_no_sync_is_one_large_batch(layers):
    plain, layer = layers
    handle, x = apply_tract(layer, LAM), images(11)
    for micro in x[:8].split(4):
        with handle.no_sync():
            loss(layer(micro)).backward()
        assert not layer.weight.grad.any()  # held back, and an optimizer that steps now does no harm
    loss(layer(x[8:])).backward()
    assert_close(layer.weight.grad, expected(plain_grad(plain, x), x, plain, LAM), 1e-12)


def test_the_next_step_starts_anew(layers):
    plain, layer = layers
    handle, x, y = apply_tract(layer, LAM), images(4), images(4)
    with handle.no_sync():
        loss(layer(x)).backward()
    loss(layer(x)).backward()
    layer.zero_grad()
    loss(layer(y)).backward()
    assert_close(layer.weight.grad, expected(plain_grad(plain, y), y, plain, LAM), 1e-12)


def test_plain_accumulation_gets_the_rule_of_each_backward(layers):
    plain, layer = layers
    x, y = images(4), images(4)
    apply_tract(layer, LAM)
    for part in (x, y):
        loss(layer(part)).backward()
    each = sum(expected(plain_grad(plain, part).clone(), part, plain, LAM) for part in (x, y))
    assert_close(layer.weight.grad, each, 1e-12)


def test_accelerates_flag_holds_the_gradient_back(layers):
    plain, layer = layers
    apply_tract(layer, LAM)
    x = images(8)
    state = GradientState()
    try:
        state.sync_gradients = False
        loss(layer(x[:3])).backward()
        assert not layer.weight.grad.any()
    finally:
        state.sync_gradients = True
    loss(layer(x[3:])).backward()
    assert_close(layer.weight.grad, expected(plain_grad(plain, x), x, plain, LAM), 1e-12)


def test_a_flag_left_behind_by_an_interrupted_accumulation_is_cleared(layers):
    plain, layer = layers
    GradientState().sync_gradients = False
    apply_tract(layer, LAM)
    x = images(4)
    loss(layer(x)).backward()
    assert_close(layer.weight.grad, expected(plain_grad(plain, x), x, plain, LAM), 1e-12)


def test_two_calls_in_one_backward_share_one_moment(layers):
    plain, layer = layers
    apply_tract(layer, LAM)
    x, y = images(3), images(5)
    (loss(layer(x)) + loss(layer(y))).backward()
    assert_close(layer.weight.grad, expected(plain_grad(plain, x, y), [x, y], plain, LAM), 1e-12)


def test_two_calls_in_every_micro_step_share_one_moment(layers):
    plain, layer = layers
    handle = apply_tract(layer, LAM)
    parts = [images(count) for count in (3, 5, 2, 4)]
    with handle.no_sync():
        (loss(layer(parts[0])) + loss(layer(parts[1]))).backward()
    (loss(layer(parts[2])) + loss(layer(parts[3]))).backward()
    assert_close(layer.weight.grad, expected(plain_grad(plain, *parts), parts, plain, LAM), 1e-12)


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


def test_local_scope_is_the_rule_of_each_call(layers):
    plain, layer = layers
    handle = apply_tract(layer, LAM, scope="local")
    x, y = images(3), images(5)
    with handle.no_sync():
        (loss(layer(x)) + loss(layer(y))).backward()
    each = sum(expected(plain_grad(plain, part).clone(), part, plain, LAM) for part in (x, y))
    assert_close(layer.weight.grad, each, 1e-12)


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_forward_without_backward_leaves_nothing(layers, accumulate):
    plain, layer = layers
    handle = apply_tract(layer, LAM)
    x, skipped = images(4), images(4) * torch.nan
    out = layer(skipped)  # `if not loss.isfinite(): continue`, the old graph still alive at the next forward
    if accumulate:
        with handle.no_sync():
            out = layer(skipped)
    out = layer(x)
    loss(out).backward()
    assert_close(layer.weight.grad, expected(plain_grad(plain, x), x, plain, LAM), 1e-12)


def test_nan_pixels_give_nan_gradients_in_that_step_alone(layers):
    plain, layer = layers
    handle = apply_tract(layer, LAM)
    x, bad = images(4), images(4)
    bad[1, 2, 3, 4] = torch.nan
    with handle.no_sync():
        loss(layer(bad)).backward()
    loss(layer(x)).backward()
    assert layer.weight.grad.isnan().all()
    layer.zero_grad()
    loss(layer(x)).backward()
    assert_close(layer.weight.grad, expected(plain_grad(plain, x), x, plain, LAM), 1e-12)


def test_an_exception_in_an_accumulation_can_be_forgotten(layers):
    plain, layer = layers
    handle, x = apply_tract(layer, LAM), images(4)
    with contextlib.suppress(KeyboardInterrupt), handle.no_sync():
        loss(layer(images(2))).backward()
        raise KeyboardInterrupt
    handle.reset()
    layer.zero_grad()
    loss(layer(x)).backward()
    assert_close(layer.weight.grad, expected(plain_grad(plain, x), x, plain, LAM), 1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
def test_activation_checkpointing_over_the_layer(layers, reentrant, accumulate):
    plain, layer = layers
    handle, x = apply_tract(layer, LAM), images(8).requires_grad_()

    def step(part: torch.Tensor) -> None:
        loss(checkpoint(layer, part, use_reentrant=reentrant)).backward()

    if accumulate:
        with handle.no_sync():
            step(x[:3])
    step(x[3:] if accumulate else x)
    assert_close(layer.weight.grad, expected(plain_grad(plain, x.detach()), x.detach(), plain, LAM), 1e-12)


def test_activations_offloaded_to_the_cpu(layers):
    plain, layer = layers
    apply_tract(layer, LAM)
    x = images(4)
    with torch.autograd.graph.save_on_cpu():
        value = loss(layer(x))
    value.backward()
    assert_close(layer.weight.grad, expected(plain_grad(plain, x), x, plain, LAM), 1e-12)


def test_an_all_black_batch(layers):
    _, layer = layers
    apply_tract(layer, LAM)
    (layer(torch.zeros(2, 3, 8, 8, dtype=torch.float64)) - 1).square().sum().backward()
    assert not layer.weight.grad.any()
    assert layer.bias.grad.isfinite().all()


def test_an_empty_batch(layers):
    _, layer = layers
    apply_tract(layer, LAM)
    loss(layer(images(0))).backward()
    assert not layer.weight.grad.any()


def test_one_image_with_fewer_patches_than_n(layers):
    plain, layer = layers
    apply_tract(layer, LAM)
    x = images(1)  # 4 patches of 48
    loss(layer(x)).backward()
    assert_close(layer.weight.grad, expected(plain_grad(plain, x), x, plain, LAM), 1e-12)


def test_no_grad_and_a_frozen_weight_cost_nothing(layers, monkeypatch):
    import hf_tract.operators

    _, layer = layers
    apply_tract(layer, LAM)
    monkeypatch.setattr(hf_tract.operators, "patch_moments", lambda *a: pytest.fail("a moment was taken"))
    with torch.no_grad():
        layer(images(1))
    with torch.inference_mode():
        layer(images(1))
    layer.weight.requires_grad_(False)
    loss(layer(images(1))).backward()
    assert layer.weight.grad is None


def test_an_unsolvable_moment_is_said_once(layers, caplog, monkeypatch):
    _, layer = layers
    handle = apply_tract(layer, LAM)
    object.__setattr__(layer._tract_step.config, "lam", -1e6)  # what no user can ask for: C + lam I is negative
    with caplog.at_level(logging.WARNING, "hf_tract"):
        for _ in range(2):
            loss(layer(images(2))).backward()
    assert [record.message for record in caplog.records] == [
        "TrAct: C + lam I (lam=-1e+06) could not be factorised, in float64 neither: the first layer keeps its ordinary "
        "gradient in such steps. Normalise the pixels or raise lam. This is said once."
    ]
    assert handle.stats()[""]["condition"] == float("inf")


def test_nothing_outlives_its_graph(layers):
    _, layer = layers
    apply_tract(layer, LAM)
    for _ in range(3):
        loss(layer(images(2))).backward()
    gc.collect()
    assert not any(call.ref() is not None for call in layer._tract_step._calls)


def test_figures_of_the_last_step(layers):
    plain, layer = layers
    handle, x = apply_tract(layer, LAM), images(6)
    assert handle.stats() == {}
    with handle.no_sync():
        loss(layer(x[:2])).backward()
    loss(layer(x[2:])).backward()
    raw = plain_grad(plain, x)
    (figures,) = handle.stats().values()
    assert figures["grad_norm_raw"] == pytest.approx(raw.norm().item())
    assert figures["grad_norm"] == pytest.approx(layer.weight.grad.norm().item())
    assert figures["condition"] > 1
