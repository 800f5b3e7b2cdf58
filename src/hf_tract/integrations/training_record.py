"""Holds the facts of a finished training run, and writes the card of its model from them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import Trainer

from hf_tract.config import TrActConfig, TrActError
from hf_tract.core.notices import warn_once
from hf_tract.integrations import model_card, trainer_facts
from hf_tract.integrations.provenance import command, hardware, versions

_warned: set[str] = set()

RECORD_FILE = "training_record.json"
CONFIG_FILE = "tract_config.json"


@dataclasses.dataclass(frozen=True)
class TrainingRecord:
    """Holds what the card of a model lists about its training.

    Args:
        name: the name of the model.
        library: the library that loads the model: "transformers", "timm", "peft" for an adapter, or "pytorch" for a
            module whose state dict is saved.
        dataset: a Hub id or a description; of a local folder only the name is kept.
        tract: TrAct's settings; None for a run without TrAct.
        layers: the layers that TrAct acted on.
        base_model: the checkpoint that training began with, named like `dataset`; None for random weights, and ""
            where it is not known.
        license: the model's license, as the Hub abbreviates it.
        metrics: the scores at the end of training; `accuracy` and `top5` as shares of 1.
        history: a row for each epoch or evaluation: `epoch`, `loss`, `eval_loss` and the metrics.
        hyperparameters: other settings, by name.
        split: the part of the data set that the metrics are measured on.
        seed: the random seed of the run.
        command: the command that started the run; by default this and the next two describe the current process.
        hardware: the device that the run computed on.
        versions: the versions of the packages used.
        task: what the Hub calls the model's task; None if it has no name for it.
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
    task: str | None = "image-classification"

    def __post_init__(self) -> None:
        """Replace local paths by names, since others will read the card."""
        object.__setattr__(self, "dataset", without_local_path(self.dataset))
        if self.base_model:
            object.__setattr__(self, "base_model", without_local_path(self.base_model))

    @classmethod
    def from_trainer(
        cls,
        trainer: Trainer,
        *,
        dataset: str | None = None,
        base_model: str | None = None,
        license: str | None = None,
        split: str = "evaluation",
    ) -> TrainingRecord:
        """Make the record of a run so far from transformers' Trainer.

        If it has not trained, and its output folder has the record of an earlier run, the record is that one.

        Args:
            trainer: any Trainer, with a `TrActCallback` or without.
            dataset: as in `TrainingRecord`.
            base_model: by default the checkpoint that the model was loaded from, if that is known.
            license: as in `TrainingRecord`.
            split: the part of the data set that is evaluated on.
        """
        assert trainer.model is not None  # Trainer has called `model_init` already.
        args = trainer.args
        state = trainer.state
        handle, settings = trainer_facts.find_handle(trainer)
        earlier = Path(args.output_dir or ".") / RECORD_FILE
        if handle is None and state.global_step == 0 and earlier.exists():
            record = cls.from_json_file(earlier)
        else:
            is_trained = not trainer.is_in_train
            facts = trainer_facts.facts_of_run(args, state, trainer.model, handle, settings, is_trained)
            record = cls(**facts)
        if split == "evaluation":  # the default
            split = record.split
        return dataclasses.replace(
            record,
            dataset=dataset or record.dataset,
            base_model=base_model or record.base_model,
            license=license or record.license,
            split=split,
        )

    @classmethod
    def from_json_file(cls, path: str | Path) -> TrainingRecord:
        """Read the record that `to_json_file` wrote to `path`.

        Raises:
            TrActError: if there is no such file, or if it is not a record.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            if values["tract"] is not None:
                values["tract"] = TrActConfig.from_dict(values["tract"])
            return cls(**values)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrActError(f"`path` (={str(path)!r}) is no record of a training run: {error}") from error

    def to_json_file(self, path: str | Path) -> None:
        """Write the record to `path`."""
        values = dataclasses.asdict(self)
        Path(path).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    def save(self, folder: str | Path, model_id: str | None = None, tags: Iterable[str] = ()) -> None:
        """Write the model's card, this record, TrAct's settings and, where matplotlib is installed, the curve.

        The card of an adapter is left to peft, and only the settings are written beside it. A README.md that neither
        hf-tract nor Trainer wrote is left as it is, with a warning.

        Args:
            folder: where the model is saved.
            model_id: its id on the Hub, for the card's lines that load it; by default its name.
            tags: the card's tags beside hf-tract's own.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.tract is None:
            (folder / CONFIG_FILE).unlink(missing_ok=True)  # an earlier run's
        else:
            self.tract.to_json_file(folder / CONFIG_FILE)
        if self.library == "peft":
            return
        self.to_json_file(folder / RECORD_FILE)
        color = "#d62728" if self.tract else "#7f7f7f"
        has_curve = model_card.save_curve(self.history, folder / model_card.CURVE_FILE, color)
        card = folder / "README.md"
        if not model_card.is_replaceable(card):
            warn_once(
                _warned,
                f"TrAct: {card} stays, since neither hf-tract nor Trainer wrote it. Move it away to get a card; its "
                f"facts are in {RECORD_FILE}.",
            )
            return
        self._model_card(model_id, tags, has_curve).save(card)

    def _model_card(self, model_id: str | None, tags: Iterable[str], has_curve: bool) -> ModelCard:
        card: ModelCard = ModelCard.from_template(
            self._metadata(tags),
            template_path=str(model_card.TEMPLATE),
            record=self,
            mark=model_card.MARK,
            kind=model_card.KINDS.get(self.task or "", "A model"),
            model_id=model_id or self.name,
            base=model_card.link(self.base_model),
            data_set=model_card.link(self.dataset, "datasets/"),
            scores=model_card.scores_of(self.metrics),
            rows=model_card.history_table(self.history),
            curve=model_card.CURVE_FILE if has_curve else None,
        )
        return card

    def _metadata(self, tags: Iterable[str]) -> ModelCardData:
        """Return the head of the card, which the Hub's search reads."""
        all_tags = list(tags)
        if self.task is not None:
            all_tags = [self.task, *all_tags]
        if self.tract is not None:
            all_tags = [*model_card.TAGS, *all_tags]
        data = ModelCardData(
            library_name=self.library,
            pipeline_tag=self.task,
            license=self.license,
            tags=all_tags,
        )
        if model_card.is_hub_id(self.base_model):
            data.base_model = self.base_model
        if model_card.is_hub_id(self.dataset):
            data.datasets = [self.dataset]
        results = []
        if self.task is not None:
            results = model_card.eval_results(self.task, self.metrics, self.dataset, self.split)
        if results:
            data.model_name = self.name
            data.metrics = ["accuracy"]
            data.eval_results = results
        return data


def without_local_path(name: str) -> str:
    """Return a Hub id or a description as it is, and a local path as its model's recorded name or its last part."""
    path = Path(name)
    recorded = _recorded_name(path)
    if recorded is not None:
        return recorded
    if os.path.exists(name) or path.is_absolute() or name.startswith((".", "~")):
        return path.name
    return name


def _recorded_name(folder: Path) -> str | None:
    """Return the name in the record of a model's folder; None if there is no record that can be read."""
    try:
        # Not by `from_json_file`: where a model was trained on in its folder, the record names this folder itself.
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        return str(record["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
