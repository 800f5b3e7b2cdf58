"""Attach and detach: what changes on the model (next to nothing) and what is left (nothing)."""

import copy
import io
import multiprocessing
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import hf_tract.core.forward
from helpers.models import Adapted, Airbench, Gated
from helpers.oracle import assert_close, expected, says
from hf_tract import TrActConfig, TrActError, apply_tract, remove_tract, whiten_first_layer


class StdConv2d(nn.Conv2d):
    """A convolution of a class that hf-tract has never seen: its weight is standardised first."""

    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, w, self.bias, self.stride, self.padding)


def network(stem: nn.Module) -> nn.Sequential:
    return nn.Sequential(stem, nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 3))


STEMS = [nn.Conv2d(3, 4, 2, 2), StdConv2d(3, 4, 2, 2), parametrizations.weight_norm(nn.Conv2d(3, 4, 2, 2))]
MODELS = pytest.mark.parametrize("stem", STEMS, ids=["Conv2d", "StdConv2d", "weight_norm"])


def train_step(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    model(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


def snapshot(model: nn.Module) -> dict[str, tuple[type, list[str]]]:
    """Class and attributes of every module."""
    return {name: (type(module), sorted(vars(module))) for name, module in model.named_modules()}


@MODELS
def test_the_model_looks_the_same_but_for_one_gradient(stem):
    torch.manual_seed(0)
    plain, x = network(copy.deepcopy(stem)), torch.randn(5, 3, 8, 8)
    model = copy.deepcopy(plain)
    apply_tract(model, lam=0.1)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert isinstance(model[0], type(plain[0]))
    state, plain_state = model.state_dict(), plain.state_dict()
    assert list(state) == list(plain_state)
    assert all(torch.equal(state[name], plain_state[name]) for name in state)
    assert torch.equal(model(x), plain(x))
    names = [name for name, _ in plain.named_parameters()]
    grads = dict(zip(names, zip(train_step(model, x), train_step(plain, x), strict=True), strict=True))
    changed = [name for name, (a, b) in grads.items() if not torch.equal(a, b)]
    assert changed == [name for name in names if name.startswith("0.") and name != "0.bias"]


@MODELS
def test_remove_leaves_nothing(stem):
    model = network(copy.deepcopy(stem))
    before = snapshot(model)
    handle = apply_tract(model)
    assert snapshot(model) != before
    handle.remove()
    assert snapshot(model) == before
    handle.remove()
    remove_tract(model)
    assert snapshot(model) == before
    assert handle.stats() == {}


def test_twice_is_once_and_the_last_settings_hold():
    plain, x = network(nn.Conv2d(3, 4, 2, 2)), torch.randn(5, 3, 8, 8)
    model, before = copy.deepcopy(plain), snapshot(plain)
    first = apply_tract(model, lam=0.1)
    once = snapshot(model)
    apply_tract(model, lam=0.4)
    assert snapshot(model) == once
    assert_close(train_step(model, x)[0], expected(train_step(plain, x)[0], x, plain[0], 0.4), 1e-5)
    first.remove()
    assert snapshot(model) == before


def test_other_layers_replace_the_old_ones_also_in_the_middle_of_an_accumulation():
    """What was handed on stays; the layer that is left goes on with ordinary gradients."""
    plain, parts = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), [torch.randn(2, 3, 8, 8) for _ in range(2)]
    model, before = copy.deepcopy(plain), snapshot(plain)
    apply_tract(model, lam=0.1, layers="0")
    wanted = []
    for part in parts:
        train_step(plain, part)
        wanted.append([layer.weight.grad.clone() for layer in plain])
    model(parts[0]).square().mean().backward()
    handle = apply_tract(model, lam=0.2, layers="1")
    assert [type(layer).__name__ for layer in model] == ["Conv2d", "TrActConv2d"]
    model(parts[1]).square().mean().backward()
    assert_close(model[0].weight.grad, expected(wanted[0][0], parts[0], plain[0], 0.1) + wanted[1][0], 1e-5)
    second = expected(wanted[1][1], plain[0](parts[1]).detach(), plain[1], 0.2)
    assert_close(model[1].weight.grad, wanted[0][1] + second, 1e-5)
    handle.remove()
    assert snapshot(model) == before


def test_the_handle_is_a_context_manager():
    model = network(nn.Conv2d(3, 4, 2, 2))
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt), apply_tract(model):
        raise KeyboardInterrupt
    assert snapshot(model) == before


class HoldsItsHandle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network(nn.Conv2d(3, 4, 2, 2))
        self.tract = apply_tract(self.net)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def test_a_model_that_holds_its_handle_is_copied_with_a_handle_of_its_own():
    model = HoldsItsHandle()
    other = copy.deepcopy(model)
    other(torch.randn(2, 3, 8, 8)).sum().backward()
    assert list(other.tract.stats()) == ["0"]
    assert model.tract.stats() == {}
    other.tract.remove()
    assert type(other.net[0]) is nn.Conv2d
    assert type(model.net[0]) is not nn.Conv2d
    assert copy.deepcopy(model.tract) is copy.copy(model.tract) is model.tract


def test_a_model_that_holds_its_handle_is_pickled_without_it():
    model = HoldsItsHandle()
    data = pickle.dumps(model)
    assert b"hf_tract" not in data
    loaded = pickle.loads(data)
    assert loaded.tract is None
    assert type(loaded.net[0]) is nn.Conv2d


def test_a_copy_of_a_compiled_layer_reads_its_own_weight():
    """As accelerate's regional compilation makes them; ordinary layers are copied so too."""
    model, x = network(nn.Conv2d(3, 4, 2, 2)), torch.randn(2, 3, 8, 8)
    apply_tract(model)
    model[0].compile(backend="eager")
    other = copy.deepcopy(model)
    assert torch.equal(other(x), model(x))
    nn.init.zeros_(other[0].weight)
    nn.init.zeros_(other[0].bias)
    assert not other[0](x).any()
    assert [layer.name for layer in apply_tract(model, lam=0.2).layers] == ["0"]


@pytest.mark.parametrize("stem", STEMS[:2], ids=["Conv2d", "StdConv2d"])
def test_a_deep_copy_is_a_working_copy_of_its_own(stem):
    model, x = network(copy.deepcopy(stem)), torch.randn(5, 3, 8, 8)
    apply_tract(model, lam=0.3)
    model(x).sum().backward()  # what is gathered half-way stays with the original
    other = copy.deepcopy(model)
    assert type(other[0]) is type(model[0])
    for mine, theirs in zip(train_step(model, x), train_step(other, x), strict=True):
        assert torch.equal(mine, theirs)
    remove_tract(model)
    assert type(other[0]) is not type(model[0])
    remove_tract(other)
    assert snapshot(other) == snapshot(model)


@pytest.mark.parametrize("stem", STEMS[:2], ids=["Conv2d", "StdConv2d"])
@pytest.mark.parametrize("how", ["copy", "pickle", "torch.save"])
def test_copies_that_are_handed_on_are_ordinary(stem, how):
    model = network(copy.deepcopy(stem))
    before = snapshot(model)
    apply_tract(model, lam=0.3)
    if how == "copy":
        other = network(copy.copy(model[0]))
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert snapshot(other) == before
    assert torch.equal(other[0].weight, model[0].weight)
    assert "TrAct" in type(model[0]).__name__


def test_a_saved_model_loads_where_hf_tract_is_not_installed(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.Flatten(), nn.LazyLinear(3))
    model(torch.zeros(1, 3, 8, 8))
    apply_tract(model)
    torch.save(model, tmp_path / "model.pt")
    code = (
        "import sys; sys.modules['hf_tract'] = None\n"
        "import torch\n"
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "assert type(model[0]) is torch.nn.Conv2d and model(torch.zeros(2, 3, 8, 8)).shape == (2, 3)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_parametrized_layer_copies_and_does_not_pickle_as_ever():
    model = network(parametrizations.weight_norm(nn.Conv2d(3, 4, 2, 2)))
    apply_tract(model)
    x = torch.randn(5, 3, 8, 8)
    for mine, theirs in zip(train_step(model, x), train_step(copy.deepcopy(model), x), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(RuntimeError, match="parametrized modules"):
        pickle.dumps(model)


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(3, 4, 2, 2), lambda: nn.Linear(8, 4)], ids=["Conv2d", "Linear"])
def test_a_weight_that_is_computed_from_others_is_computed_once_in_a_forward(make):
    """Spectral norm takes a step of its power iteration each time that the weight is read."""
    plain = parametrizations.spectral_norm(make())
    layer, x = copy.deepcopy(plain), torch.randn(5, 3, 8, 8)
    apply_tract(layer)
    for _ in range(2):
        assert torch.equal(layer(x), plain(x))


def test_the_standardised_weight_is_the_one_that_is_preconditioned():
    layer, x = StdConv2d(3, 4, 2, 2, dtype=torch.float64), torch.randn(5, 3, 8, 8, dtype=torch.float64)
    plain = copy.deepcopy(layer)
    apply_tract(layer, lam=0.1)
    train_step(layer, x)
    w = plain.weight
    standard = ((w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)).detach().requires_grad_()
    nn.functional.conv2d(x, standard, plain.bias, 2).square().mean().backward()
    handed_on = expected(standard.grad, x, plain, 0.1)
    w = plain.weight
    ((w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)).backward(handed_on)
    assert_close(layer.weight.grad, plain.weight.grad, 1e-10)


def test_load_state_dict_with_assign_keeps_tract():
    model, x = network(nn.Conv2d(3, 4, 2, 2)), torch.randn(5, 3, 8, 8)
    apply_tract(model)
    plain = network(nn.Conv2d(3, 4, 2, 2))
    model.load_state_dict(copy.deepcopy(plain.state_dict()), assign=True)
    assert_close(train_step(model, x)[0], expected(train_step(plain, x)[0], x, plain[0], 0.1), 1e-5)


def test_pruned_and_hooked_layers_keep_their_ways():
    model, x = network(prune.l1_unstructured(nn.Conv2d(3, 4, 2, 2), "weight", 5)), torch.randn(5, 3, 8, 8)
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    apply_tract(model)
    model(x).sum().backward()
    assert seen == [1]
    assert (model[0].weight_orig.grad == 0).sum() == 5


def test_a_removed_handle_takes_off_a_class_that_something_else_covered():
    """FSDP2 puts a class of its own on top of a layer's; what is taken off is ours alone."""
    layer = nn.Conv2d(3, 4, 2, 2)
    handle = apply_tract(layer)

    class OnTop:
        pass

    layer.__class__ = type("OnTopConv2d", (OnTop, type(layer)), {"answer": 42})
    handle.remove()
    assert isinstance(layer, OnTop)
    assert layer.answer == 42
    assert [cls.__name__ for cls in type(layer).__mro__[:3]] == ["OnTopConv2d", "OnTop", "Conv2d"]
    assert layer(torch.randn(1, 3, 8, 8)).shape == (1, 4, 4, 4)


@pytest.mark.parametrize("lam", [0, -0.1, float("nan"), float("inf"), "0.1", None, True])
def test_lam_must_be_a_positive_finite_number(lam):
    model = network(nn.Conv2d(3, 4, 2, 2))
    before = snapshot(model)
    with pytest.raises(TrActError, match=says("`lam`", f"={lam!r}", "must be a positive finite number")):
        apply_tract(model, lam=lam)
    assert snapshot(model) == before


@pytest.mark.parametrize("layers", [None, 3, [], "", [3]])
def test_layers_of_a_config_are_names(layers):
    with pytest.raises(TrActError, match=says("`layers` (=", "must be 'auto', a layer's name or pattern")):
        TrActConfig(layers=layers)


def test_scope_must_be_one_of_two():
    with pytest.raises(TrActError, match=says("`scope` (='mean') must be 'global' or 'local'.")):
        apply_tract(network(nn.Conv2d(3, 4, 2, 2)), scope="mean")  # type: ignore[arg-type]


def test_a_layer_that_runs_no_known_operation_says_so():
    class Sparse(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T

    layer = Sparse(3, 2)
    apply_tract(layer, layers=layer)
    with pytest.raises(TrActError, match=says("Sparse.forward ran no convolution or linear operation")):
        layer(torch.randn(4, 3))


@pytest.mark.parametrize("with_gate", [True, False])
def test_a_layer_with_a_forward_of_its_own_preconditions_its_own_weight_alone(with_gate):
    layer, x = Gated().double(), torch.randn(5, 3, 8, 8).double()
    plain = copy.deepcopy(layer)
    plain(x).square().sum().backward()
    layers = [layer, layer.gate] if with_gate else [layer]
    apply_tract(layer, layers=layers)
    layer(x).square().sum().backward()
    assert_close(layer.weight.grad, expected(plain.weight.grad, x, plain, 0.1), 1e-11)
    gate = plain.gate.weight.grad
    if with_gate:
        gate = expected(gate, x, plain.gate, 0.1)
    assert_close(layer.gate.weight.grad, gate, 1e-11)


@pytest.mark.parametrize("frozen", [True, False])
def test_the_low_rank_of_an_adapted_layer_keeps_its_ordinary_gradient(frozen):
    layer, x = Adapted(12, 4).double(), torch.randn(9, 12).double()
    plain = copy.deepcopy(layer)
    plain(x).square().sum().backward()
    apply_tract(layer, layers=layer)
    layer.weight.requires_grad_(not frozen)
    layer(x).square().sum().backward()
    for name in ("a", "b", "bias"):
        assert torch.equal(getattr(layer, name).grad, getattr(plain, name).grad)
    if not frozen:
        assert_close(layer.weight.grad, expected(plain.weight.grad, x, plain, 0.1), 1e-11)


def test_a_start_is_whitened_by_what_the_layers_own_weight_reads():
    class GatedByOthers(Gated):
        def forward(self, x):
            return nn.Conv2d.forward(self, x) * self.gate(5 * x + 1).sigmoid()

    layer = GatedByOthers()
    x = torch.randn(50, 3, 8, 8).cumsum(-1)
    other = nn.Conv2d(3, 4, 2, 2)
    other.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    before = layer.weight.detach().clone()
    for each in (layer, other):
        whiten_first_layer(each, x, layers=[each], force=True)
    assert_close(layer.weight, other.weight, 1e-6)
    assert (layer.weight - before).norm() > 0.1 * before.norm()


def test_a_model_without_values_runs():
    model = network(nn.Conv2d(3, 4, 2, 2)).to("meta")
    apply_tract(model)
    model(torch.empty(2, 3, 8, 8, device="meta")).sum().backward()
    assert model[0].weight.grad.is_meta


def test_another_default_device_changes_nothing():
    """The meta device stands for a GPU."""
    layer, x = nn.Conv2d(3, 40, 4, 4), torch.randn(20, 3, 8, 8)
    handle = apply_tract(layer)
    layer(x).square().sum().backward()
    with torch.device("meta"):
        assert handle.stats()[""]["condition"] > 1
        whiten_first_layer(layer, x)


def test_nested_rows_have_the_ordinary_gradient_and_a_warning(caplog, monkeypatch):
    monkeypatch.setattr(hf_tract.core.forward, "_warned", set())
    layer = nn.Linear(12, 4)
    plain = copy.deepcopy(layer)
    apply_tract(layer, layers=layer)
    x = torch.nested.nested_tensor([torch.randn(3, 12), torch.randn(5, 12)], layout=torch.jagged)
    compiled = torch.compile(layer, backend="aot_eager")
    for each in (layer, plain):
        each(x).values().sum().backward()
    assert torch.equal(layer.weight.grad, plain.weight.grad)
    layer.zero_grad()
    compiled(x).values().sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
    assert "TrAct: for nested tensors the first layer has its ordinary gradient." in caplog.text


def test_a_frozen_layer_beside_others_is_told(caplog):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(3, 4, 2, 2)

        def forward(self, x):
            return self.left(x) + self.right(x)

    model = Two()
    model.left.requires_grad_(False)
    assert [layer.name for layer in apply_tract(model).layers] == ["right"]
    assert "TrAct: left is frozen and has no TrAct; other first layers have it." in caplog.text


def test_a_layer_made_of_anothers_attributes_gets_tract_of_its_own():
    class Mine(nn.Conv2d):
        pass

    layer = nn.Conv2d(3, 4, 2, 2)
    apply_tract(layer)
    mine = Mine.__new__(Mine)
    mine.__dict__ = layer.__dict__.copy()
    handle = apply_tract(nn.Sequential(mine), layers="0")
    mine(torch.randn(2, 3, 8, 8)).sum().backward()
    assert handle.stats()["0"]["grad_norm"] > 0


def tell_class(model):
    assert type(model[0]).__name__ == "Conv2d"


def test_a_model_that_another_process_gets_is_ordinary_and_that_is_told(caplog):
    model = nn.Sequential(nn.Conv2d(3, 4, 2, 2))
    apply_tract(model)
    pickle.dumps(model)
    assert "another process" not in caplog.text
    process = multiprocessing.get_context("spawn").Process(target=tell_class, args=(model,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert "TrAct: a model that is handed to another process is the ordinary one there." in caplog.text


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (4, 8, 8), (2, 3), (8,)])
def test_an_input_that_does_not_fit_gets_torchs_own_error(shape):
    layer, x = nn.Conv2d(3, 4, 2, 2), torch.randn(shape)
    with pytest.raises(RuntimeError) as plain:
        layer(x)
    apply_tract(layer)
    with pytest.raises(RuntimeError) as preconditioned:
        layer(x)
    assert str(preconditioned.value) == str(plain.value)
    assert "channels" in str(plain.value) or "dimension" in str(plain.value) or "Expected" in str(plain.value)


def test_config_goes_to_json_and_back(tmp_path):
    config = TrActConfig(lam=0.25, layers=("stem.*", "conv1"), scope="local")
    config.to_json_file(tmp_path / "tract_config.json")
    assert TrActConfig.from_json_file(tmp_path / "tract_config.json") == config
    assert TrActConfig.from_dict({}) == TrActConfig()
    with pytest.raises(TrActError, match=says("['lambda_']", "no settings of TrAct", "['lam', 'layers', 'scope']")):
        TrActConfig.from_dict({"lambda_": 0.1})
    with pytest.raises(TrActError, match=says("`layers` (=())", "must be 'auto'")):
        TrActConfig(layers=())


def test_a_layer_made_by_the_class_of_a_preconditioned_one_is_ordinary():
    """Libraries call `type(layer)(...)` to build a similar one."""
    model = nn.Sequential(nn.Conv2d(3, 4, 2, 2))
    apply_tract(model, layers=["0"])
    made = type(model[0])(3, 5, 2, 2)
    assert type(made) is nn.Conv2d
    made(torch.randn(1, 3, 4, 4)).sum().backward()
    assert made.weight.grad is not None


class Sparse(nn.Conv2d):
    """Calls its base class as SparK's layers do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super(type(self), self).forward(x) * (x.mean() > -9)


def test_a_class_that_registers_its_subclasses_knows_none_of_tracts():
    registered = {}

    class Registered(nn.Conv2d):
        def __init_subclass__(cls, *, key):
            registered[key] = cls

    class Stem(Registered, key="stem"):
        pass

    model = nn.Sequential(Stem(3, 8, 4, 4), nn.Flatten(), nn.Linear(32, 2))
    with apply_tract(model) as handle:
        assert [layer.name for layer in handle.layers] == ["0"]
        assert type(model[0]).__name__ == "TrActStem"
    assert type(model[0]) is Stem
    assert registered == {"stem": Stem}


def test_a_forward_that_means_its_base_class_by_its_own_type_runs():
    torch.manual_seed(0)
    plain, x = network(Sparse(3, 4, 2, 2)), torch.randn(5, 3, 8, 8)
    model = copy.deepcopy(plain)
    apply_tract(model, layers=["0"])
    assert torch.equal(model(x), plain(x))
    model(x).sum().backward()
    plain(x).sum().backward()
    assert_close(model[0].weight.grad, expected(plain[0].weight.grad, x, plain[0], 0.1), 1e-4)
    assert_close(copy.deepcopy(model)(x), plain(x), 1e-6)
    assert type(pickle.loads(pickle.dumps(model))[0]) is Sparse
    remove_tract(model)
    assert type(model[0]) is Sparse


class Doubling(Airbench):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super(type(self), self).forward(x)


def test_a_module_that_reads_its_layer_s_weight_and_means_its_base_class_by_its_own_type_runs():
    torch.manual_seed(0)
    plain, x = Doubling(), torch.randn(4, 3, 8, 8)
    model = copy.deepcopy(plain)
    apply_tract(model)
    assert torch.equal(model(x), plain(x))
    remove_tract(model)
    assert type(model) is Doubling
