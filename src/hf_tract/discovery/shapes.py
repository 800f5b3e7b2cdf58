"""Guesses shapes of pixels from a model's config and layers: of images, clips, volumes, series and rows of patches."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from hf_tract.core.patches import is_supported, patch_size

Shape = tuple[int, ...]

# These tables grow with the ecosystem: the names that configs use, the likeliest first.
CHANNELS = ("num_channels", "in_channels", "in_chans")
SIZES = ("image_size", "img_size", "input_size", "sample_size")
FRAMES = ("num_frames", "frames_per_clip")
SERIES = (
    ("max_length", "num_mel_bins"),  # a spectrogram's
    ("context_length", "num_input_channels"),  # a time series'
)
SUB_CONFIGS = ("vision_config", "backbone_config", "encoder_config")

# A forward with this argument reads images with these axes in front of their channels.
EXTRA_AXES = {"aspect_ratio_ids": (1, 4)}

# What to try where neither config nor layers give a size.
COMMON_SIZES = (224, 32, 28, 96, 1536)
# Some forwards run to their end at one size only, and until then show the first of several branches.
OTHER_SIZES = (64, 84, 128, 256, 384, 48, 16)
VOLUME_SIDES = (32, 96, 64, 128)
FEW_FRAMES = 4
GRID = 4  # patches along each side of an image that is given as rows of patches
MOST_CHANNELS = 6  # different numbers of channels
MOST_SIZES = 4  # that parts of a model name


def guess_shapes(model: nn.Module, parameters: Mapping[str, Any]) -> Iterator[Shape]:
    """Guess shapes of the pixels that a forward with these parameters takes, the likeliest first."""
    config = getattr(model, "config", None)
    convolutions, linear = _layers(model)
    row_lengths = _row_lengths(convolutions, linear, parameters)
    yield from _series(config)
    if "grid_thw" in parameters:
        yield from _patches_of_a_grid(convolutions, row_lengths)
    channel_counts = _channel_counts(config, convolutions)
    frames = _config_entry(config, FRAMES) or FEW_FRAMES
    extra_axes = [axes for argument, axes in EXTRA_AXES.items() if argument in parameters]
    dims = 2
    if convolutions:
        dims = len(convolutions[0].kernel_size)
    sizes = _sizes(model, config)
    for channels, size in itertools.product(channel_counts, sizes):
        if dims == 1:
            yield from _signals(channels, size[0])
        elif dims == 2:
            yield from _images(channels, size, extra_axes)
            yield (1, frames, channels, *size)
            yield (1, 2, channels, *size)
        else:
            yield from _clips(channels, size, frames)
            yield from _images(channels, size, extra_axes)
    if dims == 3:
        yield from _volumes(channel_counts)
    elif dims == 2 and len(sizes) > 1:
        yield from _images_of_other_sizes(channel_counts, extra_axes)
    yield from _rows_of_patches(row_lengths)


def guess_shapes_of_several(model: nn.Module, count: int) -> Iterator[tuple[Shape, ...]]:
    """Guess shapes for `count` arguments: images of each channel count, or an image with vectors beside it."""
    convolutions, _ = _layers(model)
    read = [layer.in_channels for layer in convolutions]
    channel_counts = list(dict.fromkeys([*read, 3, 1]))[:MOST_CHANNELS]
    for side in COMMON_SIZES[:2]:
        if count == 2:
            for channels, others in itertools.product(channel_counts, channel_counts):
                yield (1, channels, side, side), (1, others, side, side)
        for channels in channel_counts:
            for vector in ((1,), (channels,), (1, channels)):
                yield (1, channels, side, side), *[vector] * (count - 1)


def _signals(channels: int, length: int) -> Iterator[Shape]:
    yield (1, channels, length)
    yield (1, 2, channels, length)


def _images(channels: int, size: Shape, extra_axes: Sequence[Shape]) -> Iterator[Shape]:
    for axes in extra_axes:
        yield (1, *axes, channels, *size)
    yield (1, channels, *size)


def _images_of_other_sizes(channel_counts: Sequence[int], extra_axes: Sequence[Shape]) -> Iterator[Shape]:
    for channels, side in itertools.product(channel_counts, OTHER_SIZES):
        yield from _images(channels, (side, side), extra_axes)


def _volumes(channel_counts: Sequence[int]) -> Iterator[Shape]:
    for channels, side in itertools.product(channel_counts, VOLUME_SIDES):
        yield (1, channels, side, side, side)


def _clips(channels: int, size: Shape, frames: int) -> Iterator[Shape]:
    yield (1, frames, channels, *size)
    yield (1, channels, frames, *size)


def _series(config: Any) -> Iterator[Shape]:
    for length_name, width_name in SERIES:
        length = _config_entry(config, (length_name,))
        width = _config_entry(config, (width_name,))
        if length and width:
            yield (1, length, width)


def _patches_of_a_grid(convolutions: Sequence[Any], row_lengths: Sequence[int]) -> Iterator[Shape]:
    """Guess shapes for a forward that takes pixels already cut into patches, and the grid of these patches."""
    if convolutions and isinstance(convolutions[0], nn.Conv2d):
        patch = convolutions[0].in_channels, *convolutions[0].kernel_size
        yield (GRID**2, *patch)
        yield (1, GRID**2, *patch)
    for length in row_lengths:
        yield (GRID**2, length)


def _rows_of_patches(row_lengths: Sequence[int]) -> Iterator[Shape]:
    for length in row_lengths:
        yield (1, GRID**2, length)
        yield (GRID**2, length)
        yield (1, length)


def _layers(model: nn.Module) -> tuple[list[Any], list[nn.Linear]]:
    """Return the convolutions and the linear layers of a model."""
    convolutions = []
    linear = []
    for module in filter(is_supported, model.modules()):
        if isinstance(module, nn.Linear):
            linear.append(module)
        else:
            convolutions.append(module)
    return convolutions, linear


def _channel_counts(config: Any, convolutions: Sequence[Any]) -> list[int]:
    read = [layer.in_channels for layer in convolutions[:MOST_CHANNELS]]
    counts = [*read[:1], 3, 1]
    different = list(dict.fromkeys(read))
    if len(different) > 1:
        # Two stems may share a stack of channels, such as colours and depth.
        counts.append(different[0] + different[1])
    counts += read
    configured = _config_entry(config, CHANNELS)
    if isinstance(configured, int):
        counts.insert(0, configured)
    return list(dict.fromkeys(counts))


def _sizes(model: nn.Module, config: Any) -> list[tuple[int, int]]:
    """Return the size that the model's config names; else those that its parts name, and then common ones."""
    size = _config_entry(config, SIZES)
    if size:
        # A user's own config may mean something else by that name.
        with contextlib.suppress(TypeError, ValueError):
            return [side_lengths(size)]
    common = [(side, side) for side in COMMON_SIZES]
    return list(dict.fromkeys([*_sizes_of_parts(model), *common]))


def _sizes_of_parts(model: nn.Module) -> list[tuple[int, int]]:
    """Return the first few sizes that parts of a model name, as timm's patch embedding does, or their configs."""
    told = []
    for module in model.modules():
        attributes = vars(module)
        told += [attributes.get(name) for name in SIZES]
        told.append(_config_entry(attributes.get("config"), SIZES))
    # timm's models say here what their checkpoint was trained with.
    for module in model.modules():
        traits = vars(module).get("pretrained_cfg")
        if isinstance(traits, Mapping):
            told.append(traits.get("input_size", ())[1:])
    sizes: dict[tuple[int, int], None] = {}
    for size in told:
        with contextlib.suppress(TypeError, ValueError, IndexError):
            sides = side_lengths(size)
            if min(sides) > 0:
                sizes[sides] = None
    return list(sizes)[:MOST_SIZES]


def _row_lengths(
    convolutions: Sequence[nn.Module],
    linear: Sequence[nn.Module],
    parameters: Mapping[str, Any],
) -> list[int]:
    """Return likely lengths of a flattened patch: n of the first convolution, and of the first linear layers."""
    by_convolution = map(patch_size, convolutions[:1])
    by_linear = list(dict.fromkeys(map(patch_size, linear)))
    lengths = dict.fromkeys([*by_convolution, *by_linear[:MOST_CHANNELS]])
    if "flattened_patches" in parameters:
        # A row begins with the row and the column of its patch.
        return [length + 2 for length in lengths]
    return list(lengths)


def side_lengths(size: Any) -> tuple[int, int]:
    """Return height and width from the size in a config: a number, a sequence or a dictionary."""
    if isinstance(size, dict):
        size = list(size.values())
    if not isinstance(size, (tuple, list)):
        size = [size]
    # A single number stands for both.
    return int(size[-2 % len(size)]), int(size[-1])


def _config_entry(config: Any, names: Sequence[str]) -> Any:
    """Return the first entry called one of `names` that is set in a config, or else in one of its sub-configs."""
    if config is None:
        return None
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    for part in SUB_CONFIGS:
        value = _config_entry(getattr(config, part, None), names)
        if value is not None:
            return value
    return None
