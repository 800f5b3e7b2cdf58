"""Makes image classifiers by name (transformers' model type, timm's name, a checkpoint) and reads their transforms."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import timm
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTImageProcessor,
)


class Preprocessing(NamedTuple):
    """Holds what a checkpoint expects: the images' side, and each channel's mean and deviation on the scale 0 to 1."""

    size: int
    mean: list[float]
    std: list[float]


def make_transformers_model(name: str, config: dict[str, Any], image_size: int, labels: list[str]) -> PreTrainedModel:
    """A classifier of random weights from a model type, or a checkpoint with a new head.

    Args:
        name: a model type (vit, convnext, resnet, ...), a Hub id (also timm's hf-hub:...) or a folder.
        config: settings of a model of random weights.
        image_size: side of the images, for a model of random weights.
        labels: names of the classes.
    """
    maps: dict[str, Any] = {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    if name in CONFIG_MAPPING:
        settings = AutoConfig.for_model(name, **{"image_size": image_size, **config}, **maps)
        model = AutoModelForImageClassification.from_config(settings)
    else:
        name = checkpoint_id(name)
        if AutoConfig.from_pretrained(name).model_type == "timm_wrapper":  # which doesn't count the names
            maps["num_labels"] = len(labels)
        model = AutoModelForImageClassification.from_pretrained(name, ignore_mismatched_sizes=True, **maps)
        if "num_labels" in maps:
            model.config.label_names = labels  # which it saves as they were
    assert isinstance(model, PreTrainedModel)
    return model


def make_model(name: str, config: dict[str, Any], image_size: int, labels: list[str]) -> nn.Module:
    """The same, with timm's names too, whose `config` are the arguments of `timm.create_model`."""
    if name in CONFIG_MAPPING or not timm.is_model(name):
        return make_transformers_model(name, config, image_size, labels)
    model: nn.Module = timm.create_model(name, num_classes=len(labels), **config)
    return model


def checkpoint_id(name: str) -> str:
    """What transformers calls a checkpoint that timm calls hf-hub:... or hf_hub:..."""
    return name.removeprefix("hf-hub:").removeprefix("hf_hub:")


def head_of(checkpoint: str, labels: list[str]) -> str:
    """What becomes of a checkpoint's head, in words."""
    try:
        config = AutoConfig.from_pretrained(checkpoint_id(checkpoint))
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"--checkpoint {checkpoint} is no folder and no model that the Hub gives: {_short(error)}"
        ) from error
    if config.num_labels != len(labels):
        return (
            f"The head is made anew: {checkpoint} knows {config.num_labels} classes, the data set has {len(labels)}."
        )
    same = sorted(config.id2label.values()) == sorted(labels)
    return f"The head is kept: {len(labels)} classes" + ("." if same else ", though of other names.")


def preprocessing_of(processor: Any) -> Preprocessing:
    """What an image processor does to images, of transformers or of timm."""
    traits = getattr(processor, "data_config", None)  # timm's
    if traits:
        return Preprocessing(traits["input_size"][-1], list(traits["mean"]), list(traits["std"]))
    size = dict(getattr(processor, "crop_size", None) or processor.size)
    side = size.get("height") or size.get("shortest_edge")
    if side is None:
        raise ValueError(f"{type(processor).__name__} has the size {size}, which has no height and no shortest_edge.")
    channels = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
    return Preprocessing(int(side), *(list(values) for values in channels))


def load_processor(checkpoint: str) -> Any:
    """A checkpoint's image processor."""
    try:
        return AutoImageProcessor.from_pretrained(checkpoint_id(checkpoint))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{checkpoint} has no image processor, save one beside it: {_short(error)}") from error


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def logits_of(output: Any) -> Tensor:
    """The scores in what a transformers or timm model returns."""
    scores: Tensor = getattr(output, "logits", output)
    return scores


def save_model(model: nn.Module, folder: Path, look: Preprocessing, labels: list[str]) -> None:
    """Saves a model so that `from_pretrained` or timm loads it, with its normalisation and the classes' names."""
    if isinstance(model, PreTrainedModel):
        size = {"height": look.size, "width": look.size}
        model.save_pretrained(folder)
        ViTImageProcessor(size=size, image_mean=look.mean, image_std=look.std).save_pretrained(folder)
        return
    model.pretrained_cfg |= {"mean": look.mean, "std": look.std, "input_size": (3, look.size, look.size)}  # type: ignore[operator]
    timm.models.save_for_hf(model, folder, model_config={"label_names": labels}, safe_serialization=True)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config.get("model_args", {}).pop("num_classes", None)  # transformers' wrapper of timm would give it twice
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
