"""Makes batches of a recipe's images: augmented for training, plain for testing."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from timm.data import create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DataLoader, Sampler
from torchvision.transforms import v2

from benchmarks.training.data import Normalization, Splits
from benchmarks.training.images import CachedImages, Images, as_it_is
from benchmarks.training.recipe import Recipe

INTERPOLATION = "bicubic"
# What images in memory cannot have: their augmentation is of whole batches.
NOT_IN_MEMORY = {
    "crop_scale": 1.0,
    "auto_augment": None,
    "rotation": 0.0,
    "color_jitter": 0.0,
    "repeated_augmentation": 0,
}


class Loaders(NamedTuple):
    """Holds the batches for training and testing, and the training images, whose epoch is to be set."""

    train: Any
    test: Any
    images: Images | CachedImages


def make_loaders(
    recipe: Recipe, splits: Splits, look: Normalization, accelerator: Accelerator, num_workers: int = 0
) -> Loaders:
    """Return the loaders of a recipe, prepared for the processes of `accelerator`."""
    options = {"num_workers": num_workers, "pin_memory": torch.accelerator.is_available()}
    if recipe.in_memory:
        loaders = _in_memory(recipe, splits, look, options)
    else:
        loaders = _from_disk(recipe, splits, look, options)
    if not recipe.repeated_augmentation:
        return loaders
    dealt = _repeated(recipe, loaders.images, accelerator, options)
    return loaders._replace(train=dealt)


def _from_disk(recipe: Recipe, splits: Splits, look: Normalization, options: dict[str, Any]) -> Loaders:
    plain = create_transform(
        recipe.image_size, interpolation=INTERPOLATION, crop_pct=recipe.crop_pct, mean=look.mean, std=look.std
    )
    images = Images(splits.train, splits, _augmentation(recipe, look), recipe.seed)
    train = DataLoader(images, recipe.batch_size, shuffle=True, drop_last=True, **options)
    test = DataLoader(Images(splits.test, splits, plain), 2 * recipe.batch_size, **options)
    return Loaders(train, test, images)


def _augmentation(recipe: Recipe, look: Normalization) -> Any:
    first: list[Any] = []
    policy = recipe.auto_augment
    ratio = None
    if recipe.crop_padding:
        first.append(v2.RandomCrop(recipe.image_size, padding=recipe.crop_padding))
    # timm does not have this policy.
    if policy == "cifar10":
        first.append(v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10))
        policy = None
    if recipe.rotation:
        first.append(v2.RandomRotation(recipe.rotation))
    if recipe.crop_scale == 1:
        ratio = (1.0, 1.0)
    rest = create_transform(
        recipe.image_size,
        is_training=True,
        scale=(recipe.crop_scale, 1.0),
        ratio=ratio,
        hflip=recipe.flip,
        color_jitter=recipe.color_jitter,
        auto_augment=policy,
        interpolation=INTERPOLATION,
        mean=look.mean,
        std=look.std,
    )
    return v2.Compose([*first, rest])


def _in_memory(recipe: Recipe, splits: Splits, look: Normalization, options: dict[str, Any]) -> Loaders:
    for name, needed in NOT_IN_MEMORY.items():
        value = getattr(recipe, name)
        if value != needed:
            raise SystemExit(f"{name} {value}: images in memory are only cropped with crop_padding and flipped.")
    to_size = create_transform(
        recipe.image_size, interpolation=INTERPOLATION, crop_pct=recipe.crop_pct, normalize=False
    )
    images = CachedImages(splits.train, splits, to_size, look, recipe.seed)
    images.augment(recipe.crop_padding, recipe.flip)
    test_images = CachedImages(splits.test, splits, to_size, look)
    options = {**options, "collate_fn": as_it_is}
    train = DataLoader(images, recipe.batch_size, shuffle=True, drop_last=True, **options)
    return Loaders(train, DataLoader(test_images, 2 * recipe.batch_size, **options), images)


def _repeated(recipe: Recipe, images: Any, accelerator: Accelerator, options: dict[str, Any]) -> Any:
    """Return a loader of several copies of each image, each augmented by itself."""
    rank, ranks = accelerator.process_index, accelerator.num_processes
    sampler = RepeatAugSampler(images, ranks, rank, num_repeats=recipe.repeated_augmentation, selected_round=0)
    copies = Copies(sampler, rank, ranks)
    loader = DataLoader(images, recipe.batch_size, sampler=copies, drop_last=True, **options)
    # timm's sampler deals out the copies over the ranks by itself, so accelerate must not shard what it gives.
    return prepare_data_loader(loader, accelerator.device, 1, 0, put_on_device=True)


class Copies(Sampler[tuple[int, int]]):
    """Yields the indices of a sampler that repeats them, each with a number of its own, so that its copies differ."""

    def __init__(self, sampler: Any, rank: int, ranks: int) -> None:
        self.sampler = sampler
        self.rank = rank
        self.ranks = ranks

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for position, index in enumerate(self.sampler):
            yield int(index), self.rank + position * self.ranks

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to the sampler."""
        self.sampler.set_epoch(epoch)
