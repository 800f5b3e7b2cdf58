"""Makes every vision architecture of the installed transformers and timm from its config, with random weights."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import transformers
import yaml
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from benchmarks.survey import families as others
from benchmarks.survey.families import FAMILIES
from hf_tract.discovery.inputs import PIXELS
from hf_tract.discovery.shapes import FEW_FRAMES, FRAMES, SIZES, side_lengths

TASKS = (
    "IMAGE_CLASSIFICATION",
    "IMAGE",
    "OBJECT_DETECTION",
    "SEMANTIC_SEGMENTATION",
    "UNIVERSAL_SEGMENTATION",
    "INSTANCE_SEGMENTATION",
    "DEPTH_ESTIMATION",
    "MASK_GENERATION",
    "VIDEO_CLASSIFICATION",
    "MASKED_IMAGE_MODELING",
    "BACKBONE",
    "KEYPOINT_DETECTION",
    "KEYPOINT_MATCHING",
    "IMAGE_TO_IMAGE",
    "IMAGE_MATTING",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "ZERO_SHOT_OBJECT_DETECTION",
)
OTHER_PIXELS = ("ASTForAudioClassification", "PatchTSTForClassification", "PatchTSMixerForTimeSeriesClassification")
# Parts of the names of timm's small models.
SMALLEST = ("atto", "femto", "pico", "nano", "xxs", "tiny", "xs", "small", "_s", "base")

# The first layer does not depend on how many follow: they are cut, so that any CPU takes a step in a moment.
DEPTH = re.compile(r"(\w+_)?(num_)?(\w+_)?(layers|layer|depth)")
STAGES = ("depths", "layer_depths")
LEAST = 2
SIZE = 224
# Timm's sizes up to here are kept, since windows and position embeddings fit to them.
LARGE = 320
# The most outputs of a tower.
WIDEST = 1024
# The timm modules that have no small model.
DEEP = ("deepseek_vit", "gemma4_vit", "naflexvit", "qwen3_vit", "vision_transformer_sam")
CONFIGS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("configs.yaml").read_text(encoding="utf-8"))
OCR_MODELS = ("PPOCRV5ServerDetForObjectDetection", "PPOCRV6MediumDetForObjectDetection")
OCR = {"kernel_list": [3, 2, 2], "scale_factor_list": [1, 2, 4, 8]}
OCR_KERNELS = {"longratio": 7, "midratio": 5, "shortratio": 3}
# Whether a kernel is long downwards and across.
OCR_KINDS = {
    "vertical_long_to_small_conv": (1, 0),
    "horizontal_small_to_long_conv": (0, 1),
    "symmetric_conv_long": (1, 1),
}


class Subject(NamedTuple):
    """Describes a model to look at: its library, family (transformers' model_type, timm's module) and name."""

    library: str
    family: str
    name: str

    @property
    def key(self) -> str:
        """Return what tells it from all others."""
        return f"{self.library} {self.name}"

    def make(self, small: bool) -> nn.Module:
        """Return the model as its library makes it by default, or with fewer layers."""
        if self.library in FAMILIES:
            return others.make(self.library, self.name)
        if self.library == "timm":
            fewer = _shrunk_timm(self.family, self.name) if small else {}
            return timm.create_model(self.name, **fewer)  # type: ignore[no-any-return]
        cls = _classes()[self.name]
        values = _merged(cls.config_class().to_dict(), _corrected(self.name))
        if small:
            values = _merged(_shrunk(values), CONFIGS["small"].get(self.name, {}))
        return cls(cls.config_class.from_dict(values))  # type: ignore[no-any-return]


def subjects() -> list[Subject]:
    """List one class of each model type of `TASKS`, or all that classify images; vision towers; each timm family."""
    found = [Subject("transformers", family, name) for family, name in _by_task()]
    named = {subject.name for subject in found}
    for name, (family, _) in _towers().items():
        if name not in named:
            found.append(Subject("transformers", family, name))
    for family in timm.list_modules():
        names = timm.list_models(module=family)
        if names:
            found.append(Subject("timm", family, _smallest(names)))
    for library in others.installed():
        for name in FAMILIES[library]:
            found.append(Subject(library, f"{library} {version(library)}", name))
    return found


def _by_task() -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for task in TASKS:
        for family, names in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").items():
            for name in (names,) if isinstance(names, str) else names:
                if name not in seen and (family not in seen or task == TASKS[0]):
                    yield family, name
                    seen.add(name)
            seen.add(family)
    for name in OTHER_PIXELS:
        yield getattr(transformers, name).config_class.model_type, name


@functools.cache
def _towers() -> dict[str, tuple[str, Any]]:
    """Find family and class by name in modelling files with a vision config that takes pixels: few are exported."""
    towers: dict[str, tuple[str, Any]] = {}
    for file in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        names = re.findall(
            r"^class (\w*(?:Vision|FlavaImage)\w*(?:Model|Transformer|Encoder))\(", file.read_text(), re.M
        )
        module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}") if names else None
        seeing = [name for name in names if _sees(getattr(module, name))]
        if seeing:
            name = min(seeing, key=lambda name: (not name.endswith("VisionModel"), len(name)))
            towers[name] = file.parent.name, getattr(module, name)
    return towers


def _sees(cls: type) -> bool:
    if not issubclass(cls, PreTrainedModel) or cls.__name__.endswith("PreTrainedModel"):
        return False
    config = cls.config_class
    own = config is not None and not config.sub_configs and re.search("Vision|Image|Sam", config.__name__)
    return bool(own and any(name in PIXELS for name in inspect.signature(cls.forward).parameters))


@functools.cache
def _classes() -> dict[str, Any]:
    classes: dict[str, Any] = {}
    for name, (_, cls) in _towers().items():
        classes[name] = cls
    for _, name in _by_task():
        classes[name] = getattr(transformers, name)
    return classes


def _smallest(names: list[str]) -> str:
    def rank(name: str) -> tuple[bool, int, int, str]:
        place = len(SMALLEST)
        for index, hint in enumerate(SMALLEST):
            if hint in name:
                place = min(place, index)
        return name.startswith("test_"), place, len(name), name

    return min(names, key=rank)


def _shrunk_timm(family: str, name: str) -> dict[str, Any]:
    """Return arguments of a timm model with fewer layers and smaller images."""
    size = timm.get_pretrained_cfg(name).input_size
    arguments: dict[str, Any] = {}
    if size[-1] > LARGE:
        smaller = (size[0], SIZE, SIZE)
        arguments["pretrained_cfg_overlay"] = {"input_size": smaller}
    if family in DEEP:
        arguments["depth"] = LEAST
    return arguments


def _shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a config and of its parts with fewer layers and smaller images."""
    values = dict(config)
    maps = values.get("out_indices") or values.get("out_features") or []
    # A model has at least as many layers as feature maps are asked for.
    layers = max(LEAST, len(maps))
    for name, value in config.items():
        if isinstance(value, dict):
            values[name] = _shrunk(value)
        elif _is_depth(name, value) and value > layers:
            values[name] = layers
            if maps and name == "num_hidden_layers":
                values["out_features"] = None
                values["out_indices"] = list(range(1, layers + 1))
            values.pop("layer_types", None)
        elif _smaller(name, value) is not value:
            values[name] = _smaller(name, value)
    return values


def _is_depth(name: str, value: Any) -> bool:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return is_number and bool(DEPTH.fullmatch(name))


def _smaller(name: str, value: Any) -> Any:
    """Return the value of a config for a model of few blocks, frames and pixels."""
    is_list = isinstance(value, (list, tuple))
    if name in STAGES and is_list and all(isinstance(depth, int) for depth in value):
        return [1] * len(value)
    if not value:
        return value
    if name == "out_hidden_size":
        return min(value, WIDEST)
    if name in FRAMES:
        return min(value, FEW_FRAMES)
    if name in SIZES and side_lengths(value) > (SIZE, SIZE):
        return [SIZE, SIZE] if is_list else SIZE
    return value


def _merged(values: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Return `others` over `values`, also inside of parts."""
    merged = {**values, **others}
    for name, value in others.items():
        if isinstance(value, dict) and isinstance(values.get(name), dict):
            merged[name] = _merged(values[name], value)
    return merged


def _ocr_block() -> dict[str, list[Any]]:
    """Return kernel, stride and padding of a detector's convolutions, which its config leaves out."""
    block: dict[str, list[Any]] = {"reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0]}
    for ratio, k in OCR_KERNELS.items():
        for kind, kernel in OCR_KINDS.items():
            down, across = (k**side for side in kernel)
            block[f"{kind}_{ratio}"] = [[down, across], 1, [down // 2, across // 2]]
    return block


def _corrected(name: str) -> dict[str, Any]:
    """Return what the default config of a class lacks or has wrong."""
    values: dict[str, Any] = dict(CONFIGS["corrected"].get(name, {}))
    if name in OCR_MODELS:
        values |= OCR | {"intraclass_block_config": _ocr_block()}
    return values


def special_batch(name: str, model: nn.Module) -> dict[str, torch.Tensor] | None:
    """Return a batch for those few whose input nothing in their config tells."""
    config: Any = getattr(model, "config", None)
    if name == "XCLIPVisionModel":
        return {"pixel_values": torch.rand(config.num_frames, 3, config.image_size, config.image_size)}
    if name == "Cohere2VisionModel":
        return {"pixel_values": torch.rand(1, 3, 224, 224), "input_ids": torch.full((1, 49), 7)}
    if name == "ShieldGemma2ForImageClassification":
        return {"pixel_values": torch.rand(1, 3, 224, 224), "input_ids": torch.full((1, 16), 7)}
    if name == "DepthProModel":
        return {"pixel_values": torch.rand(1, 3, 384, 384)}
    if name.startswith("MiniCPM"):
        grid = config.image_size // config.patch_size
        pixels = torch.rand(1, 3, config.image_size, config.image_size)
        return {"pixel_values": pixels, "target_sizes": torch.tensor([[grid, grid]], dtype=torch.int32)}
    if name == "InklingVisionModel":
        return {"pixel_values": torch.rand(4, config.temporal_patch_size, config.patch_size, config.patch_size, 3)}
    if name == "Inkling2VisionModel":
        side = config.patch_size * config.spatial_merge_size
        return {"pixel_values": torch.rand(16, side, side, 3), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    return None
