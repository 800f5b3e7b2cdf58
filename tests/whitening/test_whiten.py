"""A whitened start, against the dense formula; what it leaves alone and what it refuses."""

import copy
import warnings

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoConfig, AutoModelForImageClassification

from helpers.models import STEM, small_vit, stem_of
from helpers.oracle import assert_close, moment, says
from helpers.ranks import on_two_ranks
from helpers.strategies import cases
from hf_tract import TrActError, first_layer_spectrum, whiten_first_layer
from hf_tract.core.sharding import gathered_weights, read_weight
from hf_tract.discovery.wrappers import unwrap
from hf_tract.whitening import fresh, whiten
from hf_tract.whitening.batches import move_batch


def inverse_root(c: torch.Tensor, lam: float) -> torch.Tensor:
    """(C + lam I)^-1/2 by Denman and Beavers' iteration, which has no eigenvectors in it; (g, n, n), float64."""
    eye = torch.eye(c.shape[-1], dtype=torch.float64).expand_as(c)
    scale = (c + lam * eye).diagonal(dim1=1, dim2=2).sum(1).view(-1, 1, 1)
    y, z = (c + lam * eye) / scale, eye
    for _ in range(60):
        y, z = (y + torch.linalg.inv(z)) / 2, (z + torch.linalg.inv(y)) / 2
    return z / scale.sqrt()


def wanted(weight: torch.Tensor, c: torch.Tensor, lam: float, match_scale: bool = True) -> torch.Tensor:
    rows, root = weight.double().reshape(len(c), -1, c.shape[-1]), inverse_root(c, lam)
    if match_scale:
        root /= ((root @ c @ root).diagonal(dim1=1, dim2=2).mean(1)).sqrt().view(-1, 1, 1)
    return (rows @ root).reshape(weight.shape)


def images(count: int = 32) -> torch.Tensor:
    """Smooth, so that C is far from the identity."""
    return torch.randn(count, 3, 16, 16).cumsum(-1).cumsum(-2) / 8


@given(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]).flatmap(cases), st.booleans())
def test_the_weight_is_the_formula_s_for_any_layer(case, match_scale):
    layer, x, lam = case
    before = layer.weight.detach().clone()
    (found,) = whiten_first_layer(nn.Sequential(layer), x, lam, layer, match_scale=match_scale, force=True)
    assert found.module is layer
    assert layer.weight.dtype == before.dtype
    assert_close(
        layer.weight, wanted(before, moment(x, layer), lam, match_scale), {torch.bfloat16: 1e-2}.get(x.dtype, 1e-5)
    )


def test_several_batches_whiten_a_transformers_model_and_leave_all_else_as_it_was():
    model, batches = small_vit().train(), [images(8), images(24)]
    model.vit.embeddings.dropout.eval()
    stem, before = stem_of(model), copy.deepcopy(model.state_dict())
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    found = whiten_first_layer(model, [{"pixel_values": batch} for batch in batches])
    assert [layer.name for layer in found] == [STEM]
    assert_close(stem.weight, wanted(before[f"{STEM}.weight"], moment(batches, stem), 0.1), 1e-5)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if name != f"{STEM}.weight")
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_outputs_start_nearly_uncorrelated_and_of_the_wanted_scale():
    x, layer = images(256), nn.Conv2d(3, 512, 4, 4, bias=False)
    model, fresh = nn.Sequential(layer), layer.weight.detach().clone()
    whiten_first_layer(model, x, lam=1e-6)
    effective = layer.weight.detach().double().flatten(1)
    c = moment(x, layer)[0]
    white = fresh.double().flatten(1).square().sum()
    assert torch.trace(effective @ c @ effective.T).item() == pytest.approx(white.item(), rel=0.05)
    root = torch.linalg.lstsq(fresh.double().flatten(1), effective).solution
    assert_close(root @ c @ root.T, torch.eye(48), 1e-3)


def test_weight_standardisation_and_weight_norm_get_the_product_as_their_weight():
    for layer in (
        timm.layers.ScaledStdConv2d(3, 32, 4, 4, padding=0),
        parametrizations.weight_norm(nn.Conv2d(3, 32, 4, 4)),
    ):
        x, before = images(), layer.weight.detach().clone()
        whiten_first_layer(nn.Sequential(layer), x)
        plain = nn.Conv2d(3, 32, 4, 4)
        assert_close(layer.weight, wanted(before, moment(x, plain), 0.1), 1e-5)


def trained(layer: nn.Conv2d) -> None:
    """Weights that have learned to see what is smooth."""
    layer.weight.data = layer.weight.data.cumsum(-1).cumsum(-2)


@pytest.mark.parametrize(
    "change, lam, batches, parts",
    [
        (
            lambda model: trained(stem_of(model)),
            0.1,
            images(),
            ("looks trained (the spread of its spectrum is", "force=True"),
        ),
        (lambda model: nn.init.zeros_(stem_of(model).weight), 0.1, images(), ("is all zeros",)),
        (
            lambda model: prune.l1_unstructured(stem_of(model), "weight", 0.3),
            0.1,
            images(),
            ("computes from `weight_orig`",),
        ),
        (lambda model: None, 0.0, images(), ("`lam` (=0.0) must be a positive finite number",)),
        (lambda model: None, float("inf"), images(), ("`lam` (=inf) must be a positive finite number",)),
        (
            lambda model: None,
            0.1,
            (images(), torch.arange(32)),
            ("`batches` has a tensor of torch.int64", "[(pixels, labels)]"),
        ),
        (lambda model: None, 0.1, ["a.png"], ("`batches` has a str: give tensors of pixels",)),
        (lambda model: None, 0.1, [], ("`batches` has nothing that reaches",)),
        (lambda model: None, 0.1, images() * float("nan"), ("`batches` has pixels that are not finite",)),
        (lambda model: None, 0.1, images() * 0, ("`batches` has nothing but zeros where it reaches",)),
    ],
)
def test_what_cannot_be_meant_is_refused_and_the_model_left_as_it_was(change, lam, batches, parts):
    model = small_vit()
    change(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TrActError, match=says(*parts)):
        whiten_first_layer(model, batches, lam)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_of_a_checkpoint_are_refused_and_those_of_its_config_alone_are_not(tmp_path):
    small_vit().save_pretrained(tmp_path)
    with pytest.raises(TrActError, match=says(f"that comes from {tmp_path}", "force=True")):
        whiten_first_layer(AutoModelForImageClassification.from_pretrained(tmp_path), images())
    assert whiten_first_layer(
        AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(tmp_path)), images()
    )


def test_a_module_that_holds_a_loaded_model_is_refused_too(tmp_path):
    small_vit().save_pretrained(tmp_path)
    inner = AutoModelForImageClassification.from_pretrained(tmp_path)
    with pytest.raises(TrActError, match=says("that comes from a checkpoint", "force=True")):
        whiten_first_layer(nn.ModuleDict({"inner": inner}), images(), layers=f"inner.{STEM}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_may_be_a_loader_s_have_labels_and_keys_that_the_model_does_not_take(dtype):
    x, labels = images(32), torch.arange(32)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.head, self.stem = nn.Linear(8, 4), nn.Conv2d(3, 8, 4, 4)  # not in the order in which they run
            self.to(dtype)

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return self.head(self.stem(pixel_values).mean((2, 3)).relu())

    weights = []
    forms = x, [(x, labels)], {"pixel_values": x, "labels": labels}, DataLoader(TensorDataset(x, labels), 8)
    for batches in forms:
        model = Model()
        (layer,) = whiten_first_layer(model, batches)
        assert layer.name == "stem"
        weights.append(model.stem.weight)
    for weight in weights[1:]:
        assert_close(weight, weights[0], {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype])


@pytest.mark.parametrize("form", [lambda x: [x], lambda x: [tuple(x)], lambda x: [(x, [{"boxes": None}] * len(x))]])
def test_images_of_different_sizes_are_taken_as_detectors_do(form):
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.head, self.stem = nn.Linear(8, 4), nn.Conv2d(3, 8, 4, 4)

        def forward(self, pixels: list[torch.Tensor]) -> torch.Tensor:
            return self.head(self.stem(padded(pixels)).mean((2, 3)))

    x, model = [image[:, :size] for image, size in zip(images(4), (8, 16, 8, 12), strict=True)], Detector()
    before = model.stem.weight.detach().clone()
    (layer,) = whiten_first_layer(model, form(x))
    assert layer.name == "stem"
    assert_close(model.stem.weight, wanted(before, moment(padded(x), model.stem), 0.1), 1e-5)


def padded(pixels: list[torch.Tensor]) -> torch.Tensor:
    """As one batch of squares."""
    return torch.stack([nn.functional.pad(image, (0, 0, 0, 16 - image.shape[1])) for image in pixels])


def test_batches_go_where_the_weight_is_with_labels_and_boxes_inside():
    batch = {
        "pixel_values": torch.ones(2),
        "labels": [{"boxes": torch.ones(2, 4), "class_labels": torch.ones(2).long()}],
        "n": 3,
    }
    there = move_batch(batch, torch.device("meta"), torch.bfloat16)
    boxes = there["labels"][0]["boxes"]
    assert (there["pixel_values"].device.type, boxes.device.type, boxes.dtype) == ("meta", "meta", torch.bfloat16)
    assert (there["labels"][0]["class_labels"].dtype, there["n"]) == (torch.int64, 3)
    assert move_batch(batch, None, torch.float32)["labels"][0]["boxes"].dtype == torch.float32


def test_a_group_that_reads_nothing_but_zeros_stays_as_it_was():
    x, layer = torch.randn(16, 2, 9, 9).cumsum(-1), nn.Conv2d(2, 8, 3, groups=2)
    x[:, 1] = 0
    before = layer.weight.detach().clone()
    whiten_first_layer(nn.Sequential(layer), x)
    assert torch.equal(layer.weight[4:], before[4:])
    assert_close(layer.weight[:4], wanted(before[:4], moment(x, layer)[:1], 0.1), 1e-5)


def test_twice_is_refused_also_of_a_copy_until_the_weights_are_reset_and_forced_weights_are_whitened():
    model = small_vit()
    fresh = copy.deepcopy(model.state_dict())
    whiten_first_layer(model, images())
    for again in (model, copy.deepcopy(model)):
        with pytest.raises(TrActError, match="that was whitened before"):
            whiten_first_layer(again, images())
    model.load_state_dict(fresh)
    whiten_first_layer(model, images())
    before = stem_of(model).weight.detach().clone()
    whiten_first_layer(model, images(), force=True)
    assert not torch.equal(stem_of(model).weight, before)


@pytest.mark.parametrize(
    "name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "resnetv2_50x1_bit", "nf_resnet26"]
)
def test_fresh_models_of_timm_do_not_look_trained(name):
    assert whiten_first_layer(
        timm.create_model(name), torch.randn(1, 3, 64, 64) if "vit" not in name else torch.randn(1, 3, 224, 224)
    )


SHARDED = ["plain", "DDP", "FSDP1", "FSDP1, original parameters", "FSDP2", "FSDP2, the stem a unit of its own"]


def wrapped(model: nn.Module, name: str) -> nn.Module:
    if name == "DDP":
        return nn.parallel.DistributedDataParallel(model)
    if name.startswith("FSDP1"):
        warnings.simplefilter("ignore", FutureWarning)  # torch deprecates FSDP1
        return FullyShardedDataParallel(model, use_orig_params="original" in name, device_id=torch.device("cpu"))
    if name.startswith("FSDP2"):
        mesh = init_device_mesh("cpu", (2,))
        for part in [STEM, ""] if "own" in name else [""]:
            fully_shard(model.get_submodule(part), mesh=mesh)
    return model


def on_a_rank(rank: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The stem's weight, and all weights after a step of training that follows."""
    model = wrapped(small_vit(), name)
    torch.manual_seed(1)
    batch = images(12)
    mine = batch[:4] if rank == 0 else batch[4:]
    whiten_first_layer(model, mine)
    stem = stem_of(unwrap(model))
    with gathered_weights(model, [stem]):
        weight = read_weight(stem).clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(mine).logits.square().sum().backward()
    optimizer.step()
    with gathered_weights(model, [stem]):
        return weight, read_weight(stem).clone()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_two_ranks(tmp_path_factory.mktemp("whiten"), on_a_rank, SHARDED)


@pytest.mark.parametrize("name", SHARDED)
def test_ranks_with_uneven_batches_come_to_the_weight_of_one_process_however_it_is_sharded(ranks, name):
    model = small_vit()
    torch.manual_seed(1)
    batch = images(12)
    whiten_first_layer(model, batch)
    (first, first_trained), (second, second_trained) = (results[name] for results in ranks)
    assert torch.equal(first, second)
    assert_close(first, stem_of(model).weight, 1e-6)
    if name != "plain":  # whose ranks go apart without a wrapper
        assert torch.equal(first_trained, second_trained)
        (model(batch).logits.square().sum() / 2).backward()  # wrappers take the mean over ranks
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        assert_close(first_trained, stem_of(model).weight, 1e-5)


def test_a_batch_norm_before_the_layer_normalises_as_in_training():
    x = 100 * torch.rand(64, 3, 8, 8) + torch.tensor([10.0, 50.0, 200.0]).view(3, 1, 1)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 6, 4, 4))
    buffers = copy.deepcopy(dict(model.named_buffers()))
    normalised = copy.deepcopy(model[0])(x).detach()
    mean = moment(normalised, model[1]).diagonal(0, 1, 2).mean()
    assert first_layer_spectrum(model, x)["1"].mean == pytest.approx(float(mean), rel=1e-4)
    plain = copy.deepcopy(model[1])
    whiten_first_layer(plain, normalised)
    whiten_first_layer(model, x)
    assert_close(model[1].weight, plain.weight, 1e-5)
    assert model.training
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name])


def test_a_buffer_that_the_forward_replaces_is_restored():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 6, 4, 4)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen = self.seen + len(x)
            return self.stem(x)

    model = Counting()
    whiten_first_layer(model, torch.randn(32, 3, 8, 8))
    assert model.seen == 0


def test_of_a_loader_of_any_class_the_first_batches_are_read():
    class Loader:
        read = 0

        def __iter__(self):
            for _ in range(50):
                self.read += 1
                yield torch.randn(16, 3, 8, 8)

    loader = Loader()
    whiten_first_layer(nn.Conv2d(3, 6, 4, 4), loader)
    assert loader.read == 4


def test_keys_that_the_forward_does_not_take_are_named():
    batch = {"image": torch.randn(4, 3, 8, 8), "label": torch.zeros(4)}
    model = nn.Conv2d(3, 6, 4, 4)
    with pytest.raises(
        TrActError, match=says("has a mapping of 'image', 'label', of which the forward of Conv2d takes none")
    ):
        whiten_first_layer(model, [batch])


def test_a_device_without_float64_is_whitened_on_the_host():
    """As on MPS, which can neither hold it nor cast to it on the way."""

    class OnMps(torch.Tensor):
        def cpu(self):
            return self.as_subclass(torch.Tensor)

        def double(self):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

        def to(self, other, *args, **kwargs):
            if other.dtype == torch.float64:
                self.double()
            return super().to(other, *args, **kwargs)

    torch.manual_seed(0)
    layer = nn.Conv2d(3, 64, 4, 4)
    weight = layer.weight.detach().as_subclass(OnMps)
    assert fresh._trained(layer, weight) == ""
    c = torch.cov(torch.randn(48, 200, dtype=torch.float64))[None]
    whitened = whiten._whitened(weight, c, 0.1, match_scale=True)
    assert_close(whitened.cpu(), whiten._whitened(layer.weight.detach(), c, 0.1, match_scale=True), 1e-6)
