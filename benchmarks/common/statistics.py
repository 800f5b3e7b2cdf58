"""Arms of an experiment, vanilla and TrAct, side by side: records that survive a kill, a table and a plot."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from accelerate import PartialState
from rich.console import Console
from rich.table import Table

from hf_tract.integrations import provenance

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

COLORS = ("#7f7f7f", "#d62728", "#1f77b4", "#2ca02c")


@dataclasses.dataclass
class Record:
    """One finished run: what it was, what came out, and what it ran on."""

    arm: str
    seed: int
    scores: list[float]  # on the test set, from 0 to 1, after each epoch
    seconds_per_step: float
    settings: dict[str, Any]
    more: dict[str, float] = dataclasses.field(default_factory=dict)  # other measures from 0 to 1, at the end
    command: str = dataclasses.field(default_factory=provenance.command)
    versions: dict[str, str] = dataclasses.field(default_factory=provenance.versions)
    hardware: str = dataclasses.field(default_factory=provenance.hardware)


class Records:
    """Finished runs in a JSON-lines file: a run that is in it already is not run again."""

    def __init__(self, path: Path, arms: dict[str, dict[str, Any]]) -> None:
        """Reads what there is.

        Args:
            path: the file.
            arms: the settings of each arm; a record of other settings is not this experiment's.
        """
        self.path, self.arms = path, arms
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.all = [Record(**json.loads(line)) for line in lines]

    def find(self, arm: str, seed: int) -> Record | None:
        """The record of a run that has finished."""
        wanted = (arm, seed, self.arms[arm])
        return next((record for record in self.all if (record.arm, record.seed, record.settings) == wanted), None)

    def of(self, arm: str, seeds: Sequence[int]) -> list[Record]:
        """The records of an arm."""
        return [record for seed in seeds if (record := self.find(arm, seed))]

    def add(self, record: Record) -> None:
        """Writes a record at once, by one process of several."""
        self.all.append(record)
        if PartialState().is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(record)) + "\n")


def two_arms(same: dict[str, Any], lam: float) -> dict[str, dict[str, Any]]:
    """The settings without TrAct, in which there is no `lam`, and with it."""
    return {"vanilla": same, "TrAct": {**same, "lam": lam}}


def compare(
    folder: Path,
    arms: dict[str, dict[str, Any]],
    seeds: Sequence[int],
    train: Callable[[str, int, dict[str, Any]], Record],
    title: str,
    measure: str = "test accuracy",
) -> None:
    """Trains what has not been trained yet, and reports.

    Args:
        folder: where records.jsonl and comparison.png go.
        arms: the settings of each; the first is what the others are compared with.
        seeds: of the runs of each arm.
        train: one run of one arm, from its name, a seed and its settings.
        title: of table and plot.
        measure: what the scores are.
    """
    records = Records(folder / "records.jsonl", arms)
    for seed in seeds:
        for arm, settings in arms.items():
            if records.find(arm, seed) is None:
                records.add(train(arm, seed, settings))
    if PartialState().is_main_process:
        report(records, seeds, title, measure)


def epochs_to_reach(curve: np.ndarray, target: float) -> int | None:
    """The first epoch, from 1, whose accuracy is at least `target`."""
    reached = np.flatnonzero(curve >= target)
    return int(reached[0]) + 1 if len(reached) else None


def report(records: Records, seeds: Sequence[int], title: str, measure: str) -> None:
    """Prints the table of the scores per epoch and what follows from it; saves comparison.png beside the records."""
    arms = list(records.arms)
    curves = {arm: 100 * np.array([record.scores for record in records.of(arm, seeds)]) for arm in arms}
    table = Table("epoch", *arms)
    epochs = curves[arms[0]].shape[1]
    for epoch in range(epochs):
        table.add_row(
            str(epoch + 1), *(spread(curves[arm][:, epoch]) for arm in arms), end_section=epoch + 1 == epochs
        )
    for name in records.of(arms[0], seeds)[0].more:
        ends = [100 * np.array([record.more[name] for record in records.of(arm, seeds)]) for arm in arms]
        table.add_row(name, *map(spread, ends))
    console = Console()
    over = f" (mean and standard deviation over {len(seeds)} seeds)" if len(seeds) > 1 else ""
    console.print(f"\n{title}: {measure} in per cent{over}", table, sep="\n")
    base, *others = arms
    final = curves[base].mean(0)[-1]
    for arm in others:
        reached = epochs_to_reach(curves[arm].mean(0), final)
        when = f"after {reached} of {epochs} epochs" if reached else f"in none of the {epochs} epochs"
        console.print(f"{arm} reaches {base}'s final {measure} ({final:.1f} %) {when}.")
        gains = curves[arm][:, -1] - curves[base][:, -1]
        console.print(
            f"Final gain: {spread(gains, sign='+')} points, by seed {', '.join(f'{gain:+z.1f}' for gain in gains)}."
        )
    steps = {arm: 1000 * np.median([record.seconds_per_step for record in records.of(arm, seeds)]) for arm in arms}
    ratios = ", ".join(f"{arm} {ms:.1f} ms ({ms / steps[base]:.3f})" for arm, ms in steps.items())
    console.print(f"Time per training step (median, and its ratio to the first): {ratios}.")
    console.print(f"Plot: {plot(curves, title, measure, records.path.with_name('comparison.png'))}")


def plot(curves: dict[str, np.ndarray], title: str, measure: str, path: Path) -> Path:
    """Mean score over epochs of each arm, with a band of one standard deviation."""
    figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
    first, *_ = curves
    final = curves[first].mean(0)[-1]
    axes.axhline(final, color=COLORS[0], linewidth=0.8, linestyle=":")
    for (arm, values), color in zip(curves.items(), COLORS, strict=False):
        epochs, mean, std = (
            np.arange(1, values.shape[1] + 1),
            values.mean(0),
            values.std(0, ddof=min(1, len(values) - 1)),
        )
        axes.plot(epochs, mean, "o-", color=color, label=f"{arm}: {mean[-1]:.1f} %", markersize=3)
        axes.fill_between(epochs, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)
        if arm != first and (reached := epochs_to_reach(mean, final)):
            axes.axvline(reached, color=color, linewidth=0.8, linestyle=":")
    axes.set(xlabel="epoch", ylabel=f"{measure}, %", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.2)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def spread(values: np.ndarray, sign: str = "") -> str:
    """Mean and standard deviation, with one digit."""
    std = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{values.mean():{sign}z.1f}{std}"
