"""Makes photo crops, a small data set of real images that needs no download.

"Which photograph is this 32x32 crop from?", over the real photographs that scikit-image and scikit-learn ship inside
their wheels. Each photograph is cut into cells of 48 pixels; a quarter of its cells is held out for testing.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import skimage.data
import sklearn.datasets
from PIL import Image

SCIKIT_IMAGE = (
    "astronaut brick camera cell chelsea clock_motion coffee coins grass gravel "
    "hubble_deep_field ihc moon motorcycle_left page retina rocket text"
)
SCIKIT_LEARN = "china flower"
PHOTOGRAPHS = [*SCIKIT_IMAGE.split(), *SCIKIT_LEARN.split()]
CELL, CROP = 48, 32
VERSION = 1


def photo_crops(train_per_photo: int = 300, test_per_photo: int = 100, seed: int = 0) -> datasets.DatasetDict:
    """Return the data set, made at the first call and read from the datasets cache after that.

    Args:
        train_per_photo: training crops of each of the 20 photographs.
        test_per_photo: test crops of each.
        seed: of the choice of cells and crops.

    Returns:
        Splits "train" and "test" with the columns `image` (32x32 RGB) and `label`.
    """
    name = f"photo_crops-{VERSION}-{train_per_photo}-{test_per_photo}-{seed}"
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "hf_tract" / name
    if not folder.exists():
        splits = {"train": train_per_photo, "test": test_per_photo}
        made = {split: _split(split, count, seed) for split, count in splits.items()}
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = tempfile.mkdtemp(dir=folder.parent)
        datasets.DatasetDict(made).save_to_disk(partial)
        try:
            # All or nothing: another process may be making it too.
            os.rename(partial, folder)
        except OSError:
            shutil.rmtree(partial)
    return datasets.DatasetDict.load_from_disk(folder)


def _split(split: str, count: int, seed: int) -> datasets.Dataset:
    names = datasets.ClassLabel(names=PHOTOGRAPHS)
    features = datasets.Features({"image": datasets.Image(), "label": names})
    rows: list[dict[str, Any]] = []
    for label in range(len(PHOTOGRAPHS)):
        rows += _crops(label, split, count, seed)
    return datasets.Dataset.from_list(rows, features=features)


def _crops(label: int, split: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    photo = _photograph(PHOTOGRAPHS[label])
    down = photo.shape[0] // CELL
    across = photo.shape[1] // CELL
    cells = np.random.default_rng([seed, label]).permutation(down * across)
    held_out = -(-len(cells) // 4)
    chosen = cells[held_out:]
    if split == "test":
        chosen = cells[:held_out]
    random = np.random.default_rng([seed, label, split == "test"])
    for _ in range(count):
        cell = np.array(np.divmod(random.choice(chosen), across))
        y, x = cell * CELL + random.integers(0, CELL - CROP + 1, size=2)
        crop = photo[y : y + CROP, x : x + CROP]
        yield {"image": Image.fromarray(crop), "label": label}


def _photograph(name: str) -> np.ndarray:
    for package in (skimage.data, sklearn.datasets):
        folder = Path(str(package.__file__)).parent
        for file in folder.rglob(f"{name}.*"):
            with Image.open(file) as image:
                return np.asarray(image.convert("RGB"))
    raise FileNotFoundError(f"scikit-image and scikit-learn have no photograph {name}.")
