"""Makes the optimizers of docs/results/plan.md, E3, by their names in recipes."""

import torch
from pytorch_optimizer import SOAP, ScheduleFreeAdamW
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from torch import nn

from benchmarks.paper.layers import first_layer
from benchmarks.training.loop import usual_optimizer
from benchmarks.training.recipe import Recipe

MUON = "muon"
MUON_SPLIT = "muon_split"
# Its authors'; timm's factory gives every optimizer 0.9.
MUON_MOMENTUM = 0.95
# Those of AdamW by itself, for what Muon leaves to it; timm's Muon has (.9, .95) there.
ADAMW_BETAS = (0.9, 0.999)
OTHERS = {"soap": SOAP, "schedule_free": ScheduleFreeAdamW}
# What transformers and timm call the layer that returns the classes' scores.
HEADS = ("classifier.*", "head.*", "fc.*")


def named_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer that a recipe names: one of timm's, or one of these.

    muon_split is Muon as it is usually used: it takes the matrices of the blocks, and AdamW the first layer, the head,
    and what is no matrix. timm's own `muon` takes every matrix, and the patch embedding as one.
    """
    if recipe.optimizer == MUON_SPLIT:
        return _muon(recipe, model, (f"{first_layer(model)}.*", *HEADS))
    if recipe.optimizer == MUON:
        return _muon(recipe, model, ())
    if recipe.optimizer not in OTHERS:
        return usual_optimizer(recipe, model)
    groups = param_groups_weight_decay(model, recipe.weight_decay, weight_decay_exclude_1d=not recipe.decay_all)
    made: torch.optim.Optimizer = OTHERS[recipe.optimizer](groups, recipe.learning_rate)
    return made


def _muon(recipe: Recipe, model: nn.Module, by_adamw: tuple[str, ...]) -> torch.optim.Optimizer:
    """Return timm's Muon, which leaves to AdamW the parameters of these patterns and those that are no matrices."""
    made: torch.optim.Optimizer = create_optimizer_v2(
        model,
        MUON,
        recipe.learning_rate,
        recipe.weight_decay,
        momentum=MUON_MOMENTUM,
        filter_bias_and_bn=not recipe.decay_all,
        fallback_list=by_adamw,
        betas=ADAMW_BETAS,
    )
    return made
