"""Holds what the paper compares TrAct with, on any first layer: input norms, whitening, the paper's package, SGD."""

import copy
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch_tract
from torch import Tensor, nn
from torchvision.transforms import v2

import hf_tract.core.step
from benchmarks.paper.cifar_models import PREFIX, cifar_model
from benchmarks.paper.rules import Rule, ruled
from benchmarks.training.image_data import Splits, to_tensor
from benchmarks.training.loop import ready_made, usual_optimizer
from benchmarks.training.models import Preprocessing
from benchmarks.training.recipe import Recipe
from hf_tract import apply_tract

RULES: dict[str, dict[str, Any]] = {
    "power": {"power": 0.5},
    "relative": {"relative": True},
    "center": {"center": True},
    "relative_center": {"relative": True, "center": True},
    "schedule_down": {"lam_end": 0.1},
    "schedule_up": {"lam_end": 0.8},
}
VARIANTS = ("none", "patch_norm", "dual_patch_norm", "whitening", "torch_tract", "sgd_first", "rounded", *RULES)


class Around(nn.Module):
    """A layer with something before and after it; it has the layer's weight, whose dtype models ask for."""

    def __init__(self, before: nn.Module, layer: nn.Module, after: nn.Module | None = None) -> None:
        super().__init__()
        self.before, self.layer, self.after = before, layer, after or nn.Identity()

    @property
    def weight(self) -> Tensor:
        """The layer's."""
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to features (B, C, H / patch, W / patch)."""
        result: Tensor = self.after(self.layer(self.before(x)))
        return result


class OnPatches(nn.Module):
    """Applies `inner` to each patch of an image, as (..., n) in the order of `weight.flatten(1)`; returns an image."""

    def __init__(self, patch: int, inner: nn.Module) -> None:
        super().__init__()
        self.patch, self.inner = patch, inner

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to images of that shape."""
        patches = F.pixel_unshuffle(x, self.patch).movedim(1, -1)
        return F.pixel_shuffle(self.inner(patches).movedim(-1, 1), self.patch)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Features of that shape."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Whitening(nn.Module):
    """Maps patches by a frozen matrix, so that the given ones get uncorrelated and of variance 1, as in airbench."""

    matrix: Tensor

    def __init__(self, patches: Tensor, eps: float = 5e-4) -> None:
        """Takes the map from the eigenvectors of the second moment of `patches` (b, n)."""
        super().__init__()
        patches = patches.double()
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        self.register_buffer("matrix", (vectors / (values + eps).sqrt()).float())

    def forward(self, patches: Tensor) -> Tensor:
        """Patches (..., n) to whitened ones."""
        return patches @ self.matrix


def maker(variant: str) -> Callable[[Recipe, Splits, Preprocessing], nn.Module]:
    """How the models of an arm are made."""

    def make(recipe: Recipe, splits: Splits, look: Preprocessing) -> nn.Module:
        if recipe.model.startswith(PREFIX):
            model = cifar_model(recipe.model, len(splits.names), json.loads(recipe.model_config))
        else:
            model = ready_made(recipe, splits, look)
        if variant == "rounded":  # preconditions the weight gradient that a 16-bit operation rounded
            hf_tract.core.step.ForwardCall.keep_output_grad = lambda *_: None  # type: ignore[method-assign]
        elif variant not in ("none", "sgd_first"):
            name = first_layer(model)
            parent, _, child = name.rpartition(".")
            layer = model.get_submodule(name)
            setattr(model.get_submodule(parent), child, changed(layer, variant, recipe, splits, look))
        return model

    return make


def changed(layer: Any, variant: str, recipe: Recipe, splits: Splits, look: Preprocessing) -> nn.Module:
    """What stands in the first layer's place."""
    if variant == "torch_tract":
        theirs: nn.Module = torch_tract.TrAct(copy.deepcopy(layer), l=recipe.lam)
        return theirs
    if variant in RULES:
        steps = recipe.epochs * (len(splits.train) // recipe.batch_size)
        return ruled(layer, Rule(recipe.lam, **RULES[variant]), steps)
    patch = layer.kernel_size[0]
    if layer.kernel_size != layer.stride:
        raise ValueError(f"`variant` (={variant!r}) is of patches that do not overlap, and {layer} has others.")
    n = layer.weight[0].numel()
    if variant == "whitening":
        return Around(OnPatches(patch, Whitening(some_patches(splits, look, patch))), layer)
    if variant == "patch_norm":
        return Around(OnPatches(patch, nn.LayerNorm(n, elementwise_affine=False)), layer)
    return Around(OnPatches(patch, nn.LayerNorm(n)), layer, ChannelNorm(layer.out_channels))


def some_patches(splits: Splits, look: Preprocessing, patch: int, images: int = 2000) -> Tensor:
    """The patches (b, n) of the first training images, normalised."""
    transform = v2.Compose(
        [*to_tensor(look.size), v2.ToDtype(torch.float32, scale=True), v2.Normalize(look.mean, look.std)]
    )
    rows = splits.train.select(range(min(images, len(splits.train))))
    pixels = torch.stack([transform(row[splits.image]) for row in rows])
    return F.pixel_unshuffle(pixels, patch).movedim(1, -1).flatten(0, 2)


def first_layer(model: nn.Module) -> str:
    """The name of the layer that TrAct would take."""
    handle = apply_tract(model)
    (layer,) = handle.layers
    handle.remove()
    return layer.name


def optimizer_maker(variant: str, first_learning_rate: float) -> Callable[[Recipe, nn.Module], torch.optim.Optimizer]:
    """How the optimizers of an arm are made."""
    if variant != "sgd_first":
        return usual_optimizer

    def make(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
        first = [*model.get_submodule(first_layer(model)).parameters()]
        rest = [parameter for parameter in model.parameters() if all(parameter is not each for each in first)]
        sgd = torch.optim.SGD(first, first_learning_rate, momentum=0.9)
        return Both(sgd, torch.optim.Adam(rest, recipe.learning_rate, weight_decay=recipe.weight_decay))

    return make


class Both(torch.optim.Optimizer):
    """Two optimizers of different parameters as one, for schedulers and checkpoints."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self.parts:
            part.state = self.state
            part.param_groups = [next(groups) for _ in part.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """A step of each."""
        for part in self.parts:
            part.step(closure)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the state of both."""
        super().load_state_dict(state_dict)
        self._share()
