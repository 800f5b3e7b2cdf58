"""Makes the optimizers of arms whose first layer takes other steps than the rest."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.paper.layers import first_layer
from benchmarks.paper.named_optimizers import named_optimizer
from benchmarks.training.loop import MakeOptimizer, usual_optimizer
from benchmarks.training.recipe import Recipe


def optimizer_maker(variant: str, first_learning_rate: float, first_rate: float = 1.0) -> MakeOptimizer:
    """Return the function that makes the optimizers of an arm.

    Args:
        variant: of the arm.
        first_learning_rate: of the first layer under sgd_first.
        first_rate: the first layer's rate over that of the others, for every other variant.
    """

    def make(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
        layer = model.get_submodule(first_layer(model))
        if variant == "sgd_first":
            return _sgd_for_the_first(recipe, model, layer, first_learning_rate)
        if variant == "grafted":
            return _grafted(recipe, model, layer)
        optimizer = named_optimizer(recipe, model)
        if first_rate != 1.0:
            _take_out(optimizer, set(layer.parameters()), first_rate)
        return optimizer

    return make


def _take_out(optimizer: torch.optim.Optimizer, chosen: set[nn.Parameter], rate: float) -> None:
    """Give these parameters groups of their own, with `rate` times the learning rate."""
    for group in list(optimizer.param_groups):
        mine = _take(group, chosen)
        if mine:
            optimizer.add_param_group({**group, "params": mine, "lr": rate * group["lr"]})


def _take(group: dict[str, Any], chosen: set[nn.Parameter]) -> list[nn.Parameter]:
    """Take these parameters out of a group, and return those that it had."""
    taken, left = [], []
    for parameter in group["params"]:
        if parameter in chosen:
            taken.append(parameter)
        else:
            left.append(parameter)
    group["params"] = left
    return taken


def _sgd_for_the_first(recipe: Recipe, model: nn.Module, layer: nn.Module, rate: float) -> torch.optim.Optimizer:
    first = list(layer.parameters())
    theirs = set(first)
    rest = [parameter for parameter in model.parameters() if parameter not in theirs]
    sgd = torch.optim.SGD(first, rate, momentum=0.9)
    return Both(sgd, torch.optim.Adam(rest, recipe.learning_rate, weight_decay=recipe.weight_decay))


def _grafted(recipe: Recipe, model: nn.Module, layer: Any) -> torch.optim.Optimizer:
    if recipe.optimizer != "adam" or layer.kernel_size != layer.stride:
        raise ValueError(f"`variant` (='grafted') is of Adam (not {recipe.optimizer}) and of patches, not of {layer}.")
    rest = usual_optimizer(recipe, model)
    (decay,) = [group["weight_decay"] for group in rest.param_groups if _take(group, {layer.weight})]
    return Both(Grafted(layer, recipe.learning_rate, decay, recipe.lam), rest)


class Grafted(torch.optim.Optimizer):
    """Takes Adam's step of TrAct's gradient, as long in the layer's outputs as Adam's step of the plain gradient.

    With C the second moment of a batch's patches and g the weight's gradient, flattened to (m, n), let u0 be Adam's
    direction for g and u1 that for g (C + lam I)^-1. The weight moves by -lr s u1, where s makes both equally long in
    the outputs: s^2 = tr(u0 C u0^T) / tr(u1 C u1^T). That is grafting (Agarwal et al., 2020, arXiv 2002.11803) with
    the norm of output space.
    """

    def __init__(self, layer: nn.Conv2d, lr: float, weight_decay: float, lam: float) -> None:
        """Watch the patches of a layer.

        Args:
            layer: convolution of patches that do not overlap.
            lr: learning rate.
            weight_decay: added to both gradients as `weight_decay` times the weight.
            lam: damping.
        """
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": (0.9, 0.999), "eps": 1e-8}
        super().__init__([layer.weight], defaults)
        self.lam = lam
        self.patch = layer.kernel_size
        self.moment: Tensor | None = None
        layer.register_forward_pre_hook(self._watch)

    def _watch(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not torch.is_grad_enabled():
            return
        patches = F.unfold(inputs[0].detach(), self.patch, stride=self.patch).mT.flatten(0, 1).double()
        self.moment = patches.mT @ patches / len(patches)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take the step."""
        (group,) = self.param_groups
        (weight,) = group["params"]
        assert self.moment is not None
        damped = self.moment + self.lam * torch.eye(len(self.moment), dtype=torch.float64)
        plain = weight.grad.flatten(1).double()
        tract = torch.linalg.solve(damped, plain, left=False)
        decay = group["weight_decay"] * weight.flatten(1).double()
        state = self.state[weight]
        state["step"] = state.get("step", 0) + 1
        u0 = self._adam(state, "plain", plain + decay, group)
        u1 = self._adam(state, "tract", tract + decay, group)
        s = (self._length(u0) / self._length(u1).clamp(min=1e-30)).sqrt()
        weight -= (group["lr"] * s * u1).view_as(weight).to(weight.dtype)

    def _length(self, update: Tensor) -> Tensor:
        """Return tr(u C u^T), the mean square of what an update u (m, n) changes in the outputs."""
        assert self.moment is not None
        return (update @ self.moment * update).sum()

    @staticmethod
    def _adam(state: dict[str, Any], name: str, grad: Tensor, group: dict[str, Any]) -> Tensor:
        """Return Adam's direction, with the moments that `state` has under this name."""
        # Optimizers load their state in the weight's dtype.
        grad = grad.float()
        b1, b2 = group["betas"]
        mean = state.setdefault(f"{name}_mean", torch.zeros_like(grad))
        square = state.setdefault(f"{name}_square", torch.zeros_like(grad))
        mean.lerp_(grad, 1 - b1)
        square.lerp_(grad.square(), 1 - b2)
        unbiased = mean / (1 - b1 ** state["step"])
        root = (square / (1 - b2 ** state["step"])).sqrt()
        direction: Tensor = unbiased / (root + group["eps"])
        return direction.double()


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
