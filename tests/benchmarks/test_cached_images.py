"""Images in memory are those of the ordinary loader, and their crops and flips do not depend on the batch."""

import pytest
import torch
import torch.nn.functional as F
from timm.data import create_transform

from benchmarks.training.data import Normalization, load_splits
from benchmarks.training.images import CachedImages, Images
from benchmarks.training.recipe import Recipe

LOOK = Normalization(32, [0.5, 0.4, 0.3], [0.3, 0.2, 0.1])


@pytest.fixture(scope="module")
def splits():
    return load_splits(Recipe(train_samples=24))


def cached(splits, padding: int = 0, flip: float = 0.0, seed: int = 0) -> CachedImages:
    to_size = create_transform(32, interpolation="bicubic", normalize=False)
    images = CachedImages(splits.train, splits, to_size, LOOK, seed)
    images.augment(padding, flip)
    return images


def test_without_augmentation_they_are_those_of_the_ordinary_loader(splits):
    plain = Images(splits.train, splits, create_transform(32, interpolation="bicubic", mean=LOOK.mean, std=LOOK.std))
    pixels, labels = cached(splits).__getitems__([3, 7, 5])
    torch.testing.assert_close(pixels, torch.stack([plain[index][0] for index in (3, 7, 5)]))
    assert labels.tolist() == [plain[index][1] for index in (3, 7, 5)]


def test_every_image_is_a_crop_of_its_padded_self_and_half_of_them_are_mirrored(splits):
    images = cached(splits, padding=2, flip=0.5)
    mirrored, places = 0, set()
    for index in range(24):
        pixels = images[index][0][0]
        black = torch.tensor([-m / s for m, s in zip(LOOK.mean, LOOK.std, strict=True)])
        whole = F.pad(cached(splits)[index][0][0] - black.view(3, 1, 1), [2] * 4) + black.view(3, 1, 1)
        found = [
            (flipped, down, across)
            for flipped in (False, True)
            for down in range(5)
            for across in range(5)
            if torch.allclose(
                pixels.flip(-1) if flipped else pixels, whole[:, down : down + 32, across : across + 32], atol=1e-5
            )
        ]
        assert found
        mirrored += found[0][0]
        places.add(found[0][1:])
    assert 4 <= mirrored <= 20
    assert len(places) > 8


def test_what_is_drawn_depends_on_seed_epoch_and_index_alone(splits):
    images = cached(splits, padding=4, flip=0.5, seed=1)
    first = images.__getitems__(list(range(24)))[0]
    assert torch.equal(images.__getitems__([9, 2])[0], first[[9, 2]])
    images.set_epoch(1)
    assert not torch.equal(images.__getitems__(list(range(24)))[0], first)
    images.set_epoch(0)
    assert torch.equal(images.__getitems__(list(range(24)))[0], first)
    assert not torch.equal(cached(splits, padding=4, flip=0.5, seed=2).__getitems__(list(range(24)))[0], first)
