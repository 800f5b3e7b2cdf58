"""Makes the parts of a model's card: links, the scores, the table of the history and the training curve."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

TAGS = ("tract", "hf-tract")
# What a card calls models that do a task.
KINDS = {
    "image-classification": "An image classifier",
    "object-detection": "An object detector",
    "image-segmentation": "An image segmentation model",
    "zero-shot-image-classification": "A zero-shot image classifier",
    "audio-classification": "An audio classifier",
}
MARK = "<!-- Written by hf-tract, which writes it anew at every run: remove this line to keep what you change. -->"
# Trainer's own cards have it too.
TRAINERS_MARK = "generated automatically according to the information the Trainer had access to"
METRICS = {"accuracy": "top-1 accuracy", "top5": "top-5 accuracy"}
TEMPLATE = Path(__file__).with_name("model_card_template.md")
MAX_ROWS = 20  # of the card's table
CURVE_FILE = "training_curve.png"
CURVES = {"loss": "training loss", "eval_loss": "evaluation loss", "accuracy": "accuracy"}


def is_replaceable(card: Path) -> bool:
    """Return whether nobody but hf-tract and Trainer has written `card`, or nobody at all."""
    if not card.exists():
        return True
    text = card.read_text(encoding="utf-8", errors="replace")
    return MARK in text or TRAINERS_MARK in text


def is_hub_id(name: str | None) -> bool:
    """Return whether `name` has the form owner/name and is not a local path."""
    if name is None or os.path.exists(name):  # Path raises an error for a long text.
        return False
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None


def link(name: str | None, prefix: str = "") -> str | None:
    """Return a Hub id as a Markdown link, and any other text as it is."""
    if is_hub_id(name):
        return f"[{name}](https://huggingface.co/{prefix}{name})"
    return name


def scores_of(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics that a card shows, by their titles."""
    return {METRICS[name]: value for name, value in metrics.items() if name in METRICS}


def eval_results(task: str, metrics: Mapping[str, float], dataset: str, split: str) -> list[EvalResult]:
    """Return the scores in the form in which the Hub shows them.

    Args:
        task: what the Hub calls the model's task.
        metrics: by name, as in `TrainingRecord`.
        dataset: a Hub id, or a description.
        split: the part of the data set that the metrics are measured on.
    """
    dataset_id = dataset
    if not is_hub_id(dataset):
        dataset_id = re.sub(r"\W+", "-", dataset).strip("-").lower() or "unknown"
    results = []
    for title, value in scores_of(metrics).items():
        result = EvalResult(
            task_type=task,
            task_name=task.replace("-", " ").capitalize(),
            dataset_type=dataset_id,
            dataset_name=dataset,
            dataset_split=split,
            metric_type="accuracy",
            metric_name=title,
            metric_value=round(value, 4),
        )
        results.append(result)
    return results


def history_table(history: Sequence[Mapping[str, float]]) -> list[list[str]]:
    """Return the rows of a card's table as text, the names of the columns first."""
    if not history:
        return []
    columns: dict[str, None] = {}  # a set that keeps its order
    for row in history:
        columns.update(dict.fromkeys(row))
    # Of a long history every k-th row is shown, so that the last one is among them.
    stride = -(-len(history) // MAX_ROWS)
    first = (len(history) - 1) % stride
    table = [list(columns)]
    for row in history[first::stride]:
        table.append([_cell(row.get(name)) for name in columns])
    return table


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def save_curve(history: Sequence[Mapping[str, float]], path: Path, color: str) -> bool:
    """Plot losses and accuracy over epochs; returns False without matplotlib or without anything to plot."""
    curves = {}
    for name, title in CURVES.items():
        points = [(row["epoch"], row[name]) for row in history if "epoch" in row and name in row]
        if points:
            curves[title] = points
    if not curves:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(3.6 * len(curves), 2.8), layout="constrained")
    (all_axes,) = figure.subplots(1, len(curves), squeeze=False)
    for axes, (title, points) in zip(all_axes, curves.items(), strict=True):
        epochs, values = zip(*points, strict=True)
        axes.plot(epochs, values, color=color, marker=".", linewidth=1.2)
        axes.set(xlabel="epoch", title=title)
        axes.grid(alpha=0.2)
    figure.savefig(path, dpi=120)
    return True
