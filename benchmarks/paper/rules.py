"""Defines other rules for the first layer's gradient than the paper's, in their plainest form, to compare them.

Each multiplies the weight's gradient g, flattened to (m, n), by a power of a damped moment of the patches p:

    power 1/2   g (C + lam I)^-1/2
    relative    g (C + lam tr(C) / n I)^-1
    center      the ridge solution for weight and bias together: with mu = mean p and S = C - mu mu^T,
                dW = (g - g_b mu^T) (S + lam I)^-1 and db = g_b - dW mu; without a bias g_b = 0
    schedule    g (C + lam_t I)^-1, lam_t from lam at the first step to lam_end at the last, by equal factors

What is measured in docs/results/beyond.md; one process, no accumulation.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Rule(NamedTuple):
    """Says what is done with the gradient; the default is the paper's."""

    lam: float = 0.1
    power: float = 1.0
    relative: bool = False
    center: bool = False
    # The damping of the last step; where it is None, lam stays.
    lam_end: float | None = None

    def apply(
        self, grad: Tensor, bias_grad: Tensor | None, moment: Tensor, mean: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return what is handed on for `grad` (m, n) and `bias_grad` (m,), by C (n, n) and mu (n,), in float64."""
        g = grad.double()
        moment = moment.double()
        mean = mean.double()
        if self.center:
            moment = moment - torch.outer(mean, mean)
            if bias_grad is not None:
                g = g - torch.outer(bias_grad.double(), mean)
        lam: float | Tensor = self.lam
        if self.relative:
            lam = self.lam * (moment.trace() / len(moment))
        values, vectors = torch.linalg.eigh(moment)
        powers = (values.clamp(min=0) + lam) ** -self.power
        new = (g @ vectors) * powers @ vectors.mT
        if self.center and bias_grad is not None:
            bias_grad = (bias_grad.double() - new @ mean).to(bias_grad)
        return new.to(grad), bias_grad


class _Identity(torch.autograd.Function):
    """Returns weight and bias unchanged; their gradients follow the rule."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, patches: Tensor, rule: Rule
    ) -> tuple[Tensor, Tensor | None]:
        """Take the moments of `patches` (b, n)."""
        ctx.rule = rule
        ctx.moment = patches.mT @ patches / len(patches)
        ctx.mean = patches.mean(0)
        if bias is not None:
            bias = bias.view_as(bias)
        return weight.view_as(weight), bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor, bias_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients that the rule says."""
        new, bias_grad = ctx.rule.apply(grad.flatten(1), bias_grad, ctx.moment, ctx.mean)
        return new.view_as(grad), bias_grad, None, None


class RuledConv2d(nn.Conv2d):
    """Convolves like nn.Conv2d, with gradients that follow `rule`."""

    rule: Rule
    last: int
    step: Tensor

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if torch.is_grad_enabled():
            weight, bias = _Identity.apply(weight, bias, self._patches(input), self._rule_of_this_step())
        result: Tensor = super()._conv_forward(input, weight, bias)
        return result

    @torch.no_grad()
    def _patches(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            columns = F.unfold(input.float(), self.kernel_size, self.dilation, self.padding, self.stride)  # type: ignore[arg-type]
            return columns.movedim(1, -1).flatten(0, 1)

    def _rule_of_this_step(self) -> Rule:
        rule = self.rule
        if rule.lam_end is None:
            return rule
        progress = min(1.0, float(self.step) / max(1, self.last))
        # This is not done in place, since copies of the model share the tensor.
        self.step = self.step + 1
        return rule._replace(lam=rule.lam ** (1 - progress) * rule.lam_end**progress)


def ruled(layer: nn.Conv2d, rule: Rule, steps: int = 1) -> nn.Conv2d:
    """Return the layer itself, from now on by that rule, whose schedule ends at the last of `steps`."""
    if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise ValueError(f"`layer` (={layer}) must be an ungrouped convolution with padding of zeros in numbers.")
    layer.__class__ = RuledConv2d
    layer.__dict__ |= {"rule": rule, "last": steps - 1}
    # The step is in checkpoints, for runs that are resumed.
    layer.register_buffer("step", torch.zeros(()))
    return layer
