"""What the paper compares TrAct with: the norms, the whitening and the two optimizers are what they are called."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.paper.arms import maker
from benchmarks.paper.layers import Around, ChannelNorm, OnPatches, Whitening
from benchmarks.paper.optimizers import Both, Grafted, first_layer, optimizer_maker
from benchmarks.training.data import Normalization, load_splits
from benchmarks.training.recipe import Recipe

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
    model = Around(OnPatches(PATCH, nn.LayerNorm(n, elementwise_affine=False)), layer)
    rows = patches_of(pixels).double()
    rows = (rows - rows.mean(-1, keepdim=True)) / rows.std(-1, correction=0, keepdim=True)
    wanted = as_map(rows @ layer.weight.flatten(1).double().T + layer.bias)
    torch.testing.assert_close(model(pixels).double(), wanted, rtol=1e-4, atol=1e-4)
    assert model.weight is layer.weight


def test_dual_patch_norm_has_a_layer_norm_on_both_sides(pixels, layer):
    n = layer.weight[0].numel()
    before, after = nn.LayerNorm(n), ChannelNorm(CHANNELS)
    nn.init.normal_(before.weight)
    nn.init.normal_(after.weight)
    rows = F.layer_norm(patches_of(pixels), (n,), before.weight) @ layer.weight.flatten(1).T + layer.bias
    wanted = as_map(F.layer_norm(rows, (CHANNELS,), after.weight))
    torch.testing.assert_close(Around(OnPatches(PATCH, before), layer, after)(pixels), wanted, rtol=1e-4, atol=1e-4)


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
