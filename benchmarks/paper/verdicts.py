"""Decides what docs/results/plan.md asks, by the rules that stand there."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import stats

from benchmarks.common import markdown
from benchmarks.common.bootstrap import Estimate, estimate
from benchmarks.common.statistics import LEVEL, Interval, interval, p_text
from benchmarks.paper.summary import Arm, Arms, corrected, gain

PRIMARY_P = 0.01
RATE_CONTROLS = (
    "vanilla",
    "first rate x 0.1",
    "first rate x 0.2",
    "first rate x 0.5",
    "first rate x 3",
    "frozen first layer",
)
LENT = ("first layer of vanilla", "first layer of TrAct")
MORE = "At this setting TrAct is more than a learning rate of the first layer."
NOT_MORE = "A learning rate of the first layer does as much here, as far as these seeds tell."
# What would become an option of the library.
CHALLENGERS = ("TrAct, grafted", "eigenvectors, lam 0.001", "eigenvectors, lam 0.01", "eigenvectors, lam 0.1")
INCUMBENTS = ("TrAct", "matched start, TrAct")


class StepSize(NamedTuple):
    """Holds what E0 decides."""

    # The control with the highest mean.
    best_control: str
    above_control: Interval
    # One-sided: TrAct is above the control.
    p: float
    best_lent: str
    room: Interval
    # TrAct's gain over the room; None where the room may be nothing.
    share: Estimate | None

    @property
    def sentence(self) -> str:
        """Return what may be said."""
        return MORE if self.p < PRIMARY_P else NOT_MORE

    def lines(self) -> list[str]:
        """Return the decision as Markdown."""
        share = "which may be nothing, so a share of it has no meaning"
        if self.share is not None:
            share = f"and TrAct's gain is {self.share.text(digits=2)} of it"
        primary = (
            f"**Primary.** The best rate control is *{self.best_control}*; TrAct is {self.above_control.text('+')} "
            f"points above it, one-sided p = {self.p:.4f}, to be below {PRIMARY_P}. **{self.sentence}**"
        )
        room = (
            f"**The room.** The better of the two lent first layers is the *{self.best_lent}*: "
            f"{self.room.text('+')} points above vanilla, {share}."
        )
        return [primary, "", room, ""]


def challengers(arms: Arms) -> list[str]:
    """Return as Markdown what grafting and the eigenvectors' coordinates gain over what the library has."""
    rows = {name: [name] for name in CHALLENGERS}
    ahead = dict.fromkeys(CHALLENGERS, 0)
    for incumbent in INCUMBENTS:
        gains = [gain(arms[name], arms[incumbent]) for name in CHALLENGERS]
        for name, found, p in zip(CHALLENGERS, gains, corrected(gains), strict=True):
            rows[name] += [found.text("+"), p_text(p)]
            ahead[name] += found.mean > 0 and p < LEVEL
    winners = [name for name, count in ahead.items() if count == len(INCUMBENTS)]
    verdict = "None of them becomes an option."
    if winners:
        verdict = f"To be run on the flowers too: {', '.join(winners)}."
    head = ["arm"]
    for incumbent in INCUMBENTS:
        head += [f"from {incumbent}", "p"]
    return [*markdown.table(head, rows.values()), "", verdict, ""]


def step_size(arms: Arms) -> StepSize:
    """Decide E0's primary question, and how much there is to gain."""
    vanilla, tract = arms["vanilla"], arms["TrAct"]
    control = max(RATE_CONTROLS, key=lambda name: float(arms[name].final.mean()))
    differences = _differences(tract, arms[control])
    p = float(stats.ttest_1samp(differences, 0, alternative="greater").pvalue)
    lent = max(LENT, key=lambda name: float(arms[name].final.mean()))
    room = gain(arms[lent], vanilla)
    share = None
    if room.half_width is not None and room.mean > room.half_width:
        both = np.stack([_differences(tract, vanilla), _differences(arms[lent], vanilla)], axis=1)
        share = estimate(_ratio_of_means, both)
    return StepSize(control, interval(differences), p, lent, room, share)


def _differences(arm: Arm, base: Arm) -> np.ndarray:
    """Return the differences in points, (seeds,)."""
    found: np.ndarray = arm.with_seeds_of(base).final - base.with_seeds_of(arm).final
    return found


def _ratio_of_means(pairs: np.ndarray) -> np.ndarray:
    first, second = pairs.mean(1).T
    ratios: np.ndarray = first / second
    return ratios
