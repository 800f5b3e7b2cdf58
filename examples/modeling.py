"""Image classifiers by name: a transformers model type, a timm name, or a checkpoint."""

from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageClassification, PreTrainedModel, ViTImageProcessor


def make_transformers_model(name: str, config: dict[str, Any], image_size: int, labels: list[str]) -> PreTrainedModel:
    """A classifier of random weights from a model type, or a checkpoint with a new head.

    Args:
        name: a model type (vit, convnext, resnet, ...), a Hub id or a folder.
        config: settings of a model of random weights.
        image_size: side of the images, for a model of random weights.
        labels: names of the classes.
    """
    maps = {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}
    if name in CONFIG_MAPPING:
        settings = AutoConfig.for_model(name, **{"image_size": image_size, **config}, **maps)
        model = AutoModelForImageClassification.from_config(settings)
    else:
        model = AutoModelForImageClassification.from_pretrained(name, ignore_mismatched_sizes=True, **maps)
    assert isinstance(model, PreTrainedModel)
    return model


def make_model(name: str, config: dict[str, Any], image_size: int, labels: list[str]) -> nn.Module:
    """The same, with timm's names too, whose `config` are the arguments of `timm.create_model`."""
    if name in CONFIG_MAPPING or not timm.is_model(name):
        return make_transformers_model(name, config, image_size, labels)
    model: nn.Module = timm.create_model(name, num_classes=len(labels), **config)
    return model


def logits_of(output: Any) -> Tensor:
    """The scores in what a transformers or timm model returns."""
    scores: Tensor = getattr(output, "logits", output)
    return scores


def save_model(
    model: nn.Module, folder: Path, mean: list[float], std: list[float], image_size: int, push: bool, hub_id: str | None
) -> None:
    """Saves a model in the form that `from_pretrained` or timm loads, with its normalisation, and pushes it when asked to."""
    if isinstance(model, PreTrainedModel):
        size = {"height": image_size, "width": image_size}
        processor = ViTImageProcessor(size=size, image_mean=mean, image_std=std)
        for part in (model, processor):
            part.save_pretrained(folder, push_to_hub=push, repo_id=hub_id or folder.parent.name)
        return
    config = {"mean": mean, "std": std, "input_size": (3, image_size, image_size)}
    timm.models.save_for_hf(model, folder, model_config=config, safe_serialization=True)
    if push:
        timm.models.push_to_hf_hub(model, hub_id or folder.parent.name, model_config=config)
