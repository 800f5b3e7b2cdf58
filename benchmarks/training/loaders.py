"""A recipe's images in batches: augmented for training, plain for testing."""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from timm.data import create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DataLoader, Sampler
from torchvision.transforms import v2

from benchmarks.training.cached_images import CachedImages, as_it_is
from benchmarks.training.image_data import Images, Splits
from benchmarks.training.models import Preprocessing
from benchmarks.training.recipe import Recipe, Run


def make_loaders(
    splits: Splits, recipe: Recipe, run: Run, look: Preprocessing, accelerator: Accelerator
) -> tuple[Any, DataLoader[Any], Images | CachedImages]:
    """Loaders for training and testing, and the training images, whose epoch is to be set."""
    shared: dict[str, Any] = {"num_workers": run.num_workers, "pin_memory": torch.accelerator.is_available()}
    if recipe.in_memory:
        return _in_memory(splits, recipe, look, shared)
    first = [v2.RandomCrop(recipe.image_size, padding=recipe.crop_padding)] if recipe.crop_padding else []
    policy = recipe.auto_augment
    if policy == "cifar10":  # which timm does not have
        first, policy = [*first, v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)], None
    if recipe.rotation:
        first.append(v2.RandomRotation(recipe.rotation))
    whole = recipe.crop_scale == 1
    rest = create_transform(
        recipe.image_size,
        is_training=True,
        scale=(recipe.crop_scale, 1.0),
        ratio=(1.0, 1.0) if whole else None,
        hflip=recipe.flip,
        color_jitter=recipe.color_jitter,
        auto_augment=policy,
        re_prob=recipe.random_erasing,
        interpolation="bicubic",
        mean=look.mean,
        std=look.std,
    )
    augmented = v2.Compose([*first, rest])
    plain = create_transform(
        recipe.image_size, interpolation="bicubic", crop_pct=recipe.crop_pct, mean=look.mean, std=look.std
    )
    images = Images(splits.train, splits, augmented, recipe.seed)
    test_loader = DataLoader(Images(splits.test, splits, plain), 2 * recipe.batch_size, **shared)
    if not recipe.repeated_augmentation:
        return DataLoader(images, recipe.batch_size, shuffle=True, drop_last=True, **shared), test_loader, images
    # timm's sampler deals out the copies over the ranks by itself, so accelerate must not shard what it gives.
    rank, ranks = accelerator.process_index, accelerator.num_processes
    dealt = RepeatAugSampler(images, ranks, rank, num_repeats=recipe.repeated_augmentation, selected_round=0)
    loader = DataLoader(images, recipe.batch_size, sampler=Copies(dealt, rank, ranks), drop_last=True, **shared)
    return prepare_data_loader(loader, accelerator.device, 1, 0, put_on_device=True), test_loader, images


def _in_memory(
    splits: Splits, recipe: Recipe, look: Preprocessing, shared: dict[str, Any]
) -> tuple[DataLoader[Any], DataLoader[Any], CachedImages]:
    none = dict.fromkeys(("rotation", "color_jitter", "random_erasing", "repeated_augmentation"), 0)
    needed = {"crop_scale": 1.0, "auto_augment": None, **none}
    if wrong := {name: value for name in needed if (value := getattr(recipe, name)) != needed[name]}:
        said = ", ".join(f"--{name} {value}" for name, value in wrong.items())
        raise SystemExit(f"{said}: --in_memory only crops with --crop_padding and flips; leave one of them out.")
    to_size = create_transform(recipe.image_size, interpolation="bicubic", crop_pct=recipe.crop_pct, normalize=False)
    images = CachedImages(splits.train, splits, to_size, look, recipe.crop_padding, recipe.flip, recipe.seed)
    test_images = CachedImages(splits.test, splits, to_size, look)
    loader = DataLoader(images, recipe.batch_size, shuffle=True, drop_last=True, collate_fn=as_it_is, **shared)
    return loader, DataLoader(test_images, 2 * recipe.batch_size, collate_fn=as_it_is, **shared), images


class Copies(Sampler[tuple[int, int]]):
    """The indices of a sampler that repeats them, each with a number of its own, so that its copies differ."""

    def __init__(self, sampler: Sampler[int], rank: int, ranks: int) -> None:
        self.sampler, self.rank, self.ranks = sampler, rank, ranks

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for position, index in enumerate(self.sampler):
            yield int(index), self.rank + position * self.ranks

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Passes on to the sampler."""
        self.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
