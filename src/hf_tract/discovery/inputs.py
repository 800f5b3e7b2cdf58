"""Guesses batches that a model may take, from its config, its forward's arguments and its layers."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_tract.discovery.calling import forward_parameters, map_tensors, tensors_in
from hf_tract.discovery.shapes import GRID, Shape, guess_shapes, guess_shapes_of_several

# The names that forwards give the argument with the pixels.
PIXELS = (
    "pixel_values",
    "pixel_values_videos",
    "input_values",
    "flattened_patches",
    "image_pixel_values",
    "image",
    "images",
    "img",
    "x",
    "hidden_states",
)

TOKENS = 8
# How many numbers a guess with values may have.
MAX_NUMBERS = 4 * 10**6
# The arguments of detectors that take a list with a dictionary for each image.
LISTS = ("batched_inputs", "batched_input")
PATCH_POSITIONS = list(itertools.product(range(GRID), range(GRID)))

# Values for the arguments that some forwards need beside the pixels.
EXTRA_INPUTS: dict[str, list[Any]] = {
    "input_ids": [[1] * TOKENS],
    "decoder_input_ids": [[1] * TOKENS],
    "qformer_input_ids": [[1] * TOKENS],
    "task_inputs": [[1] * 77],
    "classes_input_ids": [[1] * TOKENS],
    "classes_attention_mask": [[1] * TOKENS],
    "classes_structure": [1],
    "tasks_input_ids": [[1] * TOKENS],
    "tasks_attention_mask": [[1] * TOKENS],
    "grid_thw": [[1, GRID, GRID]],
    "image_grid_thw": [[1, GRID, GRID]],
    "spatial_shapes": [[GRID, GRID]],
    "merge_sizes": [1],
    "pixel_attention_mask": [[1] * GRID**2],
    "pixel_position_ids": [PATCH_POSITIONS],
    "aspect_ratio_ids": [[1]],
    "aspect_ratio_mask": [[[1, 0, 0, 0]]],
}


def guess_inputs(model: nn.Module, device: str = "meta") -> Iterator[Any]:
    """Guess batches of one image, clip or row of patches, the likeliest first.

    Each is a tensor, a tuple of positional arguments, a mapping of keyword arguments, or detectron2's list.

    Args:
        model: any model, unwrapped.
        device: "meta" for pixels without values; elsewhere they are random numbers from 0 to 1, and not too many.
    """
    if device == "meta":
        return _guesses(model)
    # A separate generator leaves the user's random numbers as they are.
    generator = torch.Generator().manual_seed(0)

    def with_values(tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            tensor = torch.rand(tensor.shape, generator=generator, device="cpu").to(tensor.dtype)
        return tensor.to(device)

    small = filter(_is_small, _guesses(model))
    return (map_tensors(guess, with_values) for guess in small)


def _is_small(batch: Any) -> bool:
    return sum(map(torch.numel, tensors_in(batch))) <= MAX_NUMBERS


def _guesses(model: nn.Module) -> Iterator[Any]:
    parameters = forward_parameters(model)
    required = _required_arguments(parameters)
    argument = pixel_argument_name(model)
    make_pixels = partial(torch.empty, device="meta", dtype=precision(model))
    shapes = guess_shapes(model, parameters)
    if not parameters.keys().isdisjoint(LISTS):
        for shape in shapes:
            height, width = shape[-2:]
            image = {"image": make_pixels(shape[1:]), "height": height, "width": width}
            images = [image | {"original_size": (height, width)}]
            yield images, *[None] * (len(required) - 1)
            yield make_pixels(shape)
    elif argument is not None and getattr(model, "config", None) is not None:
        for shape in shapes:
            # What cannot be guessed is None: the forward may not use it before the pixels reach their layer.
            unknown = dict.fromkeys(required)
            extra = _extra_inputs(parameters, argument, shape)
            yield {**unknown, **extra, argument: make_pixels(shape)}
    elif len(required) <= 1:
        yield from map(make_pixels, shapes)
    else:
        for several in guess_shapes_of_several(model, len(required)):
            yield tuple(map(make_pixels, several))
        for shape in shapes:
            yield make_pixels(shape), *[None] * (len(required) - 1)


def pixel_argument_name(model: nn.Module) -> str | None:
    """Return the name of the forward's argument that takes pixels, or tokens where none does."""
    parameters = forward_parameters(model)
    for name in (*PIXELS, getattr(model, "main_input_name", ""), "input_ids"):
        if name in parameters:
            return name
    return None


def precision(model: nn.Module) -> torch.dtype:
    """Return the precision of the weights."""
    for parameter in model.parameters():
        # 8-bit numbers are those of quantised weights, and no precision for inputs.
        if parameter.is_floating_point() and parameter.dtype.itemsize > 1:
            return parameter.dtype
    return torch.float32


def _required_arguments(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """Return the names of the arguments that have no default."""
    required = []
    for name, parameter in parameters.items():
        is_variadic = parameter.kind > parameter.POSITIONAL_OR_KEYWORD
        if parameter.default is parameter.empty and not is_variadic:
            required.append(name)
    return required


def _extra_inputs(parameters: Mapping[str, Any], pixels: str, shape: Shape) -> dict[str, Tensor]:
    """Return values for the other arguments of a forward that takes pixels of `shape` as its argument `pixels`."""
    extra = {}
    for name, values in EXTRA_INPUTS.items():
        if name in parameters and name != pixels:
            # Forwards slice and loop by integers, so these have values on the meta device too.
            extra[name] = torch.tensor(values, device="cpu")
    if "prompt_depth" in parameters:
        # This is a map of the image's size, and the forward divides by its range.
        extra["prompt_depth"] = torch.empty(1, 1, *shape[-2:], device="meta")
    return extra
