"""What a preconditioner tells its user, each thing once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_tract.core.solve import DampedInverse

logger = logging.getLogger(__name__)

MEAN_EIGENVALUE_RANGE = (0.3, 3.0)  # of C, for which a lam of 0.05 to 0.2 stands as it is
LAM_SHARE = (0.05, 0.2)  # of the mean eigenvalue


def tell_once(told: set[str], message: str, *args: Any) -> None:
    """Warns, unless `told` holds the message already."""
    if message not in told:
        told.add(message)
        logger.warning(message + " This is said once.", *args)


def advice_on_lam(mean: float, lam: float) -> str:
    """Returns what speaks against `lam` where C's mean eigenvalue is `mean`; nothing where it is about 1."""
    low, high = MEAN_EIGENVALUE_RANGE
    if not mean > 0 or low <= mean <= high:  # also what is not finite
        return ""
    effect = "most directions are scaled alike" if mean < low else "the first layer learns slowly"
    return (
        f"the mean eigenvalue of C, the mean square of what the layer reads, is about {mean:.2g}. A lam of 0.05 to 0.2 is for "
        f"standardised pixels, where it is 1; with lam={lam:g} {effect}. If these are pixels, standardise them (each band by "
        f"itself, a CT's window, empty pixels set to 0 afterwards), or use a lam of {LAM_SHARE[0] * mean:.2g} to "
        f"{LAM_SHARE[1] * mean:.2g}."
    )


def look_at_scale(name: str, mean: float, lam: float) -> None:
    """Warns where the pixels of the layer `name` have another scale than `lam` is meant for."""
    if advice := advice_on_lam(mean, lam):
        logger.warning("TrAct: %s: %s This is said once.", name, advice)


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
