"""What the paper compares TrAct with: the norms, the whitening and the two optimizers are what they are called."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.paper.arms import maker
from benchmarks.paper.layers import Behind, OnPatches, Whitening, dual_patch_norm, first_layer
from benchmarks.paper.named_optimizers import named_optimizer
from benchmarks.paper.optimizers import Both, Grafted, optimizer_maker
from benchmarks.paper.relative_damping import relative_damping
from benchmarks.training import loop
from benchmarks.training.data import Normalization, load_splits
from benchmarks.training.loop import Options, evaluate, train
from benchmarks.training.recipe import Recipe
from helpers.environments import reset_accelerate
from hf_tract import apply_tract

PATCH, CHANNELS = 4, 8
VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "patch_size": 4}


@pytest.fixture
def pixels():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 3 + 1


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Conv2d(3, CHANNELS, PATCH, PATCH)


def patches_of(pixels):
    """(B, patches, n) in the order of `weight.flatten(1)`, by torch's unfold."""
    return F.unfold(pixels, PATCH, stride=PATCH).mT


def as_map(rows):
    return rows.mT.unflatten(-1, (4, 4))


def test_patch_norm_gives_each_patch_mean_0_and_std_1(pixels, layer):
    n = layer.weight[0].numel()
    model = Behind(OnPatches(PATCH, nn.LayerNorm(n, elementwise_affine=False)), layer)
    rows = patches_of(pixels).double()
    rows = (rows - rows.mean(-1, keepdim=True)) / rows.std(-1, correction=0, keepdim=True)
    wanted = as_map(rows @ layer.weight.flatten(1).double().T + layer.bias)
    torch.testing.assert_close(model(pixels).double(), wanted, rtol=1e-4, atol=1e-4)
    assert model.weight is layer.weight


def test_dual_patch_norm_has_a_layer_norm_on_both_sides(pixels, layer):
    n = layer.weight[0].numel()
    model = dual_patch_norm(layer)
    before, after = (norm for norm in model.modules() if isinstance(norm, nn.LayerNorm))
    for parameter in (*before.parameters(), *after.parameters()):
        nn.init.normal_(parameter)
    rows = F.layer_norm(patches_of(pixels), (n,), before.weight, before.bias) @ layer.weight.flatten(1).T + layer.bias
    wanted = as_map(F.layer_norm(rows, (CHANNELS,), after.weight, after.bias))
    torch.testing.assert_close(model(pixels), wanted, rtol=1e-4, atol=1e-4)
    assert first_layer(nn.Sequential(model)) == "0.layer"


def test_whitened_patches_have_the_identity_as_second_moment(pixels):
    mixed = torch.randn(5000, 6, generator=torch.Generator().manual_seed(1)) @ torch.randn(6, 6) + 2
    white = Whitening(mixed, eps=1e-8)(mixed).double()
    torch.testing.assert_close(white.T @ white / len(white), torch.eye(6, dtype=torch.float64), rtol=1e-3, atol=1e-3)
    assert not list(Whitening(mixed).parameters())


@pytest.mark.parametrize("variant", ["patch_norm", "dual_patch_norm", "whitening", "eigen", "torch_tract"])
def test_every_variant_trains_the_first_layer_of_a_vit(variant):
    recipe = Recipe(model="vit", model_config=VIT, train_samples=64)
    splits = load_splits(recipe)
    model = maker(variant)(recipe, splits, Normalization(32, [0.5] * 3, [0.2] * 3))
    model(torch.randn(4, 3, 32, 32)).logits.logsumexp(-1).sum().backward()
    projection = model.vit.embeddings.patch_embeddings.projection
    assert projection.weight.grad.abs().sum() > 0
    plain = maker("none")(recipe, splits, Normalization(32, [0.5] * 3, [0.2] * 3))
    assert type(projection) is not type(plain.vit.embeddings.patch_embeddings.projection)


def test_a_variant_of_patches_is_refused_for_patches_that_overlap():
    recipe = Recipe(model="cifar_resnet18", model_config={"channels": [4, 4, 8, 8]}, train_samples=64)
    splits = load_splits(recipe)
    with pytest.raises(ValueError, match=r"`variant` \(='whitening'\) is of patches that do not overlap"):
        maker("whitening")(recipe, splits, Normalization(32, [0.5] * 3, [0.2] * 3))


def test_both_optimizers_take_their_own_steps_and_go_on_from_a_checkpoint():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.Flatten(), nn.Linear(16, 2))
    other = copy.deepcopy(model)
    recipe, x = Recipe(learning_rate=0.01), torch.randn(5, 3, 4, 4)
    optimizer = optimizer_maker("sgd_first", 0.1)(recipe, model)
    assert first_layer(model) == "0"
    sgd = torch.optim.SGD(other[0].parameters(), 0.1, momentum=0.9)
    adam = torch.optim.Adam(other[2].parameters(), 0.01)
    for step in range(6):
        for each, optimizers in ((model, [optimizer]), (other, [sgd, adam])):
            each(x).square().sum().backward()
            for one in optimizers:
                one.step()
                one.zero_grad()
        if step == 2:  # as schedulers and checkpoints do
            for group in [*optimizer.param_groups, *sgd.param_groups, *adam.param_groups]:
                group["lr"] *= 0.5
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = optimizer_maker("sgd_first", 0.1)(recipe, model)
            optimizer.load_state_dict(state)
        torch.testing.assert_close(list(model.parameters()), list(other.parameters()), rtol=0, atol=0)
    assert isinstance(optimizer, Both)


LOOK = Normalization(32, [0.5] * 3, [0.2] * 3)


def projection_of(model):
    return model.vit.embeddings.patch_embeddings.projection


def test_eigenvectors_multiplied_out_are_an_ordinary_layer(pixels):
    recipe = Recipe(model="vit", model_config=VIT, train_samples=64, lam=0.01)
    stem = projection_of(maker("eigen")(recipe, load_splits(recipe), LOOK))
    inner = stem.before.inner.matrix
    ordinary = copy.deepcopy(stem.layer)
    with torch.no_grad():
        ordinary.weight.copy_((stem.layer.weight.flatten(1) @ inner.T).view_as(ordinary.weight))
    torch.testing.assert_close(stem(pixels), ordinary(pixels), rtol=1e-4, atol=1e-4)
    # Directions of little variance are damped by lam.
    assert inner.norm(dim=0).max() <= recipe.lam**-0.5 * 1.001


def test_whitened_coordinates_start_as_the_plain_layer_and_step_as_the_gradient_in_them_says(pixels):
    recipe = Recipe(model="vit", model_config=VIT, train_samples=64, lam=0.1)
    splits = load_splits(recipe)
    torch.manual_seed(0)
    plain = projection_of(maker("none")(recipe, splits, LOOK))
    torch.manual_seed(0)
    stem = projection_of(maker("coordinates")(recipe, splits, LOOK))
    torch.testing.assert_close(stem(pixels), plain(pixels), rtol=1e-4, atol=1e-4)
    matrix = stem.before.inner.matrix.double()
    for layer in (plain, stem):
        layer(pixels).square().sum().backward()
    wanted = plain.weight.grad.flatten(1).double() @ matrix
    torch.testing.assert_close(stem.layer.weight.grad.flatten(1).double(), wanted, rtol=1e-3, atol=1e-3)
    # D^-1/2 U times its transpose is the inverse of the damped second moment.
    damped = torch.linalg.inv(matrix @ matrix.T)
    assert torch.linalg.eigvalsh(damped).min() >= recipe.lam * 0.999


def adamw_takes(optimizer, model):
    """The names of the parameters that Muon leaves to AdamW, after a step."""
    for each in model.parameters():
        each.grad = torch.randn_like(each)
    optimizer.step()
    return {name for name, each in model.named_parameters() if not optimizer.state[each]["use_muon"]}


def test_the_usual_muon_leaves_first_layer_and_head_to_adamw():
    recipe = Recipe(model="vit", model_config=VIT, train_samples=64, optimizer="muon_split", weight_decay=0.05)
    model = maker("none")(recipe, load_splits(recipe), LOOK)
    optimizer = named_optimizer(recipe, model)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.95}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.999)}
    theirs = adamw_takes(optimizer, model)
    blocks = {name for name, each in model.vit.named_parameters(prefix="vit") if ".layers." in name and each.ndim == 2}
    assert theirs == {name for name, _ in model.named_parameters()} - blocks
    assert len(blocks) == 6
    everything = adamw_takes(named_optimizer(dataclasses.replace(recipe, optimizer="muon"), model), model)
    assert theirs - everything == {"vit.embeddings.patch_embeddings.projection.weight", "classifier.weight"}


@pytest.mark.parametrize("name", ["adamw", "muon_split", "muon", "soap", "schedule_free"])
def test_every_optimizer_decays_matrices_alone_and_goes_on_from_a_checkpoint(name):
    recipe = Recipe(model="vit", model_config=VIT, train_samples=64, optimizer=name, weight_decay=0.05)
    splits = load_splits(recipe)
    model = maker("none")(recipe, splits, LOOK)
    optimizer = named_optimizer(recipe, model)
    decays = {id(each): group["weight_decay"] for group in optimizer.param_groups for each in group["params"]}
    assert len(decays) == len(list(model.parameters()))
    for each in model.parameters():
        assert decays[id(each)] == (0.05 if each.ndim > 1 else 0.0)
    # SOAP's bases change after the tenth step.
    images = torch.randn(13, 4, 3, 32, 32)

    def steps(model, optimizer, batches):
        for batch in batches:
            optimizer.zero_grad()
            model(batch).logits.logsumexp(-1).sum().backward()
            optimizer.step()

    steps(model, optimizer, images[:9])
    resumed = maker("none")(recipe, splits, LOOK)
    resumed.load_state_dict(model.state_dict())
    again = named_optimizer(recipe, resumed)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = copy.deepcopy(list(model.parameters()))
    steps(model, optimizer, images[9:])
    steps(resumed, again, images[9:])
    torch.testing.assert_close(list(resumed.parameters()), list(model.parameters()))
    assert any((old - new).abs().max() > 1e-4 for old, new in zip(before, model.parameters(), strict=True))


def test_schedule_free_is_tested_with_the_averaged_weights(tmp_path, monkeypatch):
    recipe = Recipe(
        model="vit",
        model_config=VIT,
        train_samples=64,
        test_samples=32,
        optimizer="schedule_free",
        schedule="constant",
    )
    recipe = dataclasses.replace(recipe, epochs=2, batch_size=16, learning_rate=0.01)
    seen = []

    def kept(recipe, model):
        seen.append(named_optimizer(recipe, model))
        return seen[0]

    def tested(*arguments):
        assert not seen[0].param_groups[0]["train_mode"]
        return evaluate(*arguments)

    monkeypatch.setattr(loop, "evaluate", tested)
    trained = train(recipe, Options(tmp_path), make_optimizer=kept)
    (optimizer,) = seen
    assert not optimizer.param_groups[0]["train_mode"]
    averaged = copy.deepcopy(list(trained.model.parameters()))
    optimizer.train()
    assert any((x - y).abs().max() > 1e-4 for x, y in zip(averaged, trained.model.parameters(), strict=True))
    reset_accelerate()


def test_relative_damping_is_lam_times_the_mean_square_of_what_each_layer_reads():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(1), nn.GELU(), nn.Linear(8 * 16, 5))
    pixels = 7 * torch.randn(6, 3, 16, 16)
    plain = copy.deepcopy(model)
    plain(pixels).logsumexp(-1).sum().backward()
    with relative_damping(), apply_tract(model, 0.3, layers="*"):
        model(pixels).logsumexp(-1).sum().backward()
    hidden = plain[:3](pixels).detach()
    patches = F.unfold(pixels, 4, stride=4).mT.flatten(0, 1)
    for layer, other, rows in ((model[0], plain[0], patches), (model[3], plain[3], hidden)):
        rows = rows.double()
        moment = rows.T @ rows / len(rows)
        damped = moment + 0.3 * moment.trace() / len(moment) * torch.eye(len(moment), dtype=torch.float64)
        wanted = torch.linalg.solve(damped, other.weight.grad.flatten(1).double(), left=False)
        torch.testing.assert_close(layer.weight.grad.flatten(1).double(), wanted, rtol=1e-3, atol=1e-5)
    # Outside, lam is absolute again.
    model.zero_grad()
    with apply_tract(model, 0.3):
        model(pixels).logsumexp(-1).sum().backward()
    damped = patches.T @ patches / len(patches) + 0.3 * torch.eye(48)
    wanted = torch.linalg.solve(damped.double(), plain[0].weight.grad.flatten(1).double(), left=False)
    torch.testing.assert_close(model[0].weight.grad.flatten(1).double(), wanted, rtol=1e-3, atol=1e-5)


def test_a_frozen_first_layer_is_not_in_the_optimizer():
    recipe = Recipe(model="vit", model_config=VIT, train_samples=64)
    model = maker("frozen")(recipe, load_splits(recipe), LOOK)
    optimizer = optimizer_maker("frozen", 0.1)(recipe, model)
    trained = {id(each) for group in optimizer.param_groups for each in group["params"]}
    frozen = {id(each) for each in projection_of(model).parameters()}
    assert len(frozen) == 2
    assert not trained & frozen
    assert len(trained) == len(list(model.parameters())) - 2


def test_the_first_layer_alone_has_another_rate():
    recipe = Recipe(model="vit", model_config=VIT, train_samples=64, optimizer="adam", weight_decay=5e-5)
    model = maker("none")(recipe, load_splits(recipe), LOOK)
    optimizer = optimizer_maker("none", 0.1, 0.2)(recipe, model)
    rates = {id(each): group["lr"] for group in optimizer.param_groups for each in group["params"]}
    decays = {id(each): group["weight_decay"] for group in optimizer.param_groups for each in group["params"]}
    usual = optimizer_maker("none", 0.1)(recipe, model)
    assert len(rates) == len(list(model.parameters()))
    assert decays == {id(each): group["weight_decay"] for group in usual.param_groups for each in group["params"]}
    first = {id(each) for each in projection_of(model).parameters()}
    assert {rate for each, rate in rates.items() if each in first} == {0.2 * recipe.learning_rate}
    assert {rate for each, rate in rates.items() if each not in first} == {recipe.learning_rate}


def train_a_bit(layer, optimizer, steps=4):
    torch.manual_seed(1)
    for _ in range(steps):
        layer(torch.randn(5, 3, 16, 16)).tanh().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_grafting_with_a_large_lam_is_adam(layer):
    """C + lam I is then lam I, and Adam does not see a factor of the gradient."""
    other = copy.deepcopy(layer)
    layer.bias.requires_grad_(False)
    train_a_bit(layer, Grafted(layer, 0.01, 0.0, lam=1e4))
    train_a_bit(other, torch.optim.Adam([other.weight], 0.01))
    torch.testing.assert_close(layer.weight, other.weight, rtol=1e-3, atol=2e-5)


def test_a_grafted_step_changes_the_outputs_as_much_as_adams(layer, pixels):
    other = copy.deepcopy(layer)
    moved = []
    for each, optimizer in (
        (layer, Grafted(layer, 0.01, 0.0, lam=0.1)),
        (other, torch.optim.Adam([other.weight], 0.01)),
    ):
        before = each.weight.detach().clone()
        each(pixels).tanh().square().sum().backward()
        optimizer.step()
        moved.append(F.conv2d(pixels, each.weight.detach() - before, stride=PATCH))
    assert moved[0].norm() == pytest.approx(float(moved[1].norm()), rel=1e-4)
    assert (moved[0] - moved[1]).norm() > 0.1 * moved[0].norm()


def test_a_grafted_arm_trains_and_goes_on_from_a_checkpoint():
    recipe = Recipe(model="vit", model_config=VIT, train_samples=64, optimizer="adam")
    splits = load_splits(recipe)
    model = maker("grafted")(recipe, splits, LOOK)
    optimizer = optimizer_maker("grafted", 0.1)(recipe, model)
    in_groups = [id(each) for group in optimizer.param_groups for each in group["params"]]
    assert sorted(in_groups) == sorted(id(each) for each in model.parameters())
    pixels = torch.randn(4, 3, 32, 32)
    model(pixels).logits.logsumexp(-1).sum().backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    resumed = maker("grafted")(recipe, splits, LOOK)
    resumed.load_state_dict(model.state_dict())
    again = optimizer_maker("grafted", 0.1)(recipe, resumed)
    again.load_state_dict(state)
    for each, its in ((model, optimizer), (resumed, again)):
        its.zero_grad()
        each(pixels).logits.logsumexp(-1).sum().backward()
        its.step()
    torch.testing.assert_close(list(resumed.parameters()), list(model.parameters()))


def test_an_oracle_starts_with_the_first_layer_of_a_trained_model(tmp_path):
    recipe = Recipe(model="vit", model_config=VIT, train_samples=64)
    splits = load_splits(recipe)
    torch.manual_seed(0)
    donor = maker("none")(recipe, splits, LOOK)
    donor.save_pretrained(tmp_path)
    model = maker("oracle", tmp_path)(recipe, splits, LOOK)
    theirs = projection_of(donor).state_dict()
    torch.testing.assert_close(dict(projection_of(model).state_dict()), dict(theirs), rtol=0, atol=0)
    assert not torch.equal(model.classifier.weight, donor.classifier.weight)
    with pytest.raises(ValueError, match=r"`variant` \(='oracle'\) needs `donor`"):
        maker("oracle")(recipe, splits, LOOK)
