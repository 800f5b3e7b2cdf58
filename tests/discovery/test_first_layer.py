"""Which layer is the first: transformers' models, timm's, any module, and the user's word."""

import logging
import warnings
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import timm
import torch
import transformers as hf
from torch import nn

from helpers.models import STEM, small_vit
from helpers.oracle import says
from hf_tract import TrActError, apply_tract, find_first_layers

TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
VIT = {**TINY, "image_size": 32, "patch_size": 8}
CONVNEXT = {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}
SWIN = {"image_size": 32, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
DINOV2 = {name: value for name, value in VIT.items() if name != "intermediate_size"}

TRANSFORMERS = {
    "ViT": (hf.ViTConfig(**VIT), "embeddings.patch_embeddings.projection"),
    "DeiT": (hf.DeiTConfig(**VIT), "embeddings.patch_embeddings.projection"),
    "Beit": (hf.BeitConfig(**VIT), "embeddings.patch_embeddings.projection"),
    "Swin": (hf.SwinConfig(**SWIN), "embeddings.patch_embeddings.projection"),
    "Dinov2": (hf.Dinov2Config(**DINOV2), "embeddings.patch_embeddings.projection"),
    "ConvNext": (hf.ConvNextConfig(**CONVNEXT), "embeddings.patch_embeddings"),
    "ConvNextV2": (hf.ConvNextV2Config(**CONVNEXT), "embeddings.patch_embeddings"),
    "ResNet": (hf.ResNetConfig(**RESNET), "embedder.embedder.convolution"),
}


def names(model: nn.Module, **kwargs) -> list[str]:
    return [layer.name for layer in find_first_layers(model, **kwargs)]


@pytest.mark.parametrize("family", TRANSFORMERS)
@pytest.mark.parametrize("head", ["Model", "ForImageClassification"])
def test_a_transformers_model_is_searched(family, head):
    config, stem = TRANSFORMERS[family]
    model = getattr(hf, family + head)(config)
    prefix = "" if head == "Model" else f"{model.base_model_prefix}."
    (layer,) = find_first_layers(model)
    assert layer.name == prefix + stem
    assert layer.module is model.get_submodule(layer.name)
    assert layer.source == "reached first by the pixels"


def test_a_model_of_two_modes_is_searched_in_its_vision_tower():
    small = {**TINY, "image_size": 32, "patch_size": 8}
    model = hf.CLIPModel(hf.CLIPConfig(text_config=TINY, vision_config=small, projection_dim=16))
    assert names(model) == ["vision_model.embeddings.patch_embedding"]


def test_the_search_leaves_the_model_and_the_random_numbers_as_they_are(recwarn):
    class Noisy(hf.ViTForImageClassification):
        def forward(self, pixel_values):
            warnings.warn("told at every forward", stacklevel=1)
            return super().forward(pixel_values + torch.rand(1).to(pixel_values.device))

    model = Noisy(hf.ViTConfig(**VIT)).train()
    random = torch.get_rng_state()
    before = {name: (vars(m).keys(), m.training) for name, m in model.named_modules()}
    state = {name: (p.device, p.requires_grad, p.data_ptr()) for name, p in model.named_parameters()}
    assert find_first_layers(model)[0].source == "reached first by the pixels"
    assert {name: (vars(m).keys(), m.training) for name, m in model.named_modules()} == before
    assert {name: (p.device, p.requires_grad, p.data_ptr()) for name, p in model.named_parameters()} == state
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert not recwarn.list


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "resnet18",
        "convnext_atto",
        "tf_mobilenetv3_small_075",
        "crossvit_tiny_240",
        "crossvit_9_dagger_240",
    ],
)
def test_timm_says_which_it_is(name):
    model = timm.create_model(name)
    first = model.pretrained_cfg["first_conv"]
    assert names(model) == ([first] if isinstance(first, str) else list(first))
    assert {layer.source for layer in find_first_layers(model)} == {"timm's first_conv"}


def test_a_timm_model_whose_stem_was_exchanged_is_searched():
    """Its config still names a layer that is there, behind those of the new stem."""
    model = timm.create_model("test_vit", img_size=32, patch_size=8)
    width = model.embed_dim
    model.patch_embed = nn.Sequential(OrderedDict(stem=nn.Conv2d(3, 8, 4, 4), proj=nn.Conv2d(8, width, 2, 2)))
    model.patch_embed.append(nn.Flatten(2)).append(Transposed())
    assert names(model) == ["patch_embed.stem"]


class Transposed(nn.Module):
    """(batch, channels, patches) to (batch, patches, channels)."""

    def forward(self, maps):
        return maps.transpose(1, 2)


def test_an_example_batch_is_tried_though_timm_names_the_layer():
    model = timm.create_model("test_vit", img_size=32, patch_size=8)
    (layer,) = find_first_layers(model, example_batch=torch.randn(2, 3, 32, 32))
    assert (layer.name, layer.source) == ("patch_embed.proj", "reached first by the pixels")
    with pytest.raises(TrActError, match=says("`example_batch`", "failed on it with")):
        find_first_layers(model, example_batch=torch.randn(2, 5, 32, 32))


def test_a_timm_model_in_transformers_is_searched():
    config = hf.TimmWrapperConfig.from_dict({"architecture": "resnet18", "num_classes": 4})
    model = hf.TimmWrapperForImageClassification(config)
    assert names(model) == ["timm_model.conv1"]


def test_the_order_of_the_forward_beats_the_order_of_the_modules():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 2)
            self.second = nn.Conv2d(8, 8, 3)
            self.first = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return self.head(self.second(self.first(x)).mean((2, 3)))

    assert names(Backwards()) == ["first"]


def test_every_branch_that_the_pixels_reach_is_a_first_layer():
    class TwoBranches(nn.Module):
        def __init__(self):
            super().__init__()
            self.coarse, self.fine, self.head = nn.Conv2d(3, 4, 8, 8), nn.Conv2d(3, 4, 4, 4), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(torch.cat([self.coarse(x).mean((2, 3)), self.fine(x).mean((2, 3))], 1))

    assert names(TwoBranches()) == ["coarse", "fine"]


def test_a_layer_that_reads_pixels_beside_features_is_not_first():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(7, 2, 3)

        def forward(self, x):
            return self.last(torch.cat([x, self.stem(x)], 1))

    assert names(Skip()) == ["stem"]


def test_a_forward_that_looks_at_values_is_run_with_values():
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.other, self.stem = nn.Conv2d(4, 3, 1), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.other(self.stem(x / x.max().item()))

    model = Careful()
    random = torch.get_rng_state()
    (layer,) = find_first_layers(model)
    assert (layer.name, layer.source) == ("stem", "reached first by the pixels")
    assert model.stem.weight.requires_grad
    assert model.stem.weight.grad is None
    assert torch.equal(torch.get_rng_state(), random)


def test_a_fixed_filter_is_no_layer():
    class Filtered(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("blur", torch.ones(3, 3, 3, 3) / 27)
            self.stem = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.stem(nn.functional.conv2d(x, self.blur))

    assert names(Filtered()) == ["stem"]


def test_a_depth_map_beside_the_pixels_is_none_of_them():
    class Prompted(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = None
            self.depth, self.stem = nn.Conv2d(1, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, pixel_values, prompt_depth):
            return self.stem(pixel_values) + self.depth(prompt_depth)

    batch = {"pixel_values": torch.rand(1, 3, 8, 8), "prompt_depth": torch.rand(1, 1, 8, 8)}
    assert names(Prompted(), example_batch=batch) == ["stem"]


@pytest.mark.parametrize(
    "name, config", [("BertModel", hf.BertConfig(**TINY)), ("ImageGPTModel", hf.ImageGPTConfig(n_layer=1))]
)
def test_a_model_of_tokens_is_told_that_it_has_an_embedding(name, config):
    with pytest.raises(TrActError, match=says(f"`model` (={name}) reads `input_ids` and no pixels", "`layers=`")):
        find_first_layers(getattr(hf, name)(config))


def test_the_search_with_values_draws_no_random_numbers_of_the_user():
    """Guesses of a batch are random where they need values."""
    model, random = nn.Sequential(nn.Unflatten(1, (3, 5, 7)), nn.Conv2d(3, 4, 2)), torch.get_rng_state()
    assert names(model) == ["1"]
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    "model, inputs, expected",
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(784, 4)), None, "1"),
        (nn.Sequential(nn.LayerNorm(20), nn.Linear(20, 4)), None, "1"),
        (nn.Sequential(nn.Conv1d(2, 4, 5), nn.ReLU(), nn.Conv1d(4, 4, 3)), None, "0"),
        (nn.Sequential(nn.Conv3d(3, 4, 2), nn.ReLU()), None, "0"),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 2)), None, "1"),
        (nn.Sequential(nn.Unflatten(1, (3, 5, 7)), nn.Conv2d(3, 4, 2)), torch.zeros(2, 105), "1"),
    ],
)
def test_any_module_is_searched(model, inputs, expected):
    assert names(model, example_batch=inputs) == [expected]


def test_a_batch_of_keyword_arguments_shows_the_way():
    model = hf.CLIPModel(hf.CLIPConfig(text_config=TINY, vision_config=VIT, projection_dim=16))
    batch = {"input_ids": torch.zeros(2, 5, dtype=torch.long), "pixel_values": torch.zeros(2, 3, 32, 32)}
    (layer,) = find_first_layers(model, example_batch=batch)
    assert layer.name == "vision_model.embeddings.patch_embedding"
    assert layer.source == "reached first by the pixels"


def test_wrappers_are_looked_through():
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.ReLU())
    assert names(torch.compile(model)) == names(nn.DataParallel(model)) == ["0"]
    assert names(torch.compile(model), layers="_orig_mod.0") == ["0"]


def net() -> nn.Module:
    model = nn.Sequential()
    model.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
    model.head = nn.Linear(8, 2)
    return model


def test_layers_are_given_by_name_pattern_or_module():
    model = net()
    assert names(model, layers="head") == ["head"]
    assert names(model, layers="stem.*") == ["stem.0", "stem.2"]
    assert names(model, layers=["head", model.stem[0]]) == ["head", "stem.0"]
    assert names(model, layers=model.stem[2]) == ["stem.2"]


@pytest.mark.parametrize(
    "layers, parts",
    [
        ("stem.O", ("`layers` (='stem.O') matches no convolution or linear layer", "the nearest are", "stem.0")),
        ("x.*", ("`layers` (='x.*') matches no", "the nearest are")),
        ("stem.1", ("`layers` (='stem.1') is a BatchNorm2d", "no convolution or linear layer", "name one that is")),
        ("stem", ("`layers` (='stem') is a Sequential", "did you mean stem.0, stem.2?")),
        (nn.Linear(2, 2), ("`layers` (=Linear) is no module of `model` (=Sequential)", "give one of its own modules")),
        (None, ("`layers` (=None) must be 'auto', a layer's name or pattern, a module, or several of these",)),
        ([], ("`layers` (=[]) must be 'auto'",)),
        (3, ("`layers` (=3) must be 'auto'",)),
    ],
)
def test_layers_that_cannot_be_taken_are_refused(layers, parts):
    with pytest.raises(TrActError, match=says(*parts)):
        apply_tract(net(), layers=layers)


def test_the_model_itself_as_a_layer_is_told_with_layers_of_its():
    model = net()
    with pytest.raises(TrActError, match=says("is a Sequential", "did you mean")):
        apply_tract(model, layers=model)


@pytest.mark.parametrize("traits", [{"config": SimpleNamespace(input_size="large")}, {"pretrained_cfg": "a string"}])
def test_a_config_that_means_something_else_is_passed_over(traits):
    model = net()
    for name, value in traits.items():
        setattr(model, name, value)
    assert names(model) == ["stem.0"]


def test_a_model_that_has_run_is_searched_like_a_new_one():
    """transformers leaves hooks on a model that has run, and without them it collects no hidden states."""

    class TwoStems(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit, self.second = small_vit().vit, nn.Conv2d(3, 4, 4, 4)
            self.config = self.vit.config

        def forward(self, pixel_values):
            middle = self.vit(pixel_values, output_hidden_states=True).hidden_states[1]
            return middle.mean() + self.second(pixel_values).mean()

    model = TwoStems()
    found = [STEM, "second"]
    assert names(model) == found
    model(torch.randn(1, 3, 16, 16))
    assert any(module._forward_hooks for module in model.modules())
    called = []
    model.vit.register_forward_hook(lambda *_: called.append(1))
    assert names(model) == found
    assert not called


def test_a_tower_is_not_what_begins_with_its_name():
    class Untried(nn.Module):
        def __init__(self):
            super().__init__()
            self.visual_projection = nn.Linear(4, 4)
            self.visual = nn.Sequential(nn.Linear(4, 4))

        def forward(self, words, images, hints, masks):
            raise NotImplementedError

    assert names(Untried()) == ["visual.0"]


def test_a_quantised_or_uninitialised_layer_is_refused():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.Linear(4, 2))
    with pytest.raises(TrActError, match=says("`layers` (='0') is a LazyConv2d")):
        apply_tract(model, layers="0")
    model[1].weight = nn.Parameter(torch.zeros(2, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TrActError, match=says("`layers` (='1') is a Linear of torch.int8")):
        apply_tract(model, layers="1")


def test_a_model_without_such_a_layer_is_refused():
    with pytest.raises(
        TrActError, match=says("`model` (=Sequential) has no convolution or linear layer", "it has Embedding, ReLU")
    ):
        apply_tract(nn.Sequential(nn.Embedding(4, 4), nn.ReLU()))


def test_a_frozen_layer_warns_and_acts_once_it_is_unfrozen(caplog):
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    with caplog.at_level(logging.WARNING, "hf_tract"):
        handle = apply_tract(model)
    (record,) = caplog.records
    assert "the first layer (0) is frozen, so TrAct does nothing." in record.getMessage()
    assert "call `model.get_submodule('0').requires_grad_(True)`" in record.getMessage()
    x = torch.randn(5, 3, 2, 2)
    model(x).sum().backward()
    assert handle.stats() == {}
    model[0].requires_grad_(True)
    model(x).sum().backward()
    assert list(handle.stats()) == ["0"]


def test_a_frozen_teacher_is_not_to_be_unfrozen(caplog):
    apply_tract(nn.Sequential(nn.Conv2d(3, 4, 4, 4).requires_grad_(False), nn.Conv2d(4, 4, 1)))
    assert (
        "or name the layer that you train with `layers=` (if this is a teacher's, or a fixed transform)" in caplog.text
    )


def test_a_frozen_layer_asked_for_by_name_is_an_error():
    model = net()
    model.stem[0].weight.requires_grad_(False)
    with pytest.raises(
        TrActError, match=says("`layers` (='stem.0') names stem.0, which is frozen", "`requires_grad=True`")
    ):
        apply_tract(model, layers="stem.0")


def test_lora_on_the_first_layer_takes_its_trainable_half(caplog):
    import peft

    model = hf.ViTForImageClassification(hf.ViTConfig(**VIT))
    with caplog.at_level(logging.WARNING, "hf_tract"):
        handle = apply_tract(peft.get_peft_model(model, peft.LoraConfig(target_modules=["projection"], r=2)))
    assert [layer.name.split("projection.")[1] for layer in handle.layers] == ["lora_A.default"]
    assert not caplog.records


def test_a_model_with_layers_that_are_not_made_yet_is_searched():
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(), nn.LazyLinear(10))
    assert [(layer.name, layer.source) for layer in find_first_layers(model)] == [("0", "first in module order")]
