"""A model's card: what was trained how, by TrAct or not, for people who find the model on the Hub."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_tract.config import TrActConfig, TrActError
from hf_tract.integrations.provenance import command, hardware, versions

TAGS = ("tract", "hf-tract")
RECORD_FILE = "training_record.json"
CONFIG_FILE = "tract_config.json"
CURVE_NAME = "training_curve.png"
TEMPLATE = Path(__file__).with_name("model_card_template.md")
MOST_ROWS = 20  # of the card's table
TASK = "image-classification"
METRICS = {"accuracy": "top-1 accuracy", "top5": "top-5 accuracy"}


@dataclasses.dataclass(frozen=True)
class TrainingRecord:
    """A finished training run, as its model's card tells of it.

    Args:
        name: of the model.
        library: that loads it: "transformers" or "timm".
        dataset: a Hub id, or words.
        tract: the settings, None for a run without TrAct.
        layers: the layers that TrAct took.
        base_model: the checkpoint that training began with: a Hub id, or words.
        license: of the model, as the Hub abbreviates it.
        metrics: on the test split at the end; `accuracy` and `top5` as shares of 1.
        history: figures by epoch or step, a mapping for each row.
        hyperparameters: what was set, by name.
        split: the data set's part that the metrics are of.
    """

    name: str
    library: str
    dataset: str
    tract: TrActConfig | None = None
    layers: Sequence[str] = ()
    base_model: str | None = None
    license: str | None = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    history: Sequence[Mapping[str, float]] = ()
    hyperparameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    split: str = "test"
    seed: int = 0
    command: str = dataclasses.field(default_factory=command)
    hardware: str = dataclasses.field(default_factory=hardware)
    versions: Mapping[str, str] = dataclasses.field(default_factory=versions)

    def to_json_file(self, path: str | Path) -> None:
        """Writes the record to `path`."""
        values = {**dataclasses.asdict(self), "tract": self.tract and self.tract.to_dict()}
        Path(path).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_json_file(cls, path: str | Path) -> TrainingRecord:
        """Reads what `to_json_file` wrote to `path`.

        Raises:
            TrActError: for a file that is none of these.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(**{**values, "tract": values["tract"] and TrActConfig.from_dict(values["tract"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrActError(f"`path` (={str(path)!r}) is no record of a training run: {error}") from error


def model_card(
    record: TrainingRecord, *, model_id: str | None = None, tags: Iterable[str] = (), curve: bool = False
) -> ModelCard:
    """The card of a trained model.

    Args:
        record: of its training.
        model_id: where it is on the Hub, for the lines that load it; by default its name.
        tags: more of them.
        curve: whether `training_curve.png` lies beside the card.
    """
    results = [
        EvalResult(TASK, _slug(record.dataset), record.dataset, "accuracy", round(value, 4), "Image classification",
                   dataset_split=record.split, metric_name=METRICS[name])
        for name, value in record.metrics.items() if name in METRICS
    ]  # fmt: skip
    data = ModelCardData(
        library_name=record.library,
        pipeline_tag=TASK,
        license=record.license,
        base_model=record.base_model if is_hub_id(record.base_model) else None,
        datasets=[record.dataset] if is_hub_id(record.dataset) else None,
        tags=[*(TAGS if record.tract else ()), TASK, *tags],
        metrics=["accuracy"] if results else None,
        model_name=record.name if results else None,
        eval_results=results or None,
    )
    card: ModelCard = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        record=record,
        model_id=model_id or record.name,
        base=_link(record.base_model),
        data_set=_link(record.dataset, "datasets/"),
        results=[(METRICS[name], f"{100 * value:.1f} %") for name, value in record.metrics.items() if name in METRICS],
        rows=_table(record.history),
        curve=CURVE_NAME if curve else None,
    )
    return card


def save_card(
    record: TrainingRecord, folder: str | Path, model_id: str | None = None, tags: Iterable[str] = ()
) -> ModelCard:
    """Writes the card, the record, TrAct's settings and, where matplotlib is installed, the curve into a model's folder.

    Args:
        record: of the training.
        folder: where the model is saved.
        model_id: where it will be on the Hub.
        tags: more of them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    record.to_json_file(folder / RECORD_FILE)
    if record.tract:
        record.tract.to_json_file(folder / CONFIG_FILE)
    card = model_card(record, model_id=model_id, tags=tags, curve=_plot(record, folder / CURVE_NAME))
    card.save(folder / "README.md")
    return card


def is_hub_id(name: str | None) -> bool:
    """Whether a name reads like owner/name and is no folder here."""
    return name is not None and re.fullmatch(r"[\w][\w.-]*/[\w.-]+", name) is not None and not Path(name).exists()


def without_local_path(name: str) -> str:
    """A Hub id or a word as it is; a folder by its record's name or its last part: where it lies is nobody else's business."""
    if (Path(name) / RECORD_FILE).exists():
        return TrainingRecord.from_json_file(Path(name) / RECORD_FILE).name
    path = Path(name).exists() or Path(name).is_absolute() or name.startswith((".", "~"))
    return Path(name).name if path else name


def _link(name: str | None, prefix: str = "") -> str | None:
    return f"[{name}](https://huggingface.co/{prefix}{name})" if is_hub_id(name) else name


def _slug(name: str) -> str:
    return name if is_hub_id(name) else re.sub(r"\W+", "-", name).strip("-").lower() or "unknown"


def _table(history: Sequence[Mapping[str, float]]) -> list[list[str]]:
    """Heads and rows of text; of a long history every k-th row and the last."""
    if not history:
        return []
    heads = list(dict.fromkeys(name for row in history for name in row))
    stride = -(-len(history) // MOST_ROWS)
    rows = list(history[::-1][::stride])[::-1]
    return [heads, *([_number(row.get(name)) for name in heads] for row in rows)]


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _plot(record: TrainingRecord, path: Path) -> bool:
    """Draws accuracy and loss over epochs; whether there was something to draw, and to draw with."""
    curves = {
        name: [(row["epoch"], row[name]) for row in record.history if name in row and "epoch" in row]
        for name in PLOTTED
    }
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(3.6 * len(curves), 2.8), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        axes.plot(
            *zip(*points, strict=True), color="#d62728" if record.tract else "#7f7f7f", marker=".", linewidth=1.2
        )
        axes.set(xlabel="epoch", title=PLOTTED[name])
        axes.grid(alpha=0.2)
    figure.savefig(path, dpi=120)
    return True


PLOTTED = {"loss": "training loss", "eval_loss": "test loss", "accuracy": "test accuracy"}
