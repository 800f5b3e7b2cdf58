"""Plots accuracy against epochs and against time, final accuracy by arm, and final accuracy against lambda."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from benchmarks.common import plots
from benchmarks.common.statistics import half_widths, interval
from benchmarks.paper.summary import Arm, Arms

TOP1 = "test top-1, %"
# Opacity of the intervals.
BAND = 0.12
MANY_SEEDS = 3


def is_crowded(settings: dict[str, Arms]) -> bool:
    """Tell whether a setting has more arms than one pair of axes can show as lines."""
    return any(len(arms) > plots.MAX_LINES for arms in settings.values())


def curves(title: str, settings: dict[str, Arms], reference: str, path: Path, timed: bool = True) -> Path:
    """Plot means over seeds with their 95 % intervals: by epochs on the left; on the right by time, or all arms' ends.

    Args:
        title: of the experiment.
        settings: the arms of each, by name; each setting is a row.
        reference: an arm that is always among the lines, beside the first.
        path: the PNG to write.
        timed: whether the arms' times compare; otherwise all arms' ends are on the right.
    """
    crowded = is_crowded(settings)
    height = 3.2
    if crowded:
        height = max(4.2, 0.26 * max(map(len, settings.values())))
    figure, rows = plots.new_figure(len(settings), 2, 10.5, height * len(settings) + 0.4)
    for (setting, arms), (left, right) in zip(settings.items(), rows, strict=True):
        chosen = chosen_arms(arms, reference)
        _lines(left, arms, chosen, over_time=False)
        if crowded or not timed:
            _ends(right, arms, chosen)
            left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize="small")
        else:
            _lines(right, arms, chosen, over_time=True)
            plots.legend_beside(right)
        left.set_title(setting)
        right.set_title(setting)
    figure.suptitle(title)
    return plots.save(figure, path)


def chosen_arms(arms: Arms, reference: str) -> list[str]:
    """Return the arms that are drawn as lines: all, or the first, the reference and the best of the others."""
    names = list(arms)
    if len(names) <= plots.MAX_LINES:
        return names
    always = [name for name in [*names[:1], reference] if name in arms]
    others = [name for name in names if name not in always]
    others.sort(key=lambda name: _rank(arms[name]))
    best = others[: plots.MAX_LINES - len(always)]
    return always + best


def _rank(arm: Arm) -> tuple[int, float]:
    """Return what sorts arms of few seeds behind the others, and then by final accuracy."""
    return -min(len(arm.runs), MANY_SEEDS), -float(arm.final.mean())


def _lines(axis: Axes, arms: Arms, chosen: list[str], over_time: bool) -> None:
    """Draw the chosen arms as lines with bands."""
    for name, color, marker in zip(chosen, plots.COLORS, plots.MARKERS, strict=False):
        arm = arms[name]
        values = arm.curves
        mean = values.mean(0)
        wide = half_widths(values)
        x = np.arange(1, values.shape[1] + 1)
        if over_time:
            x = arm.seconds.mean(0) / 60
        label = f"{name}: {mean[-1]:.1f} %"
        axis.plot(x, mean, color=color, marker=marker, markersize=3.5, linewidth=1.4, label=label)
        axis.fill_between(x, mean - wide, mean + wide, color=color, alpha=BAND, linewidth=0)
    base = next(iter(arms.values()))
    axis.axhline(base.final.mean(), color=plots.BASE, linewidth=0.8, linestyle=":")
    axis.set_ylabel(TOP1)
    axis.set_xlabel("minutes of training")
    if not over_time:
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _leave_out_the_start(axis, [arms[name] for name in chosen])


def _leave_out_the_start(axis: Axes, arms: list[Arm]) -> None:
    """Show the accuracies at which arms are compared, which are those of the later epochs."""
    lows, ends = [], []
    for arm in arms:
        mean = arm.curves.mean(0)
        lows.append(float(mean.min()))
        ends.append(float(mean[-1]))
    top = max(ends)
    low = max(min(lows), min(ends) - 0.6 * (top - min(lows)))
    axis.set_ylim(low, top + 0.12 * (top - low))


def _ends(axis: Axes, arms: Arms, chosen: list[str]) -> None:
    """Draw the final accuracy of every arm with its interval, one below the other."""
    for place, (name, arm) in enumerate(arms.items()):
        color, marker, face = "#303030", "o", "white"
        if name in chosen:
            color = face = plots.COLORS[chosen.index(name)]
            marker = plots.MARKERS[chosen.index(name)]
        end = interval(arm.final)
        axis.errorbar(
            end.mean,
            place,
            xerr=end.half_width,
            fmt=marker,
            color=color,
            markerfacecolor=face,
            markersize=5,
            capsize=2,
        )
    base = next(iter(arms.values()))
    axis.axvline(base.final.mean(), color=plots.BASE, linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(arms)), list(arms), fontsize="small")
    axis.invert_yaxis()
    axis.set_xlabel(f"{TOP1}, after the last epoch")


def sweep(title: str, arms: Arms, path: Path) -> Path:
    """Plot final accuracy against lambda, with the baseline as a line."""
    figure, [[axis]] = plots.new_figure(1, 1, 7.5, 3.6)
    base = interval(arms["vanilla"].final)
    wide = base.half_width or 0.0
    axis.axhline(base.mean, color=plots.BASE, label=f"vanilla: {base.mean:.1f} %")
    axis.axhspan(base.mean - wide, base.mean + wide, color=plots.BASE, alpha=BAND, linewidth=0)
    lams = []
    for name, arm in arms.items():
        if name == "vanilla":
            continue
        run = next(iter(arm.runs.values()))
        lam = run.settings["lam"]
        end = interval(arm.final)
        lams.append(lam)
        label = "TrAct" if len(lams) == 1 else None
        axis.errorbar(lam, end.mean, end.half_width, fmt="o", color=plots.COLORS[1], capsize=3, label=label)
    axis.set(xscale="log", xlabel="lambda", ylabel=f"final {TOP1}", title=title)
    axis.set_xticks(lams, [f"{lam:g}" for lam in lams], fontsize="small")
    axis.minorticks_off()
    plots.legend_beside(axis)
    return plots.save(figure, path)
