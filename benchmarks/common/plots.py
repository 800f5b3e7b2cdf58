"""Draws every plot of the benchmarks in one style."""

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# A reader cannot tell more lines apart on one pair of axes.
MAX_LINES = 6
# The color of what everything else is compared with.
BASE = "#6b6b6b"
# From the palette of Okabe and Ito, which people with any kind of colour vision can tell apart; no red beside green.
COLORS = (BASE, "#0072B2", "#E69F00", "#CC79A7", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P")
DPI = 130


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure and its axes, by row."""
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes.tolist()


def legend_below(figure: Figure, axis: Axes, columns: int = 3) -> None:
    """Put the legend of `axis` below all axes."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def legend_beside(axis: Axes) -> None:
    """Put the legend of `axis` on its right side."""
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize="small")


def save(figure: Figure, path: Path) -> Path:
    """Write the figure as a PNG and forget it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path
