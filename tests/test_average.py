"""`every` and `ema`: a factor that serves several optimizer steps, and a running average of second moments."""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import hf_tract.operators
from hf_tract import TrActError, apply_tract
from hf_tract.average import KeptMoment
from oracle import assert_close, moment, precondition, says

LAM = 0.1


@pytest.fixture
def layers():
    """The same layer twice: plain, and to be tapped."""
    layer = nn.Conv2d(3, 4, 4, stride=4, dtype=torch.float64)
    return copy.deepcopy(layer), layer


def images(count: int = 6) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, dtype=torch.float64) * torch.rand(count, 1, 1, 1).double() * 3


def grad(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    layer.zero_grad()
    layer(x).square().sum().backward()
    return layer.weight.grad.clone()


def count_moments(monkeypatch) -> list[int]:
    counts = []
    original = hf_tract.operators.patch_moments
    monkeypatch.setattr(hf_tract.operators, "patch_moments", lambda x, *rest: counts.append(len(x)) or original(x, *rest))
    return counts


def test_every_kth_moment_serves_k_steps(layers, monkeypatch):
    plain, layer = layers
    apply_tract(layer, LAM, every=3)
    counts = count_moments(monkeypatch)
    batches = [images(count) for count in (4, 5, 6, 7, 8, 9, 10)]
    for step, x in enumerate(batches):
        newest = moment(batches[step - step % 3], plain)
        assert_close(grad(layer, x), precondition(grad(plain, x), newest, LAM), 1e-12)
    assert counts == [4, 7, 10]


@pytest.mark.parametrize("ema", [0.5, 0.95])
@pytest.mark.parametrize("every", [1, 2])
def test_the_average_is_adams_without_its_starts_bias(layers, every, ema):
    plain, layer = layers
    apply_tract(layer, LAM, ema=ema, every=every)
    average = taken = 0.0
    for step in range(5):
        x = images()
        if step % every == 0:
            average, taken = ema * average + (1 - ema) * moment(x, plain), taken + 1
        wanted = precondition(grad(plain, x), average / (1 - ema**taken), LAM)
        assert_close(grad(layer, x), wanted, 1e-10)


def test_accumulated_micro_steps_are_one_step(layers, monkeypatch):
    plain, layer = layers
    handle = apply_tract(layer, LAM, every=2)
    counts = count_moments(monkeypatch)
    first = images(8)
    for x in (first, images(8), images(8)):
        layer.zero_grad()
        with handle.no_sync():
            layer(x[:3]).square().sum().backward()
        layer(x[3:]).square().sum().backward()
        used = first if counts == [3, 5] else x
        assert_close(layer.weight.grad, precondition(grad(plain, x), moment(used, plain), LAM), 1e-12)
    assert counts == [3, 5, 3, 5]


def test_two_calls_in_one_step_keep_one_moment(layers):
    plain, layer = layers
    apply_tract(layer, LAM, every=2)
    x, y, z = images(3), images(5), images()
    (layer(x).square().sum() + layer(y).square().sum()).backward()
    assert_close(grad(layer, z), precondition(grad(plain, z), moment([x, y], plain), LAM), 1e-12)


@pytest.mark.parametrize("settings", [{"every": 3}, {"ema": 0.9}, {"every": 2, "ema": 0.9}])
def test_a_broken_batch_is_seen_and_not_kept(layers, settings):
    plain, layer = layers
    apply_tract(layer, LAM, **settings)
    assert grad(layer, images() * torch.nan).isnan().all()
    x = images()
    later = grad(layer, x)  # on no moment yet where `every` keeps the factor, and the gradient stays as it is
    wanted = grad(plain, x) if "every" in settings else precondition(grad(plain, x), moment(x, plain), LAM)
    assert_close(later, wanted, 1e-9)


@pytest.mark.parametrize("settings", [{"every": 3}, {"ema": 0.9}, {"every": 2, "ema": 0.5}])
def test_a_resumed_run_is_the_same_bit_for_bit(layers, settings, tmp_path):
    _, layer = layers
    resumed = copy.deepcopy(layer)
    batches = [images() for _ in range(6)]
    handle = apply_tract(layer, LAM, **settings)
    for x in batches[:2]:
        grad(layer, x)
    torch.save(handle.state_dict(), tmp_path / "state.pt")
    again = apply_tract(resumed, LAM, **settings)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for x in batches[2:]:
        assert torch.equal(grad(layer, x), grad(resumed, x))


def test_accelerate_saves_and_loads_the_handle(layers, tmp_path):
    _, layer = layers
    handle = apply_tract(layer, LAM, ema=0.9)
    accelerator = Accelerator(cpu=True)
    accelerator.register_for_checkpointing(handle)
    grad(layer, images())
    accelerator.save_state(tmp_path)
    x = images()
    wanted = grad(layer, x)
    grad(layer, images())
    accelerator.load_state(tmp_path)
    assert torch.equal(grad(layer, x), wanted)


def test_without_the_options_there_is_no_state(layers):
    _, layer = layers
    handle = apply_tract(layer, LAM)
    grad(layer, images())
    assert handle.state_dict() == {}
    handle.load_state_dict({})


def test_the_models_own_state_and_copies_do_not_carry_it(layers):
    plain, layer = layers
    apply_tract(layer, LAM, ema=0.9)
    grad(layer, images())
    assert layer.state_dict().keys() == plain.state_dict().keys()
    x = images()
    assert_close(grad(copy.deepcopy(layer), x), precondition(grad(plain, x), moment(x, plain), LAM), 1e-12)


def test_a_reset_forgets_the_accumulation_alone(layers):
    plain, layer = layers
    handle, x, y = apply_tract(layer, LAM, every=2), images(), images()
    grad(layer, x)
    with handle.no_sync():
        grad(layer, images())
    handle.reset()
    assert_close(grad(layer, y), precondition(grad(plain, y), moment(x, plain), LAM), 1e-12)


def test_a_state_of_another_layer_is_an_error(layers):
    _, layer = layers
    handle = apply_tract(layer, LAM, every=2)
    grad(layer, images())
    before = handle.state_dict()
    for wrong in ({"": {"kept": torch.zeros(10), "steps": 1}}, {"stem": before[""]}):
        with pytest.raises(TrActError, match=says("`state_dict` has", "this model's layers need {'': 2305}")):
            handle.load_state_dict(wrong)
    assert torch.equal(handle.state_dict()[""]["kept"], before[""]["kept"])


def test_the_options_are_told(layers):
    assert repr(apply_tract(layers[1], LAM, every=4, ema=0.9)).startswith("TrAct(lam=0.1, scope='global', every=4, ema=0.9)\n")


def test_no_patches_are_not_kept():
    kept = KeptMoment(0.5, LAM)
    c = torch.eye(3)[None]
    kept.update(2 * c, torch.tensor(4.0))
    kept.update(0 * c, torch.tensor(0.0))
    assert torch.equal(kept.mean(c.device, 3), 2 * c)
