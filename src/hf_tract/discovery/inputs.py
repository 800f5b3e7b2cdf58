"""Batches that a model may take, guessed from its config, its forward's arguments and its layers."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_tract.core.patches import is_supported, patch_size

# What grows with the ecosystem is data: names that configs and forwards use.
CHANNELS = ("num_channels", "in_channels", "in_chans")
SIZES = ("image_size", "img_size", "input_size", "sample_size")
FRAMES = ("num_frames", "frames_per_clip")
SUB_CONFIGS = ("vision_config", "backbone_config", "encoder_config")
PIXELS = (
    "pixel_values",
    "pixel_values_videos",
    "input_values",
    "flattened_patches",
    "image",
    "images",
    "x",
    "hidden_states",
)
COMMON_SIZES = (224, 32, 28, 96, 1536)
VOLUMES = (32, 96)  # sides of a cube
SERIES = (
    ("max_length", "num_mel_bins"),
    ("context_length", "num_input_channels"),
)  # of spectrograms and of time series
EXTRA_AXES = {"aspect_ratio_ids": (1, 4)}  # before an image's, where a forward has this argument
GRID = 4  # patches along each side, where a model wants to be told
TOKENS = 8
FEW_FRAMES = 4
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
MOST_CHANNELS = 6  # of those in a model, that are tried


class _InputGuess(NamedTuple):
    """What the other arguments of a forward depend on."""

    device: str
    size: tuple[int, int]
    frames: int


def _integers(values: Any) -> Callable[[_InputGuess], Tensor]:
    return lambda guess: torch.tensor(values, device="cpu")


# Integers are read by forwards that cut and loop by them: beside pixels without values they are on the CPU.
EXTRA_INPUTS: dict[str, Callable[[_InputGuess], Any]] = {
    "input_ids": _integers([[1] * TOKENS]),
    "decoder_input_ids": _integers([[1] * TOKENS]),
    "qformer_input_ids": _integers([[1] * TOKENS]),
    "task_inputs": _integers([[1] * 77]),
    "classes_input_ids": _integers([[1] * TOKENS]),
    "classes_attention_mask": _integers([[1] * TOKENS]),
    "classes_structure": _integers([1]),
    "tasks_input_ids": _integers([[1] * TOKENS]),
    "tasks_attention_mask": _integers([[1] * TOKENS]),
    "grid_thw": _integers([[1, GRID, GRID]]),
    "image_grid_thw": _integers([[1, GRID, GRID]]),
    "spatial_shapes": _integers([[GRID, GRID]]),
    "merge_sizes": _integers([1]),
    "pixel_attention_mask": _integers([[1] * GRID**2]),
    "pixel_position_ids": _integers([[[i // GRID, i % GRID] for i in range(GRID**2)]]),
    "aspect_ratio_ids": _integers([[1]]),
    "aspect_ratio_mask": _integers([[[1, 0, 0, 0]]]),
    "prompt_depth": lambda guess: torch.linspace(1, 2, guess.size[0] * guess.size[1], device=guess.device).view(
        1, 1, *guess.size
    ),
}


def guess_inputs(model: nn.Module, device: str = "meta") -> Iterator[Any]:
    """Guesses batches of one image, clip or row of patches, the likeliest first: keyword arguments, a tensor, or a tuple.

    Args:
        model: any model, unwrapped.
        device: "meta" for pixels without values; elsewhere they are random numbers from 0 to 1.
    """
    config = getattr(model, "config", None)
    parameters = forward_parameters(model)
    name = pixel_argument_name(model)
    generator = torch.Generator().manual_seed(0)  # the caller's random numbers stay as they are
    dtype = precision(model)

    def pixels(shape: Sequence[int]) -> Tensor:
        if device == "meta":
            return torch.empty(shape, device=device, dtype=dtype)
        return torch.rand(shape, generator=generator, device="cpu").to(device, dtype)

    required = [p for p in parameters.values() if p.default is p.empty and p.kind <= p.POSITIONAL_OR_KEYWORD]
    for shape, guess in _shapes(model, config, device, parameters):
        if config is None or name is None:
            if len(required) <= 1:
                yield pixels(shape)
        else:
            others: dict[str, Any] = {
                n: make(guess) for n, make in EXTRA_INPUTS.items() if n in parameters and n != name
            }
            if device != "meta":
                others = {n: other.to(device) for n, other in others.items()}
            # What nobody can guess may not be looked at before the pixels have met their layer.
            unknown = {p.name: None for p in required}
            yield {**unknown, **others, name: pixels(shape)}
    if len(required) > 1 and (config is None or name is None):
        yield from (tuple(map(pixels, shapes)) for shapes in _shapes_of_several(model, len(required)))
        yield from (
            (pixels(shape), *[None] * (len(required) - 1)) for shape, _ in _shapes(model, config, device, parameters)
        )


def _shapes_of_several(model: nn.Module, count: int) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Guesses shapes for a forward with several arguments: images of each channel count, or a vector beside an image."""
    convolutions = [m for m in model.modules() if isinstance(m, CONVOLUTIONS)]
    channels = list(dict.fromkeys([*(m.in_channels for m in convolutions), 3, 1]))[:MOST_CHANNELS]
    for size in COMMON_SIZES[:2]:
        if count == 2:
            yield from (((1, c, size, size), (1, d, size, size)) for c, d in itertools.product(channels, channels))
        for c in channels:
            for vector in ((1,), (c,), (1, c)):
                yield ((1, c, size, size), *[vector] * (count - 1))


def pixel_argument_name(model: nn.Module) -> str | None:
    """The argument of a forward that takes pixels."""
    parameters = forward_parameters(model)
    return next(
        (name for name in (*PIXELS, getattr(model, "main_input_name", ""), "input_ids") if name in parameters), None
    )


def precision(model: nn.Module) -> torch.dtype:
    """Returns the precision of the weights."""
    dtypes = (
        p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1
    )  # no 8-bit numbers
    return next(dtypes, torch.float32)


def map_tensors(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The batch with `change` done to each tensor in its mappings, lists and tuples."""
    if isinstance(batch, Mapping):
        changed = {name: map_tensors(value, change) for name, value in batch.items()}
        return _like(batch, changed) if type(batch) is not dict else changed
    if isinstance(batch, (list, tuple)):
        values = [map_tensors(value, change) for value in batch]
        if isinstance(batch, list):
            return values
        return type(batch)(*values) if hasattr(batch, "_fields") else tuple(values)
    return change(batch) if isinstance(batch, Tensor) else batch


def _like(batch: Mapping[str, Any], changed: dict[str, Any]) -> Mapping[str, Any]:
    """Returns `changed` as a mapping of the type of `batch`, such as transformers' `BatchFeature`."""
    same: Any = copy.copy(batch)
    try:
        for name, value in changed.items():
            same[name] = value
    except TypeError:  # a mapping that cannot be changed
        return changed
    return same  # type: ignore[no-any-return]


def filter_forward_kwargs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that a forward takes: losses that are computed outside of the model have batches with more."""
    parameters = forward_parameters(model)
    return {name: value for name, value in batch.items() if has_open_keywords(parameters) or name in parameters}


def has_open_keywords(parameters: Mapping[str, Any]) -> bool:
    """Says whether a signature has `**kwargs`."""
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())


def forward_parameters(model: nn.Module) -> Mapping[str, Any]:
    """Returns the parameters of `model.forward`, looking through peft's wrapper, whose own signature is `*args, **kwargs`."""
    base: Any = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model  # type: ignore[operator]
    try:
        return inspect.signature(base.forward).parameters
    except (TypeError, ValueError):  # such as a scripted module's
        return {}


def _shapes(
    model: nn.Module, config: Any, device: str, parameters: Mapping[str, Any]
) -> Iterator[tuple[tuple[int, ...], _InputGuess]]:
    layers = [m for m in model.modules() if is_supported(m)]
    first = next((m for m in layers if not isinstance(m, nn.Linear)), None)
    dims = len(first.kernel_size) if isinstance(first, CONVOLUTIONS) else 2
    convolutions = [m.in_channels for m in layers if isinstance(m, CONVOLUTIONS)][:MOST_CHANNELS]
    channels = [c for c in (_entry(config, CHANNELS), *convolutions[:1], 3, 1, *convolutions) if isinstance(c, int)]
    frames = _entry(config, FRAMES) or FEW_FRAMES
    traits = getattr(model, "pretrained_cfg", None) or {}  # timm's
    given = _entry(config, SIZES) or tuple(traits.get("input_size", ()))[1:]
    sizes = [side_lengths(given)] if given else [(size, size) for size in COMMON_SIZES]
    for length, width in SERIES:
        series = _entry(config, (length,)), _entry(config, (width,))
        if all(series):
            yield (1, *series), _InputGuess(device, series, frames)
    axes = [a for name, a in EXTRA_AXES.items() if name in parameters]
    rows, guess = _rows(layers, parameters), _InputGuess(device, sizes[0], frames)
    if "grid_thw" in parameters:  # which counts the patches that the pixels have been cut into before
        if isinstance(first, nn.Conv2d):
            patch = first.in_channels, *first.kernel_size
            yield from (((*lead, *patch), guess) for lead in ((GRID**2,), (1, GRID**2)))
        yield from (((GRID**2, n), guess) for n in rows)
    for count in dict.fromkeys(channels):
        for size in sizes:
            guess = _InputGuess(device, size, frames)
            image = (count, *(size if dims > 1 else size[:1]))
            clips = [(1, frames, *image), (1, count, frames, *image[1:])]
            images = [*((1, *a, *image) for a in axes), (1, *image)]
            for shape in [*clips, *images] if dims == 3 else [*images, *clips[: dims - 1], (1, 2, *image)]:
                yield shape, guess
    if dims == 3:
        yield from (((1, count, side, side, side), guess) for count in dict.fromkeys(channels) for side in VOLUMES)
    for n in rows:
        yield from ((shape, guess) for shape in ((1, GRID**2, n), (GRID**2, n), (1, n)))


def _rows(layers: Sequence[nn.Module], parameters: Mapping[str, Any]) -> list[int]:
    """Lengths of a patch as a row: what the first convolution reads, and the first linear layers."""
    convolutions = [patch_size(m) for m in layers if not isinstance(m, nn.Linear)][:1]
    linear = list(dict.fromkeys(m.in_features for m in layers if isinstance(m, nn.Linear)))[:MOST_CHANNELS]
    before = 2 if "flattened_patches" in parameters else 0  # the patch's row and column
    return list(dict.fromkeys(n + before for n in convolutions + linear))


def side_lengths(size: Any) -> tuple[int, int]:
    """Height and width of what a config calls a size."""
    if isinstance(size, dict):
        size = list(size.values())
    sides = list(size) if isinstance(size, (tuple, list)) else [size]
    return int(sides[-2 % len(sides)]), int(sides[-1])


def _entry(config: Any, names: Sequence[str]) -> Any:
    """The first of `names` that a config has, or a part of it."""
    if config is None:
        return None
    values = (getattr(config, name, None) for name in names)
    parts = (_entry(getattr(config, part, None), names) for part in SUB_CONFIGS)
    return next((value for value in (*values, *parts) if value is not None), None)
