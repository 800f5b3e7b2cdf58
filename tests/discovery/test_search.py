"""The search for the first layer in unusual models: other kinds of weights, filters, inputs, and failing forwards."""

import copy
import logging
import random
import warnings
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn
from torch.nn.utils import parametrizations

from helpers.oracle import assert_close, expected, says
from hf_tract import TrActError, apply_tract, find_first_layers
from hf_tract.discovery.inputs import MAX_NUMBERS

REACHED = "reached first by the pixels"


def names(model: nn.Module, **kwargs) -> list[str]:
    return [layer.name for layer in find_first_layers(model, **kwargs)]


def tail(channels: int = 8) -> nn.Module:
    convolution = nn.Conv2d(channels, 8, 3, padding=1)
    return nn.Sequential(convolution, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def rows(x: torch.Tensor) -> torch.Tensor:
    return F.unfold(x, 4, stride=4).mT


class Net(nn.Module):
    """Parts by name, and a forward of one's own. The tail stands first: the order of the modules tells nothing."""

    def __init__(self, run, **parts) -> None:
        super().__init__()
        self.tail = tail()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, x):
        return self.run(self, x)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        return x @ weight

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError


class Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad


def weight(*shape: int, trained: bool = True) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * 0.1, requires_grad=trained)


def grid(x: torch.Tensor) -> torch.Tensor:
    return x.mT.reshape(len(x), 8, -1, 1)


OTHER_KINDS = {
    "mm": Net(lambda net, x: net.tail(grid(rows(x) @ net.w)), w=weight(48, 8)),
    "bmm": Net(lambda net, x: net.tail(grid(torch.einsum("bnk,ok->bno", rows(x), net.w))), w=weight(8, 48)),
    "conv2d": Net(lambda net, x: net.tail(F.conv2d(x, net.w, stride=4)), w=weight(8, 3, 4, 4)),
    "conv_transpose": Net(lambda net, x: net.tail(net.up(x)), up=nn.ConvTranspose2d(3, 8, 2, 2)),
    "embedding": Net(
        lambda net, x: net.tail(net.table(x.long()).movedim(-1, 2).flatten(1, 2)), table=nn.Embedding(256, 4)
    ),
    "index": Net(lambda net, x: net.tail(grid(net.w[x.mean(1).flatten(1).long().clamp(0, 9)])), w=weight(10, 8)),
    "addmm": Net(lambda net, x: net.tail(grid(net.rnn(rows(x))[0])), rnn=nn.GRU(48, 8, batch_first=True)),
}


@pytest.mark.parametrize("operation", OTHER_KINDS)
def test_a_weight_of_another_kind_is_an_error_and_no_deeper_layer_is_taken(operation):
    model = OTHER_KINDS[operation]
    with pytest.raises(
        TrActError, match=says("the first weight that the pixels meet is in", f"`{operation}`", "`layers=`")
    ):
        apply_tract(model)
    assert type(model.tail[0]) is nn.Conv2d


def test_the_error_names_the_module():
    model = nn.Sequential()
    model.up = nn.ConvTranspose2d(3, 8, 2, 2)
    model.tail = tail()
    with pytest.raises(TrActError, match=says("is in up (ConvTranspose2d)")):
        find_first_layers(model)


def test_an_autograd_function_hides_nothing():
    with pytest.raises(TrActError, match=says("`mm`")):
        find_first_layers(Net(lambda net, x: net.tail(grid(Product.apply(rows(x), net.w))), w=weight(48, 8)))
    assert names(Net(lambda net, x: net.tail(net.stem(Same.apply(x))), stem=nn.Conv2d(3, 8, 4, 4))) == ["stem"]


def test_a_weight_that_is_made_by_a_layer_is_none_of_its_operations():
    """As in a hypernetwork, whose layer reads wavelengths."""

    class Hyper(nn.Module):
        def __init__(self):
            super().__init__()
            self.maker, self.tail = nn.Linear(1, 8 * 16), tail()

        def forward(self, x, wavelengths):
            made = self.maker(wavelengths[:, None]).view(-1, 8, 4, 4).transpose(0, 1)
            return self.tail(F.conv2d(x, made, stride=4))

    with pytest.raises(TrActError, match=says("the model itself (Hyper)", "`conv2d`")):
        find_first_layers(Hyper())


def test_a_complex_convolution_is_not_passed_over():
    model = Net(lambda net, x: net.tail(net.c(x).abs()), c=nn.Conv2d(1, 8, 4, 4, dtype=torch.complex64))
    with pytest.raises(TrActError, match=says("is in c (Conv2d)")):
        find_first_layers(model)


def test_a_lazy_first_layer_must_be_made_first():
    wrapped = nn.DataParallel(nn.Conv2d(8, 8, 3))
    for model in (
        nn.Sequential(nn.LazyConv2d(8, 4, 4), tail()),
        nn.Sequential(nn.LazyConv2d(8, 4, 4), nn.ReLU()),
        nn.Sequential(nn.LazyConv2d(8, 4, 4), wrapped),
    ):
        with pytest.raises(TrActError, match=says("0 has no weight yet", "run a batch")):
            find_first_layers(model)


def test_another_weight_behind_the_first_layer_is_told(caplog):
    class Adapted(nn.Linear):
        """As loralib's."""

        def __init__(self):
            super().__init__(48, 8)
            self.a, self.b = weight(48, 2), weight(2, 8)

        def forward(self, x):
            return F.linear(x, self.weight, self.bias) + x @ self.a @ self.b

    assert names(nn.Sequential(nn.Identity(), Adapted())) == ["1"]
    (record,) = caplog.records
    assert "pixels also meet a weight in 1, in an operation (`mm`)" in record.getMessage()


@pytest.mark.parametrize(
    "model",
    [
        Net(
            lambda net, x: net.tail(net.stem(net.norm(x * net.gain + net.offset))),
            gain=weight(3, 1, 1),
            offset=weight(1, 3, 32, 32),
            norm=nn.LayerNorm([3, 32, 32]),
            stem=nn.Conv2d(3, 8, 4, 4),
        ),
        Net(
            lambda net, x: net.tail(net.stem(F.conv2d(x, net.filter, padding=1))),
            filter=weight(3, 3, 3, 3, trained=False),
            stem=nn.Conv2d(3, 8, 4, 4),
        ),
        Net(
            lambda net, x: net.tail(net.stem(F.conv2d(x, net.__dict__["filter"].to(x.device)))),
            stem=nn.Conv2d(3, 8, 4, 4),
        ),
        Net(
            lambda net, x: net.tail(grid(net.stem(torch.cat([net.token.expand(len(x), -1, -1), rows(x)], 1)))),
            token=weight(1, 1, 48),
            stem=nn.Linear(48, 8),
        ),
    ],
    ids=["elementwise weights", "a frozen filter", "a filter that is no parameter", "a token among the patches"],
)
def test_what_does_not_mix_pixels_does_not_end_the_search(model):
    model.__dict__.setdefault("filter", torch.randn(3, 3, 3, 3))
    assert [(layer.name, layer.source) for layer in find_first_layers(model)] == [("stem", REACHED)]


def test_pixels_that_are_written_into_a_buffer_stay_pixels():
    def run(net, x):
        padded = x.new_zeros(len(x), 3, x.shape[2] + 2, x.shape[3] + 2)
        padded[:, :, 1:-1, 1:-1] = x
        return net.tail(net.stem(padded))

    assert names(Net(run, stem=nn.Conv2d(3, 8, 4, 4))) == ["stem"]


def test_pixels_that_an_operation_writes_and_does_not_return_stay_pixels():
    library = torch.library.Library("tract_test", "DEF")
    library.define("center(Tensor x, Tensor(a!) out) -> ()")

    def center(x, out):
        out.copy_(x - 0.5)

    library.impl("center", center, "CompositeExplicitAutograd")
    torch.library.register_fake("tract_test::center", lambda x, out: None, lib=library)

    def run(net, x):
        centered = torch.empty(x.shape, device=x.device)
        torch.ops.tract_test.center(x, centered)
        return net.tail(net.stem(centered) + F.interpolate(net.side(x), scale_factor=2))

    model = Net(run, stem=nn.Conv2d(3, 8, 4, 4), side=nn.Conv2d(3, 8, 8, 8))
    assert names(model) == ["stem", "side"]


@pytest.mark.parametrize("layers", ["auto", "stem"])
def test_a_layer_whose_weight_the_parent_reads_is_found_again(layers):
    model = Net(lambda net, x: net.tail(F.conv2d(x, net.stem.weight, stride=4)), stem=nn.Conv2d(3, 8, 4, 4))
    apply_tract(model, layers=layers)
    handle = apply_tract(model, lam=0.2, layers=layers)
    model(torch.randn(3, 3, 16, 16)).sum().backward()
    assert handle.stats().keys() == {"stem"}


def test_a_layer_whose_weight_the_parent_reads_is_found_and_preconditioned():
    model = Net(lambda net, x: net.tail(F.conv2d(x, net.stem.weight, stride=4)), stem=nn.Conv2d(3, 8, 4, 4))
    plain, x = copy.deepcopy(model), torch.randn(3, 3, 16, 16)
    plain(x).sum().backward()
    handle = apply_tract(model)
    assert [(layer.name, layer.source) for layer in handle.layers] == [("stem", f"{REACHED}, in its parent's forward")]
    model(x).sum().backward()
    assert_close(model.stem.weight.grad, expected(plain.stem.weight.grad, x, plain.stem, 0.1), 1e-5)


def test_an_example_batch_shows_who_reads_the_weight():
    """Where no guess fits the forward."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.tail = nn.Conv2d(3, 8, 4, 4), tail()

        def forward(self, batch):
            return self.tail(F.conv2d(batch["the pixels"], self.stem.weight, stride=4))

    model, x = Net(), torch.randn(3, 3, 16, 16)
    plain = copy.deepcopy(model)
    plain({"the pixels": x}).sum().backward()
    handle = apply_tract(model, example_batch={"batch": {"the pixels": x}})
    assert [layer.name for layer in handle.layers] == ["stem"]
    model({"the pixels": x}).sum().backward()
    assert_close(model.stem.weight.grad, expected(plain.stem.weight.grad, x, plain.stem, 0.1), 1e-5)


def test_reading_weights_changes_no_buffer():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(3, 8, 4, 4)), tail()).train()
    before = copy.deepcopy(model.state_dict())
    with apply_tract(model) as handle:
        assert [layer.name for layer in handle.layers] == ["0"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_one_channel_and_one_pixel_are_a_patch_too():
    assert names(nn.Sequential(nn.Conv2d(1, 8, 1), tail())) == ["0"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_guesses_have_the_precision_of_the_model(dtype):
    model = Net(lambda net, x: net.tail(net.stem(x)), stem=nn.Conv2d(3, 8, 4, 4)).to(dtype)
    assert [layer.source for layer in find_first_layers(model)] == [REACHED]


def test_a_compiled_part_is_run_as_it_is():
    assert [
        (m.name, m.source) for m in find_first_layers(nn.Sequential(torch.compile(nn.Conv2d(3, 8, 4, 4)), tail()))
    ] == [("0", REACHED)]


def test_scripted_parts_are_leaves():
    scripted = torch.jit.script(tail())
    assert names(nn.Sequential(nn.Conv2d(3, 8, 4, 4), scripted)) == ["0"]
    assert names(nn.Sequential(nn.Conv2d(3, 8, 4, 4), scripted), layers="0") == ["0"]
    with pytest.raises(TrActError, match=says("the first weight that the pixels meet")):
        apply_tract(nn.Sequential(torch.jit.script(nn.Conv2d(3, 8, 4, 4)), tail()))
    with pytest.raises(TrActError, match=says("has no convolution or linear layer")):
        apply_tract(torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 4, 4), tail())))


class Encoder(nn.Sequential):
    """For images of 32 pixels alone."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 4, 4), nn.Flatten(), nn.Linear(512, 4))


def test_a_guess_whose_forward_completes_is_preferred():
    """The first guess reaches the teacher and breaks there."""

    class Distillation(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = Encoder(), Encoder().requires_grad_(False)

        def forward(self, x):
            with torch.no_grad():
                wanted = self.teacher(x)
            return self.student(x), wanted

    assert names(Distillation()) == ["student.0"]
    assert [layer.name for layer in apply_tract(Distillation()).layers] == ["student.0"]


class TwoSensors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.optical, self.radar = nn.Conv2d(16, 3, 3), nn.Conv2d(13, 8, 4, 4), nn.Conv2d(2, 8, 4, 4)

    def forward(self, s2, s1):
        return self.decoder(torch.cat([self.optical(s2), self.radar(s1)], 1))


def test_several_inputs_have_a_first_layer_each():
    assert names(TwoSensors()) == ["optical", "radar"]
    example = torch.rand(2, 13, 32, 32), torch.rand(2, 2, 32, 32)
    assert names(TwoSensors(), example_batch=example) == ["optical", "radar"]
    assert names(TwoSensors(), example_batch=dict(zip(["s2", "s1"], example, strict=True))) == ["optical", "radar"]


def test_time_steps_beside_an_image_are_no_pixels():
    class Denoiser(nn.Module):
        def __init__(self):
            super().__init__()
            self.time, self.stem, self.last = nn.Linear(16, 8), nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3)

        def forward(self, x, t):
            steps = t[:, None] * torch.arange(16, device=t.device)
            return self.last(self.stem(x) + self.time(steps.to(x.dtype))[:, :, None, None])

    assert names(Denoiser()) == ["stem"]
    assert names(Denoiser(), example_batch=(torch.rand(2, 3, 32, 32), torch.rand(2))) == ["stem"]
    assert names(Denoiser(), example_batch=(torch.rand(2, 3, 32, 32), torch.tensor([1, 2]))) == ["stem"]


class Bands(nn.Module):
    """Divides digital numbers inside; the decoder stands before the stem."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.stem = nn.Conv2d(8, 3, 3, padding=1), nn.Conv2d(13, 8, 4, 4)

    def forward(self, x):
        return self.decoder(self.stem(x.float() / 10_000))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float64])
def test_an_example_of_any_type_shows_the_way(dtype):
    assert names(Bands(), example_batch=(torch.rand(2, 13, 32, 32) * 200).to(dtype)) == ["stem"]
    assert names(Bands()) == ["stem"]


def test_an_example_that_fails_raises_with_the_forwards_own_error():
    model = Bands()
    with pytest.raises(
        TrActError,
        match=says(
            "`example_batch` (=torch.float32 (2, 3, 32, 32))", "(=Bands) failed on it with RuntimeError", "13", "3"
        ),
    ) as raised:
        apply_tract(model, example_batch=torch.rand(2, 3, 32, 32))
    assert isinstance(raised.value.__cause__, RuntimeError)
    assert type(model.stem) is type(model.decoder) is nn.Conv2d


def test_a_loaders_list_as_an_example_is_told_to_be_one_argument():
    pixels, labels = torch.rand(2, 13, 32, 32), torch.zeros(2, dtype=torch.long)
    with pytest.raises(TrActError, match=says("`example_batch` (=list of", "a list too, as the first argument")):
        apply_tract(Bands(), example_batch=[pixels, labels])


def test_a_forward_may_take_a_mapping():
    class Whole(Bands):
        def forward(self, batch):
            return super().forward(batch["image"])

    batch = {"image": torch.rand(2, 13, 32, 32), "label": torch.tensor([0, 1])}
    assert names(Whole(), example_batch={"batch": batch}) == ["stem"]
    assert names(Whole(), example_batch=batch) == ["stem"]
    with pytest.raises(TrActError, match=says("{'picture': torch.float32 (2, 13, 32, 32)}", "KeyError: 'image'")):
        find_first_layers(Whole(), example_batch={"picture": batch["image"]})


def test_what_a_forward_left_on_a_module_does_not_hinder_the_copy():
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.stem, self.cache = weight(8, 1, 1), nn.Conv2d(3, 8, 4, 4), {}

        def forward(self, x):
            self.cache["bias"] = self.table * 2
            return self.stem(x) + self.cache["bias"]

    model = Caching()
    model(torch.rand(1, 3, 8, 8))
    assert [layer.source for layer in find_first_layers(model)] == [REACHED]


def test_a_list_of_images_is_an_example():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.stem = nn.Conv2d(8, 8, 1), nn.Conv2d(3, 8, 4, 4)

        def forward(self, images):
            return [self.last(self.stem(image[None])) for image in images]

    assert names(Detector(), example_batch=[torch.rand(3, 32, 32), torch.rand(3, 40, 24)]) == ["stem"]


def test_arguments_that_nobody_can_guess_are_left_out():
    """A diffusion transformer has such: its rows are as long as a later layer's, and meet that before the rest."""

    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = object()
            self.time, self.x_embedder = nn.Linear(256, 32), nn.Linear(64, 32)

        def forward(self, hidden_states, timestep, guidance, img_ids):
            return self.x_embedder(hidden_states) + self.time(timestep.expand(1, 256) * guidance)

    assert [(layer.name, layer.source) for layer in find_first_layers(Transformer())] == [("x_embedder", REACHED)]


def test_a_cube_is_tried_for_volumes():
    model = nn.Sequential(nn.Conv3d(1, 8, 16, 16), nn.Flatten(), nn.Linear(64, 2))
    found = find_first_layers(model)
    assert [(layer.name, layer.source) for layer in found] == [("0", REACHED)]


def test_a_model_of_tokens_without_a_config_is_told_too():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.projection = nn.Embedding(9, 8), nn.Linear(16, 8)

        def forward(self, input_ids, encoder_hidden_states):
            return self.embedding(input_ids) + self.projection(encoder_hidden_states)

    with pytest.raises(TrActError, match=says("reads `input_ids` and no pixels")):
        find_first_layers(Tokens())


def test_the_order_of_the_modules_is_followed_with_a_warning_only(caplog):
    class Chosen(nn.Module):
        def __init__(self):
            super().__init__()
            self.stems = nn.ModuleDict({"s1": nn.Conv2d(2, 8, 4, 4), "s2": nn.Conv2d(13, 8, 4, 4)})
            self.head = nn.Linear(8, 3)

        def forward(self, x, sensor):
            return self.head(self.stems[sensor](x).mean((2, 3)))

    with caplog.at_level(logging.WARNING, "hf_tract"):
        found = find_first_layers(Chosen())
    assert [(layer.name, layer.source) for layer in found] == [
        ("stems.s1", "first in module order"),
        ("stems.s2", "first in module order"),
    ]
    (record,) = caplog.records
    assert "no trial run of the model met one of its layers" in record.getMessage()
    assert "stems.s1, stems.s2" in record.getMessage()
    assert "`example_batch=`" in record.getMessage()
    assert names(Chosen(), example_batch=(torch.rand(1, 13, 32, 32), "s2")) == ["stems.s2"]


def test_a_layer_around_a_timm_model_meets_the_pixels_before_it():
    import timm

    model = nn.Sequential(nn.Conv2d(13, 3, 1), timm.create_model("resnet18", num_classes=2))
    assert names(model) == ["0"]
    assert names(model[1]) == ["conv1"]


def test_a_forward_of_the_instance_is_the_one_that_runs():
    model = Net(lambda net, x: net.tail(net.old(x)), old=nn.Conv2d(3, 8, 4, 4), new=nn.Conv2d(3, 8, 4, 4))
    model.forward = (lambda self, x: self.tail(self.new(x))).__get__(model)
    assert names(model) == ["new"]


def test_a_mapping_of_two_images_has_two_stems():
    class Depth(nn.Module):
        def __init__(self):
            super().__init__()
            self.tail, self.rgb, self.depth = tail(), nn.Conv2d(3, 8, 4, 4), nn.Conv2d(1, 8, 4, 4)

        def forward(self, image, depth):
            return self.tail(self.rgb(image) + self.depth(depth))

    example = {"image": torch.rand(2, 3, 32, 32), "depth": torch.rand(2, 1, 32, 32)}
    assert names(Depth(), example_batch=example) == ["rgb", "depth"]


@pytest.mark.parametrize(
    "operation, model",
    [
        ("mul", Net(lambda net, x: net.tail((x.unsqueeze(1) * net.w).sum(2)), w=weight(8, 3, 1, 1))),
        ("mv", Net(lambda net, x: net.tail((x.movedim(1, -1) @ net.w)[:, None].expand(-1, 8, -1, -1)), w=weight(3))),
        (
            "conv_transpose",
            Net(lambda net, x: net.tail(net.up(x[:, :1]).expand(-1, 8, -1, -1)), up=nn.ConvTranspose2d(1, 1, 1)),
        ),
    ],
)
def test_small_weights_that_mix_pixels_end_the_search_too(operation, model):
    with pytest.raises(TrActError, match=says(f"`{operation}`")):
        find_first_layers(model)


def test_tokens_that_are_placed_among_patches_mix_nothing():
    def run(net, x):
        patches = rows(x)
        place = torch.zeros(1, dtype=torch.long, device=x.device)
        return net.tail(grid(net.stem(patches.index_copy(1, place, net.token.expand(len(x), 1, 48)))))

    assert names(Net(run, token=weight(1, 1, 48), stem=nn.Linear(48, 8))) == ["stem"]


def test_the_search_writes_into_nothing_of_the_users():
    class Momentum(nn.Module):
        """A forward that looks at values, and moves its weights, its input and all random numbers."""

        def __init__(self):
            super().__init__()
            self.stem, self.register = nn.Conv2d(3, 8, 4, 4), nn.Linear(1, 1)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            with torch.no_grad():
                self.register.weight.add_(1)
                self.count.add_(1)
                x.sub_(float(x.mean()) + random.random() + np.random.rand())
            return self.stem(x)

    model, example = Momentum(), torch.rand(2, 3, 8, 8)
    state, original = copy.deepcopy(model.state_dict()), example.clone()
    numbers = random.getstate(), np.random.get_state()[1].tolist()
    assert names(model, example_batch=example) == names(model) == ["stem"]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(example, original)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == numbers


def test_named_tuples_and_other_mappings_stay_what_they_are():
    class Sample(NamedTuple):
        image: torch.Tensor
        label: int

    class ByName(Bands):
        def forward(self, batch):
            return super().forward(batch.image if isinstance(batch, Sample) else batch["pixels"])

    x = torch.rand(2, 13, 32, 32)
    assert names(ByName(), example_batch=(Sample(x, 1),)) == ["stem"]
    assert names(ByName(), example_batch=(hf.BatchFeature({"pixels": x}),)) == ["stem"]


def test_types_that_hold_nothing_but_tensors_are_examples():
    class Tensors(dict):
        def __setitem__(self, name, value):
            if not isinstance(value, torch.Tensor):
                raise ValueError(f"{value!r} is no tensor")
            super().__setitem__(name, value)

    class ByName(Bands):
        def forward(self, batch):
            return super().forward(batch["pixels"])

    example = (Tensors(pixels=torch.rand(2, 13, 32, 32)),)
    assert names(ByName(), example_batch=example) == ["stem"]
    packed = nn.utils.rnn.pack_sequence([torch.rand(4, 6), torch.rand(2, 6)])
    rows = Net(lambda net, packed: net.stem(packed.data), stem=nn.Linear(6, 4))
    assert names(rows, example_batch={"x": packed}) == ["stem"]


def test_an_error_of_an_example_s_own_types_shows():
    example = {"x": {"pixels": MappingProxyType({"x": torch.rand(2, 3, 8, 8)})}}
    with pytest.raises(TypeError, match="mappingproxy"):
        find_first_layers(Net(lambda net, x: net.tail(x["pixels"]["x"])), example_batch=example)


def test_an_example_without_pixels_is_told():
    model = Net(lambda net, x: net.tail(torch.ones(1, 8, 4, 4, device=net.w.device)), w=weight(2))
    with pytest.raises(TrActError, match=says("no tensor of the batch met a weight", "`layers=`")):
        find_first_layers(model, example_batch=torch.ones(3))


def test_a_guess_that_failed_with_several_arguments_is_told(caplog):
    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.condition, self.stem = nn.Linear(32, 8), nn.Conv2d(3, 8, 4, 4)

        def forward(self, condition, image):
            shift = self.condition(condition)
            assert shift.dim() == 2
            return self.stem(image) + shift[:, :, None, None]

    assert names(Conditional()) == ["condition"]
    (record,) = caplog.records
    assert "no guess of a batch fitted the forward of the model" in record.getMessage()
    assert "far enough to meet condition, which is taken" in record.getMessage()


def test_a_model_of_text_and_images_is_searched_with_an_example():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.text, self.stem = nn.Embedding(9, 8), nn.Conv2d(3, 8, 4, 4)

        def forward(self, input_ids, images=None):
            return self.text(input_ids).mean(1) + self.stem(images).mean((2, 3))

    batch = {"input_ids": torch.ones(2, 5, dtype=torch.long), "images": torch.rand(2, 3, 32, 32)}
    assert names(Both(), example_batch=batch) == ["stem"]


class Int8Linear(nn.Module):
    """A quantised layer, as bitsandbytes has them."""

    def __init__(self, n, m):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(m, n, dtype=torch.int8), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


@pytest.mark.parametrize("kind", ["parameter", "packed"])
def test_a_quantised_first_layer_is_not_passed_over(kind):
    if kind == "parameter":
        model = nn.Sequential(Int8Linear(48, 8), nn.GELU(), nn.Linear(8, 4))
    else:
        model = nn.Sequential(nn.Sequential(nn.Linear(48, 8)), nn.GELU(), nn.Linear(8, 4))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model[0] = torch.ao.quantization.quantize_dynamic(model[0], {nn.Linear})
    with pytest.raises(TrActError, match="the first weight that the pixels meet is in 0"):
        find_first_layers(model, example_batch=torch.randn(4, 48))


def test_a_low_rank_beside_a_quantised_layer_is_found():
    class LoRA(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer, self.lora_A, self.lora_B = Int8Linear(48, 8), nn.Linear(48, 2), nn.Linear(2, 8)

        def forward(self, x):
            return self.base_layer(x) + self.lora_B(self.lora_A(x))

    model = nn.Sequential(LoRA(), nn.GELU(), nn.Linear(8, 4))
    assert names(model, example_batch=torch.randn(4, 48)) == ["0.lora_A"]


def test_a_users_own_wrapper_is_part_of_the_model():
    class Normalised(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.bands = module, nn.Parameter(torch.randn(3, 6))

        def forward(self, x):
            return self.module(torch.einsum("cb,nbhw->nchw", self.bands, x))

    model = Normalised(nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten()))
    with pytest.raises(TrActError, match="the first weight that the pixels meet is in the model itself"):
        find_first_layers(model, example_batch=torch.randn(2, 6, 8, 8))
    assert names(nn.DataParallel(model.module)) == ["0"]


def test_a_model_whose_own_train_returns_nothing_is_tried():
    class Quiet(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder, self.stem = nn.Conv2d(8, 3, 1), nn.Conv2d(3, 8, 4, 4)

        def train(self, mode=True):
            super().train(mode)

        def forward(self, pixel_values):
            return self.decoder(self.stem(pixel_values))

    assert names(Quiet()) == ["stem"]


def test_two_stems_may_share_a_stack_of_channels():
    class Depth(nn.Module):
        def __init__(self):
            super().__init__()
            self.rgb, self.depth = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(1, 8, 4, 4)

        def forward(self, x):
            return torch.cat([self.rgb(x[:, :3]), self.depth(x[:, 3:])], 1)

    assert names(Depth()) == ["rgb", "depth"]


def test_a_model_that_has_other_layers_in_evaluation_mode_is_followed_by_order(caplog):
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.narrow = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(3, 8, 4, 4)

        def train(self, mode=True):
            if not mode and hasattr(self, "wide"):
                del self.wide, self.narrow
                self.fused = nn.Conv2d(3, 8, 4, 4)
            return super().train(mode)

        def forward(self, x):
            return self.wide(x) + self.narrow(x) if self.training else self.fused(x)

    model = Fused()
    assert names(model) == ["wide"]
    assert "in the order of the modules" in caplog.text
    assert names(model, layers=["wide", "narrow"]) == ["wide", "narrow"]


def test_a_named_weight_that_its_parent_reads_is_found_behind_a_guess_that_fails():
    class Timed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.time, self.out = nn.Conv2d(3, 8, 4, 4), nn.Linear(3, 8), nn.Linear(8, 8)

        def forward(self, x, t):
            h = self.stem(x).flatten(2).mT + self.time(t)[:, None]
            return F.linear(h, self.out.weight)

    model = Timed()
    handle = apply_tract(model, layers=["stem", "out"])
    model(torch.randn(2, 3, 32, 32), torch.randn(2, 3)).square().mean().backward()
    assert set(handle.stats()) == {"stem", "out"}


def test_tokens_in_a_mapping_are_no_pixels():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.words = nn.Conv2d(3, 8, 8, 8), nn.Embedding(50, 8)

        def forward(self, input_ids, picture=None):
            return self.stem(picture).mean((2, 3))[:, None] + self.words(input_ids)

    batch = {"input_ids": torch.ones(2, 5, dtype=torch.long), "picture": torch.rand(2, 3, 32, 32)}
    assert names(Reader(), example_batch=batch) == ["stem"]


def test_words_in_a_second_argument_are_no_pixels(caplog):
    class Captioner(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.words = nn.Conv2d(3, 8, 8, 8), nn.Embedding(50, 8)

        def forward(self, img, caption):
            return self.stem(img).mean((2, 3))[:, None] + self.words(caption)

    assert names(Captioner()) == ["stem"]
    (record,) = caplog.records
    assert "no guess of a batch fitted" in record.getMessage()


class Distilled(nn.Module):
    """Has a teacher that is trained no more, and is not frozen."""

    def __init__(self, with_student: bool = True) -> None:
        super().__init__()
        self.teacher = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten())
        self.student = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten()) if with_student else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = self.teacher(x)
        return target if self.student is None else (self.student(x) - target).square().mean()


@pytest.mark.parametrize("with_student", [True, False])
def test_a_teacher_without_gradients_counts_where_nothing_else_does(with_student):
    found = find_first_layers(Distilled(with_student))
    assert [layer.name for layer in found] == ["student.0" if with_student else "teacher.0"]


class Filtered(nn.Module):
    """Reads pixels by a weight that no layer has, without gradients, beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(4, 3 * 64))
        self.other = nn.Conv2d(3, 4, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            features = x.flatten(1) @ self.filter.T
        return features + self.other(x).flatten(1)


def test_a_weight_of_no_layer_is_an_error_though_gradients_are_off():
    with pytest.raises(TrActError, match="the first weight that the pixels meet is in the model itself"):
        find_first_layers(Filtered(), example_batch=torch.randn(2, 3, 8, 8))


class TwoStages(nn.Module):
    """Takes images as detectron2's do, and has a later layer registered first."""

    def __init__(self) -> None:
        super().__init__()
        self.lateral = nn.Conv2d(8, 4, 1)
        self.stem = nn.Conv2d(3, 8, 7, 2, 3)

    def forward(self, batched_inputs: list) -> list:
        return self.read(batched_inputs)

    def read(self, batched_inputs: list) -> list:
        images = [row["image"] for row in batched_inputs]
        sizes = [(row["height"], row["width"], *row["original_size"]) for row in batched_inputs]
        return [self.lateral(self.stem(torch.stack(images))), sizes]


class Sam(TwoStages):
    def forward(self, batched_input: list, multimask_output: bool) -> list:
        return self.read(batched_input)


class Stacked(TwoStages):
    def forward(self, batched_inputs: torch.Tensor) -> torch.Tensor:
        return self.lateral(self.stem(batched_inputs))


@pytest.mark.parametrize("kind", [TwoStages, Sam, Stacked])
def test_a_list_with_a_dictionary_for_each_image_is_guessed(kind):
    (layer,) = find_first_layers(kind())
    assert layer.name == "stem"


class Refusing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(64, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("not this size")


def test_guesses_with_values_take_little_memory(monkeypatch):
    made, original = [], torch.rand
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: made.append(original(*args, **kwargs)) or made[-1])
    (layer,) = find_first_layers(Refusing())
    assert layer.name == "stem"
    assert made
    assert max(tensor.numel() for tensor in made) <= MAX_NUMBERS
