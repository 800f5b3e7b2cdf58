"""Makes the models and optimizers of the arms that TrAct is compared with."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
import torch_tract
from torch import Tensor, nn
from torchvision.transforms import v2

import hf_tract.core.step
from benchmarks.paper.cifar_models import PREFIX, cifar_model
from benchmarks.paper.layers import dual_patch_norm, patch_norm, whitening_stem
from benchmarks.paper.rules import Rule, ruled
from benchmarks.training.data import Normalization, Splits, to_tensor
from benchmarks.training.loop import MakeModel, MakeOptimizer, usual_model, usual_optimizer
from benchmarks.training.recipe import Recipe
from hf_tract import find_first_layers

RULES: dict[str, dict[str, Any]] = {
    "power": {"power": 0.5},
    "relative": {"relative": True},
    "center": {"center": True},
    "relative_center": {"relative": True, "center": True},
    "schedule_down": {"lam_end": 0.1},
    "schedule_up": {"lam_end": 0.8},
}
SAME_MODEL = ("none", "sgd_first", "rounded")
OF_PATCHES = ("patch_norm", "dual_patch_norm", "whitening")
VARIANTS = (*SAME_MODEL, *OF_PATCHES, "torch_tract", *RULES)
# The whitening is taken from the patches of so many images.
WHITENED_IMAGES = 2000


def maker(variant: str) -> MakeModel:
    """Return the function that makes the models of an arm."""

    def make(recipe: Recipe, splits: Splits, look: Normalization) -> nn.Module:
        model = _plain_model(recipe, splits, look)
        if variant == "rounded":
            _precondition_the_rounded_gradient()
        elif variant not in SAME_MODEL:
            name = first_layer(model)
            parent, _, child = name.rpartition(".")
            layer: Any = model.get_submodule(name)
            new = _in_its_place(layer, variant, recipe, splits, look)
            setattr(model.get_submodule(parent), child, new)
        return model

    return make


def _plain_model(recipe: Recipe, splits: Splits, look: Normalization) -> nn.Module:
    if recipe.model.startswith(PREFIX):
        return cifar_model(recipe.model, len(splits.names), recipe.model_config)
    return usual_model(recipe, splits, look)


def _precondition_the_rounded_gradient() -> None:
    """Let TrAct take the weight gradient that a 16-bit operation rounded, instead of computing its own."""
    hf_tract.core.step.ForwardCall.keep_output_grad = lambda *_: None  # type: ignore[method-assign]


def _in_its_place(layer: Any, variant: str, recipe: Recipe, splits: Splits, look: Normalization) -> nn.Module:
    """Return what stands in the first layer's place."""
    if variant == "torch_tract":
        theirs: nn.Module = torch_tract.TrAct(copy.deepcopy(layer), l=recipe.lam)
        return theirs
    if variant in RULES:
        steps = recipe.epochs * (len(splits.train) // recipe.batch_size)
        return ruled(layer, Rule(recipe.lam, **RULES[variant]), steps)
    if layer.kernel_size != layer.stride:
        raise ValueError(f"`variant` (={variant!r}) is of patches that do not overlap, and {layer} has others.")
    if variant == "whitening":
        return whitening_stem(layer, _some_patches(splits, look, layer.kernel_size[0]))
    if variant == "patch_norm":
        return patch_norm(layer)
    return dual_patch_norm(layer)


def _some_patches(splits: Splits, look: Normalization, patch: int) -> Tensor:
    """Return the patches (b, n) of the first training images, normalised."""
    to_float = v2.ToDtype(torch.float32, scale=True)
    transform = v2.Compose([*to_tensor(look.size), to_float, v2.Normalize(look.mean, look.std)])
    rows = splits.train.select(range(min(WHITENED_IMAGES, len(splits.train))))
    pixels = torch.stack([transform(row[splits.image]) for row in rows])
    return F.pixel_unshuffle(pixels, patch).movedim(1, -1).flatten(0, 2)


def first_layer(model: nn.Module) -> str:
    """Return the name of the layer that TrAct would take."""
    (layer,) = find_first_layers(model)
    return layer.name


def optimizer_maker(variant: str, first_learning_rate: float) -> MakeOptimizer:
    """Return the function that makes the optimizers of an arm."""
    if variant != "sgd_first":
        return usual_optimizer

    def make(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
        layer = model.get_submodule(first_layer(model))
        first = list(layer.parameters())
        theirs = {id(parameter) for parameter in first}
        rest = [parameter for parameter in model.parameters() if id(parameter) not in theirs]
        sgd = torch.optim.SGD(first, first_learning_rate, momentum=0.9)
        return Both(sgd, torch.optim.Adam(rest, recipe.learning_rate, weight_decay=recipe.weight_decay))

    return make


class Both(torch.optim.Optimizer):
    """Shows optimizers of different parameters as one, to schedulers and checkpoints."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        groups: list[dict[str, Any]] = []
        for part in parts:
            groups += part.param_groups
        super().__init__(groups, {})
        self.parts = parts
        self._share()

    def _share(self) -> None:
        start = 0
        for part in self.parts:
            end = start + len(part.param_groups)
            part.state = self.state
            part.param_groups = self.param_groups[start:end]
            start = end

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take a step of each."""
        for part in self.parts:
            part.step(closure)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of all."""
        super().load_state_dict(state_dict)
        self._share()
