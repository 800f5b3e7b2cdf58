"""Images of any number of channels and any bit depth, for `hf-tract inspect --dataset`."""

import io
import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from helpers.oracle import says
from hf_tract.cli.images import read_images
from hf_tract.config import TrActError

RNG = np.random.default_rng(0)


def read(folder, channels=3, samples=64, split="train"):
    return read_images(str(folder), split, samples, (channels, 8, 8))


def ramp(top: int, dtype) -> np.ndarray:
    """A grey image whose values go from 0 to `top`."""
    return np.linspace(0, top, 64).reshape(8, 8).astype(dtype)


@pytest.mark.parametrize(
    "array, mode, top",
    [
        (ramp(255, np.uint8), "L", 1),
        (ramp(65535, np.uint16), "I;16", 1),
        (ramp(4095, np.uint16), "I;16", 4095 / 65535),
        (np.stack([ramp(255, np.uint8)] * 3, -1), "RGB", 1),
        (np.stack([ramp(255, np.uint8)] * 4, -1), "RGBA", 1),
    ],
    ids=["8-bit grey", "16-bit grey", "12 of 16 bits", "colours", "transparency"],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_of_images_keeps_its_range(tmp_path, array, mode, top, channels):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(array).save(tmp_path / name / "0.png")
    with Image.open(tmp_path / "a" / "0.png") as image:
        assert image.mode == mode
    images = read(tmp_path, channels)
    assert images.shape == (2, channels, 8, 8)
    assert images.min() == pytest.approx(0, abs=0.01)
    assert images.max() == pytest.approx(top, rel=0.01)


def test_float_images_stay_as_they_are(tmp_path):
    Image.fromarray(ramp(900, np.float32)).save(tmp_path / "0.tiff")
    assert read(tmp_path, 1).max() == pytest.approx(900, rel=0.01)


@pytest.mark.parametrize("first", [True, False], ids=["channels first", "channels last"])
def test_arrays_may_have_any_number_of_bands(tmp_path, first):
    bands = RNG.random((13, 8, 8), dtype=np.float32)
    np.save(tmp_path / "0.npy", bands if first else np.moveaxis(bands, 0, -1))
    assert torch.equal(read(tmp_path, 13), torch.from_numpy(bands)[None])
    with pytest.raises(TrActError, match=says("has images of", "channels, and the layer reads 5")):
        read(tmp_path, 5)


@pytest.mark.parametrize("other", ["0.png", "rows.parquet"])
def test_arrays_beside_other_images_are_refused_since_either_may_be_meant(tmp_path, other):
    np.save(tmp_path / "embeddings.npy", RNG.random((9, 8)))
    (tmp_path / other).touch()
    with pytest.raises(TrActError, match=says("has both ", "embeddings.npy and ", other, "of one kind")):
        read(tmp_path)
    assert len(read(tmp_path / "embeddings.npy")) == 1


@pytest.mark.parametrize(
    "array, reason",
    [
        (np.arange(9), "is an array of int64 and shape (9,): give one of numbers per image"),
        (np.zeros((2, 3, 8, 8)), "is an array of float64 and shape (2, 3, 8, 8)"),
        (np.full((8, 8), "a"), "is an array of <U1 and shape (8, 8)"),
        (np.full((8, 8), None), "Object arrays cannot be loaded"),
    ],
    ids=["labels", "several images", "words", "objects"],
)
def test_an_array_that_is_no_image_is_named(tmp_path, array, reason):
    np.save(tmp_path / "labels.npy", array)
    with pytest.raises(TrActError, match=says("cannot be read: ", "labels.npy", reason)):
        read(tmp_path)


def test_parquet_files_of_images_and_of_arrays_are_read(tmp_path):
    images = [Image.fromarray(np.stack([ramp(255, np.uint8)] * 3, -1))] * 3
    (tmp_path / "images").mkdir()
    datasets.Dataset.from_dict({"image": images, "label": [0, 1, 2]}).to_parquet(tmp_path / "images" / "train.parquet")
    assert read(tmp_path / "images").shape == read(tmp_path / "images" / "train.parquet").shape == (3, 3, 8, 8)
    (tmp_path / "arrays").mkdir()
    bands = RNG.integers(0, 10_000, (2, 5, 8, 8), dtype=np.uint16)
    datasets.Dataset.from_dict({"bands": bands.tolist()}).to_parquet(tmp_path / "arrays" / "train.parquet")
    assert torch.allclose(read(tmp_path / "arrays", 5).sum(), torch.from_numpy(bands / 65535).float().sum())


def test_what_save_to_disk_wrote_is_read(tmp_path):
    rows = datasets.Dataset.from_dict({"image": [Image.fromarray(ramp(255, np.uint8))] * 9})
    rows.save_to_disk(tmp_path / "rows")
    datasets.DatasetDict({"validation": rows}).save_to_disk(tmp_path / "splits")
    files = sorted(tmp_path.rglob("*"))
    assert len(read(tmp_path / "rows")) == len(read(tmp_path / "splits", split="validation")) == 9
    # A folder of data may be read-only.
    assert sorted(tmp_path.rglob("*")) == files


def test_samples_are_drawn_from_all_over_the_set(tmp_path):
    for value, name in ((0, "black"), (255, "white")):
        (tmp_path / name).mkdir()
        for number in range(40):
            Image.new("L", (8, 8), value).save(tmp_path / name / f"{number}.png")
    images = read(tmp_path, 1, samples=32)
    assert len(images) == 32
    assert 8 <= int(images.mean((1, 2, 3)).sum()) <= 24
    assert torch.equal(images, read(tmp_path, 1, samples=32))


def test_a_corrupt_image_is_named(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(TrActError, match=says("cannot be read: ", "bad.png: ", "cannot identify image")):
        read(tmp_path)


def test_a_corrupt_image_in_a_table_is_told(tmp_path):
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "PNG")
    images = [{"bytes": buffer.getvalue(), "path": None}, {"bytes": b"no image", "path": None}]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": images}, features=features).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(TrActError, match=says("cannot be read: an image inside a file of rows: ", "cannot identify")):
        read(tmp_path / "rows.parquet")


def test_a_split_that_is_not_there_is_an_error_in_a_line(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "0.png")
    with pytest.raises(TrActError, match=says("`dataset` (=", "cannot be read", "test", "train")):
        read(tmp_path, split="test")


def test_without_datasets_the_error_names_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TrActError, match=says("needs the package datasets: pip install 'hf-tract[cli]'")):
        read_images(str(tmp_path), "train", 2, (3, 8, 8))
