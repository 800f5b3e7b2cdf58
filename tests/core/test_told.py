"""Never silently off: what a user is told when a layer does not hand on a preconditioned gradient."""

import copy
import gc
import inspect
import logging
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.utils.checkpoint import checkpoint

from helpers.models import Airbench, Gated, small_vit, trainer
from helpers.oracle import assert_close, expected
from hf_tract import TrActCallback, apply_tract, remove_tract, whiten_first_layer
from hf_tract.core import attach, first_step, forward


class Net(nn.Module):
    """Its first layer can be left out, and read by the model itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv2d(3, 4, 4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, without: bool = False, penalty: float = 0.0) -> torch.Tensor:
        h = x.mean((2, 3)).repeat(1, 2)[:, :4] if without else self.stem(x).mean((2, 3))
        loss = self.head(h).square().sum()
        return loss + penalty * self.stem.weight.square().sum() if penalty else loss


def step(model: nn.Module, *args, **kwargs) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 3, 8, 8), *args, **kwargs).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def told(caplog, monkeypatch):
    """What has been told so far, without what models of other tests would still be told of."""
    monkeypatch.setattr(first_step, "_watches", [])
    caplog.set_level(logging.WARNING, "hf_tract")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("hf_tract")]


def test_nothing_is_told_where_all_is_well(told):
    model = Net()
    apply_tract(model)
    for _ in range(2):
        step(model)
    assert told() == []


def test_a_layer_that_did_not_run_in_the_first_step_is_told_once(told):
    model = Net()
    apply_tract(model)
    for _ in range(3):
        step(model, without=True)
    (message,) = told()
    assert "stem has returned no preconditioned gradient (its weight has no gradient)" in message
    assert "a batch without images" in message


def test_a_forward_that_was_replaced_afterwards_is_told(told):
    model = Net()
    apply_tract(model)
    model.stem._conv_forward = lambda x, w, b: F.conv2d(x, w, b, 4)
    step(model)
    (message,) = told()
    assert "(its weight has a gradient that did not come through the layer)" in message
    assert "apply TrAct after it" in message


def test_nothing_is_told_where_gradients_are_asked_for_and_put_in_place(told):
    """As methods of several losses do: `torch.autograd.grad`, and `.grad` by hand."""
    model = Net()
    handle = apply_tract(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    grads = torch.autograd.grad(model(torch.randn(4, 3, 8, 8)), list(model.parameters()))
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        parameter.grad = grad
    optimizer.step()
    assert told() == []
    assert handle.stats()["stem"]["grad_norm"] > 0


def test_a_layer_that_was_exchanged_is_told(told):
    model = Net()
    apply_tract(model)
    model.stem = nn.Conv2d(3, 4, 4, 4)
    step(model)
    (message,) = told()
    assert message.startswith("TrAct: stem was exchanged for another module")


def test_a_layer_that_is_exchanged_later_has_no_figures_and_is_told_where_they_are_asked_for(told):
    model = Net()
    handle = apply_tract(model)
    step(model)
    assert handle.stats().keys() == {"stem"}
    model.stem = nn.Conv2d(3, 4, 4, 4)
    step(model)
    assert told() == []
    for _ in range(2):
        assert handle.stats() == {}
    (message,) = told()
    assert message.startswith("TrAct: stem was exchanged for another module")
    assert "stem: Conv2d, n=48 (exchanged since, without TrAct)" in repr(handle)


def test_a_layer_that_is_exchanged_later_is_told_after_a_while(told):
    model = Net()
    apply_tract(model)
    step(model)
    model.stem = nn.Conv2d(3, 4, 4, 4)
    train_a_hundred_steps(model)
    assert len(told()) == 1
    train_a_hundred_steps(model)
    assert len(told()) == 1


def test_of_several_layers_those_that_are_left_keep_their_figures(told):
    model = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(16, 1))
    handle = apply_tract(model, layers=["0", "1"])
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model[1] = nn.Conv2d(4, 4, 1)
    assert handle.stats().keys() == {"0"}
    assert "1: Conv2d, n=4 (exchanged since" in repr(handle)
    assert "0: Conv2d, n=48 (named by the user)" in repr(handle)
    model[0] = nn.Conv2d(3, 4, 4, 4)
    assert handle.stats() == {}
    assert [message.split()[1] for message in told() if "was exchanged" in message] == ["1", "0"]


@pytest.mark.parametrize("side", [16, 17])
def test_a_patch_of_very_many_numbers_is_told(told, side):
    apply_tract(nn.Sequential(nn.Conv3d(1, 2, side, side), nn.Flatten()))
    expected = [f"TrAct: 0 reads patches of n = {side**3} numbers."] if side > 16 else []
    assert [message.partition(" Every")[0] for message in told()] == expected


def test_a_layer_that_is_frozen_later_has_no_figures(told):
    model = Net()
    handle = apply_tract(model)
    step(model)
    model.stem.requires_grad_(False)
    step(model)
    assert handle.stats() == {}
    model.stem.requires_grad_(True)
    step(model)
    assert handle.stats().keys() == {"stem"}
    assert told() == []


def test_a_weight_that_is_used_elsewhere_too_is_told(told):
    model = Net()
    apply_tract(model)
    for _ in range(2):
        step(model, penalty=1.0)
    (message,) = told()
    assert "also gets a gradient from outside of its layer" in message


def test_a_compiled_optimizer_steps_on(told):
    model = Net()
    apply_tract(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 3, 8, 8)).backward()
    torch.compile(optimizer.step, backend="eager")()
    assert told() == []


def test_the_step_of_another_models_optimizer_says_nothing(told):
    model = Net()
    apply_tract(model)
    other = nn.Linear(2, 1)
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert told() == []
    step(model, without=True)
    assert len(told()) == 1


@pytest.mark.parametrize("end", ["remove", "collected", "again"])
def test_a_watch_ends_with_what_it_watches(told, end):
    model = Net()
    handle = apply_tract(model)
    if end == "remove":
        handle.remove()
    elif end == "again":
        apply_tract(model, lam=0.2)
    else:
        step(model)
        gone = weakref.ref(model)
        del model, handle
        gc.collect()
        assert gone() is None
        model = Net()
    step(model, without=True)
    assert len(told()) == (1 if end == "again" else 0)
    if end != "again":
        assert not [watch for watch in first_step._watches if watch._model() in (None, model)]
    remove_tract(model)


def test_a_watch_that_has_looked_ends_with_its_model(told):
    model = Net()
    apply_tract(model)
    step(model, without=True)
    assert len(told()) == 1
    del model
    gc.collect()
    assert not [watch for watch in first_step._watches if watch._model() is None]


def train_a_hundred_steps(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(first_step.STEPS_ELSEWHERE):
        model(torch.randn(4, 3, 8, 8)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("again", [False, True])
def test_a_model_that_is_made_anew_after_tract_was_applied_is_told(told, monkeypatch, again):
    """As by skorch's `fit()`, or where a script resumes by `model = torch.load(...)`."""
    monkeypatch.setattr(first_step, "PRECONDITIONERS", weakref.WeakValueDictionary())
    model = Net()
    apply_tract(model)
    model = Net()
    gc.collect()
    if again:
        apply_tract(model)
        monkeypatch.setattr(first_step, "PRECONDITIONERS", {0: attach.preconditioner_of(model.stem)})
    train_a_hundred_steps(model)
    if again:
        assert told() == []
        return
    (message,) = told()
    assert "none of them holds stem of the model that TrAct was applied to" in message
    train_a_hundred_steps(model)
    assert len(told()) == 1
    assert not [watch for watch in first_step._watches if watch._model() is None]


class Masked(nn.Conv2d):
    """Predicts pixels from those before them, as PixelCNN does."""

    def __init__(self) -> None:
        super().__init__(3, 4, 3, padding=1)
        self.register_buffer("mask", torch.ones_like(self.weight))
        self.mask[:, :, 1:] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.weight.data *= self.mask
        return super().forward(x)


@pytest.mark.parametrize("kind", ["in the forward", "pruned", "whole rows", "another buffer", "not at all"])
def test_a_masked_weight_is_told(told, kind):
    layer = Masked()
    if kind == "pruned":
        layer = prune.l1_unstructured(nn.Conv2d(3, 4, 3), "weight", 20)
    elif kind == "whole rows":
        layer = prune.ln_structured(nn.Conv2d(3, 4, 3), "weight", 2, n=1, dim=0)
    elif kind == "another buffer":
        layer = nn.Conv2d(3, 4, 3)
        layer.register_buffer("older", torch.zeros_like(layer.weight))
    elif kind == "not at all":
        layer.mask.fill_(1)
    model = nn.Sequential(layer, nn.ReLU())
    apply_tract(model, layers=["0"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.randn(4, 3, 8, 8)).sum().backward()
        optimizer.step()
    if kind not in ("in the forward", "pruned"):
        assert told() == []
        return
    (message,) = told()
    name = "mask" if kind == "in the forward" else "weight_mask"
    assert f"the weight of 0 seems to be masked (by {name})" in message


def test_trainer_looks_after_its_first_step_whatever_the_optimizer(tmp_path, told):
    """DeepSpeed's optimizer holds none of the model's parameters: the callback itself looks."""

    class Blind(TrActCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 0:
                model.get_submodule(self.handle_of(model).layers[0].name)._conv_forward = lambda x, w, b: F.conv2d(
                    x, w, b, 4
                )

    class Hidden(torch.optim.SGD):
        def __init__(self, params, lr):
            self.real = list(params)
            super().__init__([torch.zeros(1, requires_grad=True)], lr)

    run = trainer(tmp_path, model := small_vit(), [Blind()], max_steps=2)
    run.optimizer = Hidden(model.parameters(), lr=0.1)
    run.train()
    assert len(told()) == 1
    assert "has returned no preconditioned gradient" in told()[0]


def test_a_trainable_layer_beside_a_frozen_one_is_watched_too(told):
    """As LoRA's beside its base layer, which goes without saying if it has peft's name."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer, self.lora = nn.Conv2d(3, 4, 4, 4).requires_grad_(False), nn.Conv2d(3, 4, 4, 4)

        def forward(self, x: torch.Tensor, without: bool = False) -> torch.Tensor:
            return (
                self.base_layer(x).sin() if without else self.base_layer(x) + self.lora(x)
            ).square().sum() + self.lora.bias.sum()

    model = Beside()
    assert [layer.name for layer in apply_tract(model).layers] == ["lora"]
    step(model, without=True)
    (message,) = told()
    assert "lora has returned no preconditioned gradient" in message


def test_a_step_of_another_optimizer_is_not_the_layers_first(told):
    """As a GAN's, or that of a head alone."""
    model = Net()
    apply_tract(model)
    head, stem = (torch.optim.SGD(part.parameters(), lr=0.1) for part in (model.head, model.stem))
    model(torch.randn(4, 3, 8, 8), without=True).backward()
    head.step()
    assert told() == []
    stem.step()
    (message,) = told()
    assert "stem has returned no preconditioned gradient" in message


def test_find_unused_parameters_is_told(told, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        apply_tract(DistributedDataParallel(Net(), find_unused_parameters=True))
    finally:
        torch.distributed.destroy_process_group()
    (message,) = told()
    assert "`find_unused_parameters=True`" in message
    assert "scope='local'" in message


@pytest.mark.parametrize("layers", ["auto", "whiten"])
def test_a_weight_that_its_parent_reads_is_preconditioned_there(layers, told):
    plain, model = Airbench(), Airbench()
    handle = apply_tract(model, layers=layers)
    parts = [torch.randn(4, 3, 8, 8), torch.randn(2, 3, 8, 8)]
    for net in (plain, model):
        for x in parts:
            net(x).square().sum().backward()
    wanted = expected(plain.whiten.weight.grad, parts, plain.whiten, 0.1)
    assert_close(model.whiten.weight.grad, wanted, 1e-5)
    assert torch.equal(model.conv.bias.grad, plain.conv.bias.grad)
    assert type(model).__name__ == "Airbench"  # which transformers would write into a config
    handle.remove()
    assert type(model) is Airbench
    assert sorted(vars(model)) == sorted(vars(plain))
    assert told() == []


class ReplacedLinear(torch.autograd.Function):
    """What DeepSpeed's ZeRO-3 puts in the place of `F.linear`, for the whole process."""

    @staticmethod
    def forward(ctx, x, weight, bias=None):
        ctx.save_for_backward(x, weight)
        return x @ weight.t() + (0 if bias is None else bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x, grad.sum(0)


class Scaled(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(48, 4)

    def forward(self, x):
        return F.linear(x.flatten(1), self.stem.weight, self.stem.bias)


@pytest.mark.parametrize("how", ["a layer", "own forward", "parent reads"])
def test_where_a_library_replaces_linear_the_layer_is_found_and_preconditioned(how, monkeypatch, told):
    plain = Reads() if how == "parent reads" else nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    if how == "own forward":
        plain[1] = Scaled(48, 4)
    model, x = copy.deepcopy(plain), torch.randn(6, 3, 4, 4)
    monkeypatch.setattr(F, "linear", ReplacedLinear.apply)
    whiten_first_layer(copy.deepcopy(model), x)
    handle = apply_tract(model)
    for net in (plain, model):
        net(x).square().sum().backward()
    (layer,) = handle.layers
    ordinary = plain.get_submodule(layer.name)
    wanted = expected(ordinary.weight.grad, x.flatten(1), ordinary, 0.1)
    assert_close(layer.module.weight.grad, wanted, 1e-5)
    assert F.linear == ReplacedLinear.apply
    assert told() == []


@pytest.mark.parametrize(
    "how", ["two calls", "weight norm", "spectral norm", "own forward", "local scope", "checkpoint", "penalty"]
)
def test_nothing_is_told_where_the_layer_runs_twice_or_its_weight_is_made_of_another(how, told):
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias, self.stride)

    layer = Standardised(3, 4, 4, 4) if how == "own forward" else nn.Conv2d(3, 4, 4, 4)
    if how == "weight norm":
        nn.utils.parametrizations.weight_norm(layer)
    if how == "spectral norm":
        nn.utils.parametrizations.spectral_norm(layer)
    model = nn.Sequential(layer)
    apply_tract(model, scope="local" if how == "local scope" else "global")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        x, y = torch.randn(4, 3, 8, 8), torch.randn(2, 3, 8, 8, requires_grad=True)
        if how == "checkpoint":
            first, second = (checkpoint(model, each, use_reentrant=False) for each in (x, y))
        else:
            first, second = model(x), model(y)
        loss = first.square().sum() + second.square().sum()
        if how == "penalty":
            loss = loss + torch.autograd.grad(second.tanh().sum(), y, create_graph=True)[0].square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert told() == []


@pytest.mark.parametrize("make", [Airbench, Gated])
def test_forwards_keep_the_signature_that_trainer_reads(make):
    plain, model = make(), make()
    apply_tract(model, layers="whiten" if isinstance(model, Airbench) else model)
    assert type(model) is not type(plain)
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)


def test_a_layer_that_is_exchanged_after_tract_was_removed_is_not_told(told):
    model = Net()
    apply_tract(model)
    remove_tract(model)
    model.stem = nn.Conv2d(3, 4, 4, 4)
    step(model)
    assert told() == []


@pytest.mark.parametrize("mark", ["the weight", "a hook of the layer"])
def test_where_opacus_clips_single_examples_the_gradient_is_ordinary_and_told(told, mark, monkeypatch):
    monkeypatch.setattr(forward, "_warned", set())
    # Opacus' ghost clipping ends with an ordinary backward. Under FSDP2 its mark is not on the weights that run.
    model, plain = Net(), Net()
    apply_tract(model)
    if mark == "the weight":
        model.stem.weight.grad_sample = None
    else:
        capture = types.FunctionType((lambda *_: None).__code__, {"__name__": "opacus.grad_sample"})
        model.stem.register_forward_hook(capture)
    x = torch.randn(4, 3, 8, 8)
    for net in (model, plain):
        net(x).backward()
    assert torch.equal(model.stem.weight.grad, plain.stem.weight.grad)
    (message,) = told()
    assert "example by example" in message


def test_expanded_weights_give_ordinary_gradients_of_each_example(told, monkeypatch):
    monkeypatch.setattr(forward, "_warned", set())
    model, plain = Net(), Net()
    apply_tract(model)
    x = torch.randn(4, 3, 8, 8)
    for net in (model, plain):
        stem = call_for_per_sample_grads(net.stem, batch_size=4, loss_reduction="sum")
        stem(x).square().sum().backward()
    assert torch.equal(model.stem.weight.grad_sample, plain.stem.weight.grad_sample)
    (message,) = told()
    assert "example by example" in message


class TrainsACopy(nn.Module):
    """Freezes a module and trains its copy, as peft's `modules_to_save` does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module, self.copy = module, copy.deepcopy(module)
        module.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.copy(x)


def test_a_trained_copy_in_the_place_of_a_frozen_layer_is_checked_and_not_the_layer(told):
    model = Net()
    handle = apply_tract(model)
    model.stem = TrainsACopy(model.stem)
    step(model)
    assert told() == []
    assert list(handle.stats()) == ["stem.copy"]
    model = Net()
    apply_tract(model)
    model.stem = TrainsACopy(model.stem)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(100 * torch.randn(4, 3, 8, 8)).backward()
    optimizer.step()
    (message,) = told()
    assert "stem.copy" in message
    assert "standardise" in message


def test_a_hundred_steps_of_another_model_are_told_once(told, monkeypatch):
    monkeypatch.setattr(first_step, "PRECONDITIONERS", {})
    model, other = Net(), Net()
    apply_tract(model)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.0)
    for _ in range(99):
        optimizer.step()
    assert told() == []
    for _ in range(200):
        optimizer.step()
    another = torch.optim.SGD(other.parameters(), lr=0.0)
    for _ in range(101):
        another.step()
    (message,) = told()
    assert "100 steps" in message
    step(model, without=True)
    assert "no preconditioned gradient" in told()[1]


def test_many_optimizers_that_step_in_the_backward_are_no_reason_to_warn(told, monkeypatch):
    """One for each parameter, of which the first layer's comes last."""
    monkeypatch.setattr(first_step, "PRECONDITIONERS", {})
    model = nn.Sequential(nn.Conv2d(3, 4, 4, 4), *(nn.Conv2d(4, 4, 1) for _ in range(60)))
    apply_tract(model)
    for parameter in model.parameters():
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        parameter.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
    model(torch.randn(4, 3, 8, 8)).square().mean().backward()
    assert told() == []


@pytest.mark.parametrize("how", ["checkpoint", "by hand"])
def test_a_step_without_gradients_is_not_the_first(told, how):
    """torch makes such a step before it loads an optimizer's state; the real first one is checked."""
    model = Net()
    apply_tract(model)
    optimizer = torch.optim.AdamW(model.parameters())
    if how == "checkpoint":
        get_optimizer_state_dict(model, optimizer)
    else:
        optimizer.step()
    assert told() == []
    step(model, without=True)
    assert "no preconditioned gradient" in told()[0]


def test_a_hundred_steps_without_any_gradient_are_told(told):
    """As of a backward that is forgotten."""
    model = Net()
    apply_tract(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(101):
        model(torch.randn(4, 3, 8, 8))
        optimizer.step()
    (message,) = told()
    assert "stem has returned no preconditioned gradient (its weight has no gradient)" in message


def test_a_model_on_the_meta_device_steps():
    with torch.device("meta"):
        model = Net()
        apply_tract(model)
        step(model)


def test_a_watch_ends_with_its_model_even_if_no_optimizer_of_torch_steps():
    model = Net()
    handle = apply_tract(model)
    watch = weakref.ref(handle.first_step)
    preconditioner = weakref.ref(attach.preconditioner_of(model.stem))
    del model, handle
    gc.collect()
    assert preconditioner() is None
    other = Net()
    apply_tract(other)
    assert watch() is None


def test_the_name_in_the_advice_on_a_frozen_layer_is_that_of_the_wrapped_model(told):
    model = nn.DataParallel(Net())
    model.module.stem.requires_grad_(False)
    apply_tract(model)
    (message,) = told()
    assert "`model.get_submodule('module.stem').requires_grad_(True)`" in message
    model.get_submodule("module.stem").requires_grad_(True)


def test_steps_of_another_model_after_tract_was_removed_say_nothing(told, monkeypatch):
    monkeypatch.setattr(first_step, "PRECONDITIONERS", {})
    model, other = Net(), Net()
    apply_tract(model).remove()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.0)
    for _ in range(101):
        optimizer.step()
    assert told() == []


def test_an_optimizer_with_other_copies_of_the_weights_is_no_reason_to_warn(told):
    model = Net()
    apply_tract(model)
    masters = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(masters, lr=0.1)
    for _ in range(101):
        model(torch.randn(4, 3, 8, 8)).backward()
        optimizer.step()
        model.zero_grad()
    assert told() == []
