"""Makes the models of the arms that TrAct is compared with."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch_tract
from torch import Tensor, nn
from torchvision.transforms import v2

import hf_tract.core.step
from benchmarks.paper.cifar_models import PREFIX, cifar_model
from benchmarks.paper.layers import (
    WHITENING_EPS,
    dual_patch_norm,
    first_layer,
    patch_norm,
    patches_of,
    whitened_coordinates,
    whitening_stem,
)
from benchmarks.paper.rules import Rule, ruled
from benchmarks.training.data import Normalization, Splits, to_tensor
from benchmarks.training.loop import MakeModel, usual_model
from benchmarks.training.models import make_model
from benchmarks.training.recipe import Recipe

RULES: dict[str, dict[str, Any]] = {
    "power": {"power": 0.5},
    "relative": {"relative": True},
    "center": {"center": True},
    "relative_center": {"relative": True, "center": True},
    "schedule_down": {"lam_end": 0.1},
    "schedule_up": {"lam_end": 0.8},
}
SAME_MODEL = ("none", "sgd_first", "grafted", "rounded", "frozen", "oracle")
# eigen: whitening whose damping is the recipe's lam; coordinates: the same, and it starts as the plain layer does
OF_PATCHES = ("patch_norm", "dual_patch_norm", "whitening", "eigen", "coordinates")
VARIANTS = (*SAME_MODEL, *OF_PATCHES, "torch_tract", *RULES)
# The whitening is taken from the patches of so many images.
WHITENED_IMAGES = 2000


def maker(variant: str, donor: Path | None = None) -> MakeModel:
    """Return the function that makes the models of an arm.

    Args:
        variant: of the arm.
        donor: folder of the model whose first layer is the start of `oracle`.
    """

    def make(recipe: Recipe, splits: Splits, look: Normalization) -> nn.Module:
        model = _plain_model(recipe, splits, look)
        if variant == "rounded":
            _precondition_the_rounded_gradient()
        elif variant == "frozen":
            model.get_submodule(first_layer(model)).requires_grad_(False)
        elif variant == "oracle":
            _take_first_layer(model, donor, recipe, splits)
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


def _take_first_layer(model: nn.Module, donor: Path | None, recipe: Recipe, splits: Splits) -> None:
    """Let the first layer start with the weight and bias of a trained model's."""
    if donor is None:
        raise ValueError("`variant` (='oracle') needs `donor`, the folder of a trained model.")
    trained = make_model(dataclasses.replace(recipe, model=str(donor), model_config={}), splits.names)
    name = first_layer(model)
    model.get_submodule(name).load_state_dict(trained.get_submodule(name).state_dict())


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
    if variant == "patch_norm":
        return patch_norm(layer)
    if variant == "dual_patch_norm":
        return dual_patch_norm(layer)
    patches = _some_patches(splits, look, layer.kernel_size[0])
    if variant == "coordinates":
        return whitened_coordinates(layer, patches, recipe.lam)
    return whitening_stem(layer, patches, recipe.lam if variant == "eigen" else WHITENING_EPS)


def _some_patches(splits: Splits, look: Normalization, patch: int) -> Tensor:
    """Return the patches (b, n) of the first training images, normalised."""
    to_float = v2.ToDtype(torch.float32, scale=True)
    transform = v2.Compose([*to_tensor(look.size), to_float, v2.Normalize(look.mean, look.std)])
    rows = splits.train.select(range(min(WHITENED_IMAGES, len(splits.train))))
    pixels = torch.stack([transform(row[splits.image]) for row in rows])
    return patches_of(pixels, patch).flatten(0, 2)
