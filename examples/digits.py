"""Makes a data set of scikit-learn's handwritten digits: 1797 grey images of 8x8 pixels, a quarter for testing."""

import datasets
import numpy as np
import sklearn.datasets
from PIL import Image
from sklearn.model_selection import train_test_split


def digits(seed: int = 0) -> datasets.DatasetDict:
    """The data set.

    Args:
        seed: of the choice of the test images.

    Returns:
        Splits "train" and "test" with the columns `image` (8x8, grey) and `label`.
    """
    pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
    parts = train_test_split(np.arange(len(labels)), test_size=0.25, stratify=labels, random_state=seed)
    images = (pixels.reshape(-1, 8, 8) * 255 / 16).round().astype(np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("0123456789"))})
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_list(
                [{"image": Image.fromarray(images[i]), "label": int(labels[i])} for i in part], features=features
            )
            for split, part in zip(("train", "test"), parts, strict=True)
        }
    )
