"""What a preconditioner tells its user, each thing once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_tract.precondition import DampedInverse

logger = logging.getLogger(__name__)


def tell_once(told: set[str], message: str, *args: Any) -> None:
    """Warns, unless `told` holds the message already."""
    if message not in told:
        told.add(message)
        logger.warning(message + " This is said once.", *args)


def tell_unsolved(told: set[str], inverse: DampedInverse, lam: float) -> None:
    """Warns of a step that could not be factorised; waits for the device."""
    if bool(inverse.finite) and not bool(inverse.solved):
        tell_once(
            told,
            "TrAct: C + lam I (lam=%g) could not be factorised, in float64 neither: the first layer keeps its ordinary "
            "gradient in such steps. Normalise the pixels or raise lam.",
            lam,
        )


def tell_second_order(told: set[str]) -> None:
    """Warns of a pass over a graph whose gradient was handed on differentiably before."""
    tell_once(
        told,
        "TrAct: a backward runs again over a forward whose weight gradient was taken with `create_graph=True`. What it gives "
        "the first layer is the exact derivative of that preconditioned gradient (C held fixed), and is not preconditioned "
        "again. If the loss itself shares this forward, give it a forward of its own.",
    )


def look_for_other_uses(told: set[str], parameter: nn.Parameter, handed_on: Callable[[], Tensor | None]) -> None:
    """Arranges to warn, when the running pass ends, of a gradient that a weight gets from elsewhere than its layer.

    Args:
        told: what was told.
        parameter: the weight, whose `.grad` is empty before this pass.
        handed_on: returns what the layer has handed on, when the pass has ended.
    """

    def look() -> None:
        expected = handed_on()
        if parameter.grad is None or expected is None:
            return
        difference = parameter.grad.to(expected) - expected
        if bool(difference.norm() > 0.02 * expected.norm()):  # wide enough for 16-bit weights
            tell_once(
                told,
                "TrAct: the first layer's weight also gets a gradient from outside of its layer (it is tied, or another module "
                "uses it, or a hook changes it). That part is not preconditioned.",
            )

    if torch._C._current_graph_task_id() >= 0:
        torch.autograd.Variable._execution_engine.queue_callback(look)
