"""Models that something wraps, and models of other libraries, against the dense formula."""

import peft
import pytest
import torch
import torchvision
import transformers as hf
from torch import nn
from torch.nn.utils import parametrizations

from benchmarks.survey.check import differences, reference
from helpers.oracle import assert_close, expected
from hf_tract import apply_tract

SMALL = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def vit() -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(**SMALL, image_size=16, patch_size=4)).eval()


class Patches(nn.Module):
    """A stem in the style of vit-pytorch: patches as rows, a norm, a linear layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 24), nn.LayerNorm(24))
        self.head = nn.Linear(24, 4)

    def forward(self, img):
        rows = img.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        return self.head(self.embed(rows).mean(1))


class Wrapper(nn.Module):
    """One more module around a model, with a head of its own."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.head, self.body = nn.Linear(2, 3), body

    def forward(self, x):
        return self.head(self.body(x).logits)


class Tied(nn.Module):
    """The first layer's weight is used a second time, where it is an ordinary one."""

    def __init__(self):
        super().__init__()
        self.first, self.again = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.again.weight = self.first.weight

    def forward(self, x):
        return self.again(self.first(x).tanh())


def lora() -> nn.Module:
    attention = ["q_proj", "v_proj", "query", "value"]  # by the version of transformers
    return peft.get_peft_model(vit(), peft.LoraConfig(target_modules=attention, modules_to_save=["projection"], r=2))


def lora_on_the_stem() -> nn.Module:
    model = peft.get_peft_model(vit(), peft.LoraConfig(target_modules=["projection"], r=2))
    for name, parameter in model.named_parameters():  # lora_B starts as zero, and lora_A then has no gradient
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


WRAPPED = {
    "lora": (lora, "base_model.model.vit.embeddings.patch_embeddings.projection.modules_to_save.default"),
    "lora on the stem": (
        lora_on_the_stem,
        "base_model.model.vit.embeddings.patch_embeddings.projection.lora_A.default",
    ),
    "DataParallel": (lambda: nn.DataParallel(vit()), "vit.embeddings.patch_embeddings.projection"),
    "wrapper": (lambda: Wrapper(vit()), "body.vit.embeddings.patch_embeddings.projection"),
    "Sequential": (lambda: nn.Sequential(nn.Conv2d(3, 8, 5, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(392, 4)), "0"),
    "patches as rows": (Patches, "embed.1"),
    "weight norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 8, 4, 4)), nn.Flatten()), "0"),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_it_takes_the_first_layer_and_hands_on_its_gradient(name):
    make, stem = WRAPPED[name]
    model, x = make(), torch.randn(4, 3, 16, 16)
    path = {"DataParallel": f"module.{stem}"}.get(name, stem)
    want = reference(model, x, [path], lam=0.1)
    assert want.expected
    with apply_tract(model, lam=0.1) as handle:
        assert [layer.name for layer in handle.layers] == [stem]
        assert differences(model, x, want) == []


@pytest.mark.parametrize(
    "name, stem",
    [("resnet18", "conv1"), ("convnext_tiny", "features.0.0"), ("swin_t", "features.0.0"), ("vit_b_32", "conv_proj")],
)
def test_torchvision_models_have_the_rule_in_their_stem(name, stem):
    model, x = getattr(torchvision.models, name)().eval(), torch.randn(1, 3, 224, 224)
    nn.init.normal_([m for m in model.modules() if isinstance(m, nn.Linear)][-1].weight)  # ViT's head starts as zero
    want = reference(model, x, [stem], lam=0.1)
    with apply_tract(model, lam=0.1) as handle:
        assert [layer.name for layer in handle.layers] == [stem]
        assert differences(model, x, want) == []


def test_an_optimized_module_is_looked_through():
    model, x = vit(), torch.randn(4, 3, 16, 16)
    stem = model.vit.embeddings.patch_embeddings.projection
    compiled = torch.compile(model, backend="aot_eager")

    def grad(of: nn.Module) -> torch.Tensor:
        model.zero_grad()
        of(x).logits.backward(torch.ones(4, 2))
        return stem.weight.grad

    ordinary = grad(model)
    with apply_tract(compiled, lam=0.1) as handle:
        assert [layer.module for layer in handle.layers] == [stem]
        assert_close(grad(compiled), expected(ordinary, x, stem, 0.1), 1e-4)


def test_a_tied_weight_is_preconditioned_where_it_is_first_only():
    model, x = Tied(), torch.randn(7, 6)
    untied = Tied()
    untied.load_state_dict(model.state_dict())
    untied.again.weight = nn.Parameter(model.first.weight.detach().clone())
    for each in (model, untied):
        with apply_tract(each, lam=0.1, layers="first"):
            each(x).square().sum().backward()
    torch.testing.assert_close(model.first.weight.grad, untied.first.weight.grad + untied.again.weight.grad)


def test_several_layers_may_be_taken_also_deeper_ones():
    model, x = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(1152, 4)),
        torch.randn(2, 3, 16, 16),
    )
    want = reference(model, x, ["0", "2", "4"], lam=0.1)
    with apply_tract(model, lam=0.1, layers=["[02]", model[4]]) as handle:
        assert [layer.name for layer in handle.layers] == ["0", "2", "4"]
        assert differences(model, x, want) == []
