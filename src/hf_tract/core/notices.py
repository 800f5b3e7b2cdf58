"""Warns users about what TrAct cannot do for them, once for each message."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_tract.core.solve import DampedInverse

logger = logging.getLogger(__name__)

# Mean eigenvalues of C for which a lam of 0.05 to 0.2 is right.
MEAN_EIGENVALUE_RANGE = (0.3, 3.0)
# Where lam should lie, as a share of the mean eigenvalue.
LAM_SHARE = (0.05, 0.2)
# The shares that 0.1 is of the range: a lam between them was chosen for these pixels.
FITTING_SHARE = (0.1 / MEAN_EIGENVALUE_RANGE[1], 0.1 / MEAN_EIGENVALUE_RANGE[0])

# A patch of more numbers makes steps slow enough to say so.
LARGE_PATCH = 4096
LARGE = (
    "TrAct: %s reads patches of n = %d numbers. Every backward factorises an "
    "n x n matrix, which takes long on a GPU and seconds on a CPU. Smaller "
    "patches make it cheaper, or name a smaller layer with `layers=`."
)
FROZEN = (
    "TrAct: the first layer (%s) is frozen, so TrAct does nothing. To train "
    "it, call `model.get_submodule(%r).requires_grad_(True)` before the "
    "optimizer is made (torchvision's detectors freeze it unless "
    "`trainable_backbone_layers` counts it, transformers' DETR where its "
    "backbone is a ResNet), or name the layer that you train with `layers=` "
    "(if this is a teacher's, or a fixed transform)."
)
UNUSED_PARAMETERS = (
    "TrAct: DistributedDataParallel was made with "
    "`find_unused_parameters=True`. Every rank must run the first layer's "
    "backward equally often, and what only some ranks use must not run before "
    "the layer, since all ranks add up their second moments there. Where that "
    "may be otherwise, use `scope='local'`."
)


def warn_once(warned: set[str], message: str, *args: Any) -> None:
    """Log `message` as a warning, unless `warned` contains it already."""
    if message not in warned:
        warned.add(message)
        logger.warning(message + " This is shown once.", *args)


def advice_on_lam(mean: float, lam: float) -> str:
    """Return advice if C's mean eigenvalue is so far from 1 that `lam` does not fit; "" if it fits."""
    low, high = MEAN_EIGENVALUE_RANGE
    least_share, most_share = FITTING_SHARE
    if not mean > 0:  # also true for NaN
        return ""
    if mean > high and lam < least_share * mean:
        effect = "the first layer learns slowly"
    elif mean < low and lam > most_share * mean:
        effect = "most directions are scaled alike"
    else:
        return ""
    least, most = (share * mean for share in LAM_SHARE)
    return (
        "the mean eigenvalue of C, the mean square of what the layer reads, is "
        f"about {mean:.2g}. A lam of 0.05 to 0.2 is for standardised pixels, "
        f"where it is 1; with lam={lam:g} {effect}. If these are pixels, "
        "standardise them (each band by itself, a CT's window, empty pixels "
        f"set to 0 afterwards), or use a lam of {least:.2g} to {most:.2g}."
    )


def warn_if_unsolved(warned: set[str], inverse: DampedInverse, lam: float) -> None:
    """Warn about a step whose C + lam I could not be factorised; this waits for the device."""
    if inverse.failed and inverse.finite:
        warn_once(
            warned,
            "TrAct: C + lam I (lam=%g) could not be factorised, in float64 "
            "neither: the first layer keeps its ordinary gradient in such "
            "steps. Standardise the pixels or raise lam.",
            lam,
        )


def warn_of_failure(warned: set[str], lam: float, tried: torch.dtype, widest: torch.dtype) -> None:
    """Warn about an earlier step on an accelerator whose C + lam I could not be factorised in precision `tried`."""
    if tried == widest:
        warn_once(
            warned,
            "TrAct: C + lam I (lam=%g) could not be factorised in %s, the "
            "widest precision of this device: the first layer keeps its "
            "ordinary gradient in such steps. Standardise the pixels or raise "
            "lam.",
            lam,
            widest,
        )
        return
    warn_once(
        warned,
        "TrAct: C + lam I (lam=%g) could not be factorised in %s: the first "
        "layer kept its ordinary gradient in a step or two. From now on it is "
        "factorised in %s, which is slower. Standardise the pixels or raise "
        "lam.",
        lam,
        tried,
        widest,
    )


def warn_of_other_uses(
    warned: set[str],
    parameter: Tensor,
    returned: Callable[[], Tensor | None],
) -> None:
    """Warn at the end of the running backward pass if a weight also got a gradient from outside its layer.

    Args:
        warned: the messages that were logged before.
        parameter: the weight, whose `.grad` was empty before this pass.
        returned: computes the gradient that the weight has got from its layer in the pass.
    """

    def compare() -> None:
        expected = returned()
        if parameter.grad is None or expected is None:
            return
        difference = parameter.grad.to(expected) - expected
        # Two per cent is more than a 16-bit weight's rounding.
        if bool(difference.norm() > 0.02 * expected.norm()):
            warn_once(
                warned,
                "TrAct: the first layer's weight also gets a gradient from "
                "outside of its layer (it is tied, or another module uses it, "
                "or a hook changes it). That part is not preconditioned.",
            )

    if torch._C._current_graph_task_id() >= 0:
        torch.autograd.Variable._execution_engine.queue_callback(compare)
