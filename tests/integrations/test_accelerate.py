"""Works with: accelerate's loop, `accumulate`, autocast, clipping, `prepare` before or after, and its hooks."""

import contextlib
import copy

import pytest
import torch
from accelerate import Accelerator, dispatch_model
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.utils.data import DataLoader

from helpers.models import Airbench, Images, small_vit, stem_of, weights
from helpers.oracle import assert_close, expected, says
from hf_tract import TrActError, TrActHook, apply_tract
from hf_tract.core.attach import TrActLayer


@pytest.fixture
def accelerator_of():
    """Makes Accelerators and leaves accelerate's singletons as they were."""
    yield lambda **settings: Accelerator(cpu=True, **settings)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train(accelerator: Accelerator, batch_size: int, when: str, clip: float = 0.0, count: int = 64) -> nn.Module:
    model = small_vit()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    loader = DataLoader(Images(count), batch_size=batch_size)
    if when == "before prepare":
        apply_tract(model)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if when == "after prepare":
        apply_tract(model)
    for _ in range(3):
        for batch in loader:
            with accelerator.accumulate(model):
                # The loss is a mean over the images of one micro-batch: weighted here, so that uneven ones add up.
                scale = len(batch["labels"]) * accelerator.gradient_accumulation_steps / min(64, count)
                accelerator.backward(model(**batch).loss * scale)
                if clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    return accelerator.unwrap_model(model)


@pytest.mark.parametrize("when", ["before prepare", "after prepare"])
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_accumulation_is_one_large_batch(accelerator_of, when, clip):
    large = train(accelerator_of(), 64, when, clip)
    GradientState._reset_state()
    small = train(accelerator_of(gradient_accumulation_steps=4), 16, when, clip)
    assert_close(weights(small), weights(large), 1e-5)
    start = weights(small_vit())
    assert_close(weights(small) - start, weights(large) - start, 2e-5)


def test_the_last_uneven_accumulation_weighs_patches(accelerator_of):
    """40 images in batches of 16: the last accumulation has 16 + 16 + 8; its moment weighs patches, not batches."""
    large = train(accelerator_of(), 40, "before prepare", count=40)
    GradientState._reset_state()
    small = train(accelerator_of(gradient_accumulation_steps=3), 16, "before prepare", count=40)
    start = weights(small_vit())
    assert_close(weights(small) - start, weights(large) - start, 2e-5)


def test_bf16_autocast_is_no_further_from_float32_than_without_tract(accelerator_of):
    """inv(C + lam I) would enlarge the rounding of the weight's gradient; it is computed again in float32."""
    accelerator, exact = accelerator_of(mixed_precision="bf16"), small_vit()
    plain, model, batch = copy.deepcopy(exact), copy.deepcopy(exact), Images().batch()
    apply_tract(model)
    for net in (plain, model):
        prepared = accelerator.prepare(net)
        accelerator.backward(prepared(**batch).loss)
    exact(**batch).loss.backward()
    exact_grad, plain_grad = stem_of(exact).weight.grad, stem_of(plain).weight.grad
    wanted = expected(exact_grad, batch["pixel_values"], stem_of(plain), 0.1)
    assert stem_of(model).weight.grad.dtype == torch.float32
    assert_close(stem_of(model).weight.grad, wanted, 2 * float((plain_grad - exact_grad).norm() / exact_grad.norm()))


@pytest.mark.parametrize("how", ["accelerator.no_sync", "by hand"])
def test_loops_without_accumulate_take_the_step_of_one_batch(accelerator_of, how):
    """As in accelerate's own examples: micro-steps under `no_sync`, or no word to accelerate at all."""
    accelerator, whole, batch = accelerator_of(), small_vit(), Images().batch()
    model = copy.deepcopy(whole)
    apply_tract(whole)
    apply_tract(model)
    whole(**batch).loss.backward()
    prepared = accelerator.prepare(model)
    for index in range(4):
        part = {key: value.chunk(4)[index] for key, value in batch.items()}
        local = how == "accelerator.no_sync" and index < 3
        with accelerator.no_sync(prepared) if local else contextlib.nullcontext():
            accelerator.backward(prepared(**part).loss / 4)
    assert_close(weights_grad(model), weights_grad(whole), 1e-5)


def weights_grad(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("layer", ["Conv2d", "Linear"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_dispatched_model_is_preconditioned_and_left_as_it_was(layer, when):
    """accelerate's hooks, as `device_map` puts them on every layer, hold a forward of each."""
    stem = nn.Conv2d(3, 4, 4, 4) if layer == "Conv2d" else nn.Linear(6, 4)
    x = torch.randn(5, 3, 8, 8) if layer == "Conv2d" else torch.randn(5, 6)
    plain = nn.Sequential(stem, nn.Flatten(), nn.LazyLinear(2))
    plain(x)
    model = copy.deepcopy(plain)
    if when == "before":
        handle = apply_tract(model)
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    if when == "after":
        handle = apply_tract(model)
    for net in (plain, model):
        net(x).square().sum().backward()
    assert_close(model[0].weight.grad, expected(plain[0].weight.grad, x, plain[0], 0.1), 1e-5)
    handle.remove()
    model.zero_grad()
    model(x).square().sum().backward()
    assert torch.equal(model[0].weight.grad, plain[0].weight.grad)
    remove_hook_from_module(model, recurse=True)
    assert type(model[0]) is type(stem)
    model.zero_grad()
    model(x).square().sum().backward()
    assert torch.equal(model[0].weight.grad, plain[0].weight.grad)


def test_a_linear_layer_under_a_wrapped_forward_is_refused_by_name(accelerator_of):
    """Preparing the very layer for autocast wraps its forward, and a Linear's cannot be reached under it."""
    layer = accelerator_of(mixed_precision="bf16").prepare(nn.Linear(6, 4))
    with pytest.raises(
        TrActError, match=says("whose forward was replaced by", "call `apply_tract` before that is done")
    ):
        apply_tract(layer)
    assert type(layer) is nn.Linear


def test_a_model_that_reads_the_weight_itself_is_preconditioned_under_mixed_precision(accelerator_of):
    """prepare sets a forward on the model, which has captured that of its class."""
    x, plain = torch.randn(4, 3, 8, 8), Airbench()
    plain(x).square().sum().backward()
    wanted = expected(plain.whiten.weight.grad, x, plain.whiten, 0.1)
    for when in ("before", "after", "again"):
        accelerator, model = accelerator_of(mixed_precision="bf16"), Airbench()
        handle = None if when == "after" else apply_tract(model)
        prepared = accelerator.prepare(model)
        forward = vars(model)["forward"]
        if when == "again":
            handle.remove()
        if when != "before":
            apply_tract(model)
            handle = apply_tract(model)
        prepared(x).square().sum().backward()
        assert_close(model.whiten.weight.grad, wanted, 0.02)
        assert handle.stats()
        copied = copy.deepcopy(model)
        copied.zero_grad()
        copied(x).square().sum().backward()
        assert_close(copied.whiten.weight.grad, model.whiten.weight.grad, 1e-5)
        handle.remove()
        assert vars(model)["forward"] == forward


def test_save_state_and_load_state_carry_on_bit_exactly(accelerator_of, tmp_path):
    def step(count: int) -> None:
        for _ in range(count):
            accelerator.backward(model(**Images().batch()).loss)
            optimizer.step()
            optimizer.zero_grad()

    accelerator, model = accelerator_of(), small_vit()
    apply_tract(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    step(3)
    accelerator.save_state(str(tmp_path))
    step(3)
    wanted = weights(model)
    accelerator.load_state(str(tmp_path))
    assert not torch.equal(weights(model), wanted)
    step(3)
    assert torch.equal(weights(model), wanted)


@pytest.mark.parametrize("on", ["model", "layer"])
def test_the_hook_comes_and_goes_with_accelerates_own_tools(on):
    plain, batch = small_vit(), Images().batch()
    model = copy.deepcopy(plain)
    carrier = model if on == "model" else stem_of(model)
    assert add_hook_to_module(carrier, TrActHook(lam=0.2)) is carrier
    for net in (plain, model):
        net(**batch).loss.backward()
    wanted = expected(stem_of(plain).weight.grad, batch["pixel_values"], stem_of(plain), 0.2)
    assert_close(stem_of(model).weight.grad, wanted, 1e-5)
    remove_hook_from_module(carrier)
    assert not any(isinstance(module, TrActLayer) for module in model.modules())
    model.zero_grad()
    model(**batch).loss.backward()
    assert torch.equal(stem_of(model).weight.grad, stem_of(plain).weight.grad)
    assert not hasattr(carrier, "_hf_hook")


def test_a_second_hook_is_chained(accelerator_of):
    from accelerate.hooks import ModelHook

    class Count(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    model, counter = small_vit(), Count()
    add_hook_to_module(model, counter)
    add_hook_to_module(model, TrActHook(), append=True)
    model(**Images().batch()).loss.backward()
    assert counter.calls == 1
    assert isinstance(stem_of(model), TrActLayer)
    remove_hook_from_module(model)
    assert not isinstance(stem_of(model), TrActLayer)


def test_removing_the_hook_of_a_copy_leaves_the_original():
    model = nn.Sequential(nn.Linear(8, 2))
    add_hook_to_module(model, TrActHook())
    copied = copy.deepcopy(model)
    remove_hook_from_module(copied)
    assert isinstance(model[0], TrActLayer)
    assert not isinstance(copied[0], TrActLayer)


def test_the_hook_hands_every_option_on():
    model, group = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), object()
    add_hook_to_module(model, TrActHook(0.2, ["1"], "local", process_group=group))
    assert not isinstance(model[0], TrActLayer)
    preconditioner = model[1]._tract_preconditioner
    assert (preconditioner.config.lam, preconditioner.config.scope) == (0.2, "local")
    assert preconditioner.process_group is group
