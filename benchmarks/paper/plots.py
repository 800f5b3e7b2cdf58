"""Accuracy against epochs and against time, and against lambda."""

from pathlib import Path

import matplotlib as mpl
import numpy as np

from benchmarks.paper.summary import Arm

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BASE = "#7f7f7f"
COLORS = [
    "#d62728",
    "#1f77b4",
    "#2ca02c",
    "#ff7f0e",
    "#9467bd",
    "#8c564b",
    "#e377c2",
    "#bcbd22",
    "#17becf",
    "#000080",
    "#808000",
    "#ff1493",
    "#000000",
    "#4b0082",
    "#b8860b",
]


def curves(title: str, settings: dict[str, dict[str, Arm]], path: Path) -> None:
    """Plots means over seeds, with a band of one standard deviation: on the left by epochs, on the right by time."""
    figure, axes = plt.subplots(
        len(settings), 2, figsize=(10, 3.6 * len(settings)), layout="constrained", squeeze=False
    )
    for (setting, arms), (left, right) in zip(settings.items(), axes, strict=True):
        for (name, arm), color in zip(arms.items(), [BASE, *COLORS], strict=False):
            values = arm.curves
            epochs, minutes = np.arange(1, values.shape[1] + 1), arm.seconds.mean(0) / 60
            for axis, x in ((left, epochs), (right, minutes)):
                axis.plot(
                    x, values.mean(0), "o-", color=color, markersize=2.5, label=f"{name}: {values[:, -1].mean():.1f} %"
                )
                if len(values) > 1:
                    low, high = values.mean(0) - values.std(0, ddof=1), values.mean(0) + values.std(0, ddof=1)
                    axis.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
        base = next(iter(arms.values()))
        for axis, label in ((left, "epoch"), (right, "minutes of training")):
            axis.axhline(base.final.mean(), color=BASE, linewidth=0.8, linestyle=":")
            axis.set(xlabel=label, ylabel="test top-1, %", title=setting)
            axis.grid(alpha=0.2)
            _to_what_matters(axis, arms)
        left.legend(loc="lower right", fontsize=8 if len(arms) < 8 else 5.5)
    figure.suptitle(title)
    _save(figure, path)


def _to_what_matters(axis: Axes, arms: dict[str, Arm]) -> None:
    """Leaves out the first epochs, below which nothing is compared."""
    values = np.concatenate([arm.curves.mean(0) for arm in arms.values()])
    ends = [arm.final.mean() for arm in arms.values()]
    axis.set_ylim(bottom=max(values.min(), min(ends) - 0.6 * (max(ends) - values.min())))


def sweep(title: str, arms: dict[str, Arm], path: Path) -> None:
    """Final accuracy against lambda, with the baseline as a line."""
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    base = next(iter(arms.values())).final
    axis.axhline(base.mean(), color=BASE, label=f"vanilla: {base.mean():.1f} %")
    if len(base) > 1:
        axis.axhspan(
            base.mean() - base.std(ddof=1), base.mean() + base.std(ddof=1), color=BASE, alpha=0.15, linewidth=0
        )
    points = sorted(
        (next(iter(arm.runs.values())).config["lam"], arm.final) for name, arm in arms.items() if name != "vanilla"
    )
    lams, finals = [lam for lam, _ in points], [final for _, final in points]
    spreads = [final.std(ddof=1) if len(final) > 1 else 0 for final in finals]
    axis.errorbar(
        lams, [final.mean() for final in finals], spreads, fmt="o-", color=COLORS[0], capsize=3, label="TrAct"
    )
    axis.set(xscale="log", xlabel="lambda", ylabel="final test top-1, %", title=title)
    axis.set_xticks(lams, [f"{lam:g}" for lam in lams], fontsize=7)
    axis.minorticks_off()
    axis.grid(alpha=0.2)
    axis.legend()
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
