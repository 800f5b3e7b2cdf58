"""Makes image classifiers by name: transformers' model type, timm's name, or a checkpoint."""

import json
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTImageProcessor,
)

from benchmarks.training.data import Normalization
from benchmarks.training.recipe import Recipe


def make_model(recipe: Recipe, labels: list[str]) -> nn.Module:
    """Return the model that a recipe names, with a head for these classes."""
    if recipe.model in CONFIG_MAPPING:
        return _fresh_transformers_model(recipe, labels)
    if timm.is_model(recipe.model):
        model: nn.Module = timm.create_model(recipe.model, num_classes=len(labels), **recipe.model_config)
        return model
    return _from_checkpoint(recipe.model, labels)


def _label_maps(labels: list[str]) -> dict[str, Any]:
    label2id = {label: index for index, label in enumerate(labels)}
    return {"id2label": dict(enumerate(labels)), "label2id": label2id}


def _fresh_transformers_model(recipe: Recipe, labels: list[str]) -> nn.Module:
    settings = {"image_size": recipe.image_size, **recipe.model_config}
    config = AutoConfig.for_model(recipe.model, **settings, **_label_maps(labels))
    model: nn.Module = AutoModelForImageClassification.from_config(config)
    return model


def _from_checkpoint(name: str, labels: list[str]) -> nn.Module:
    maps = _label_maps(labels)
    # This wrapper does not count the names.
    if AutoConfig.from_pretrained(name).model_type == "timm_wrapper":
        maps["num_labels"] = len(labels)
    model: nn.Module = AutoModelForImageClassification.from_pretrained(name, ignore_mismatched_sizes=True, **maps)
    return model


def logits_of(output: Any) -> Tensor:
    """Return the scores in what a transformers or timm model returns."""
    scores: Tensor = getattr(output, "logits", output)
    return scores


def save_model(model: nn.Module, folder: Path, look: Normalization) -> None:
    """Save a model so that a later stage can go on from it, with its normalisation."""
    if isinstance(model, PreTrainedModel):
        size = {"height": look.size, "width": look.size}
        processor = ViTImageProcessor(size=size, image_mean=look.mean, image_std=look.std)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    # transformers' wrapper of timm would give it twice.
    config.get("model_args", {}).pop("num_classes", None)
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
