"""Warns users of what TrAct cannot do for them, each thing once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_tract.core.solve import DampedInverse

logger = logging.getLogger(__name__)

MEAN_EIGENVALUE_RANGE = (0.3, 3.0)  # mean eigenvalues of C for which a lam of 0.05 to 0.2 is right
LAM_SHARE = (0.05, 0.2)  # what lam is to be, as a share of the mean eigenvalue


def warn_once(warned: set[str], message: str, *args: Any) -> None:
    """Warns, unless `warned` has the message already."""
    if message not in warned:
        warned.add(message)
        logger.warning(message + " This is said once.", *args)


def advice_on_lam(mean: float, lam: float) -> str:
    """Returns what to change where C's mean eigenvalue is too far from 1 for `lam`; "" where it is not."""
    low, high = MEAN_EIGENVALUE_RANGE
    if not mean > 0 or low <= mean <= high:  # `not mean > 0` is true of NaN, too
        return ""
    effect = "the first layer learns slowly"
    if mean < low:
        effect = "most directions are scaled alike"
    return (
        f"the mean eigenvalue of C, the mean square of what the layer reads, is about {mean:.2g}. A lam of 0.05 to "
        f"0.2 is for standardised pixels, where it is 1; with lam={lam:g} {effect}. If these are pixels, standardise "
        f"them (each band by itself, a CT's window, empty pixels set to 0 afterwards), or use a lam of "
        f"{LAM_SHARE[0] * mean:.2g} to {LAM_SHARE[1] * mean:.2g}."
    )


def warn_if_unsolved(warned: set[str], inverse: DampedInverse, lam: float) -> None:
    """Warns of a step whose C + lam I could not be factorised; waits for the device."""
    if bool(inverse.finite) and not bool(inverse.solved):
        warn_once(
            warned,
            "TrAct: C + lam I (lam=%g) could not be factorised, in float64 neither: the first layer keeps its "
            "ordinary gradient in such steps. Normalise the pixels or raise lam.",
            lam,
        )


def warn_of_second_order(warned: set[str]) -> None:
    """Warns of a backward over a graph whose weight gradient was taken with `create_graph=True` before."""
    warn_once(
        warned,
        "TrAct: a backward runs again over a forward whose weight gradient was taken with `create_graph=True`. What "
        "it gives the first layer is the exact derivative of that preconditioned gradient (C held fixed), and is not "
        "preconditioned again. If the loss itself shares this forward, give it a forward of its own.",
    )


def warn_of_other_uses(warned: set[str], parameter: nn.Parameter, handed_on: Callable[[], Tensor | None]) -> None:
    """Warns at the end of the running backward pass if a weight has got a gradient from elsewhere than its layer.

    Args:
        warned: the messages so far.
        parameter: the weight, whose `.grad` was empty before this pass.
        handed_on: returns what the layer has handed on in the pass.
    """

    def compare() -> None:
        expected = handed_on()
        if parameter.grad is None or expected is None:
            return
        difference = parameter.grad.to(expected) - expected
        if bool(difference.norm() > 0.02 * expected.norm()):  # more than a 16-bit weight's rounding
            warn_once(
                warned,
                "TrAct: the first layer's weight also gets a gradient from outside of its layer (it is tied, or "
                "another module uses it, or a hook changes it). That part is not preconditioned.",
            )

    if torch._C._current_graph_task_id() >= 0:
        torch.autograd.Variable._execution_engine.queue_callback(compare)
