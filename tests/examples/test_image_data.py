"""Images as people have them: class folders without a split, labels as words, 16 bits, floats, any mode."""

import json

import datasets
import numpy as np
import pytest
from PIL import Image

from helpers.oracle import says
from image_data import Images, load_splits, normalization, to_rgb

RNG = np.random.default_rng(0)


def write(folder, count: int = 10, dtype=np.uint8, top: int = 255) -> None:
    folder.mkdir(parents=True)
    for index in range(count):
        Image.fromarray(RNG.integers(0, top, (8, 8)).astype(dtype)).save(folder / f"{index}.png")


def test_class_folders_without_a_split_hold_out_the_same_share_each_time(tmp_path, capsys):
    for name in ("cat", "dog"):
        write(tmp_path / name)
    splits = load_splits(str(tmp_path))
    assert (len(splits.train), len(splits.test), splits.names) == (16, 4, ["cat", "dog"])
    assert "4 of 20, drawn with seed 0, are held out to test on" in capsys.readouterr().out
    again = load_splits(str(tmp_path))
    assert [np.asarray(row["image"]).sum() for row in again.test] == [
        np.asarray(row["image"]).sum() for row in splits.test
    ]


@pytest.mark.parametrize("split", ["test", "val", "validation"])
def test_a_split_to_test_on_is_found_by_its_usual_names(tmp_path, split):
    for part in ("train", split):
        write(tmp_path / part / "cat", 4)
        write(tmp_path / part / "dog", 4)
    assert len(load_splits(str(tmp_path)).test) == 8


# datasets 5.2 does not close the file
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_words_in_a_metadata_file_are_classes(tmp_path, kind):
    for part in ("train", "test"):
        write(tmp_path / part, 4)
        rows = [{"file_name": f"{index}.png", "label": "ab"[index % 2]} for index in range(4)]
        lines = [json.dumps(row) for row in rows]
        if kind == "csv":
            lines = ["file_name,label", *(",".join(row.values()) for row in rows)]
        (tmp_path / part / f"metadata.{kind}").write_text("\n".join(lines))
    splits = load_splits(str(tmp_path))
    assert splits.names == ["a", "b"]
    assert sorted(splits.train["label"]) == [0, 0, 1, 1]


def test_words_to_test_on_that_training_does_not_have_are_refused(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    image = Image.new("L", (4, 4))
    for part, labels in {"train": ["a", "b"], "test": ["c"]}.items():
        (tmp_path / "data").mkdir(exist_ok=True)
        rows = datasets.Dataset.from_dict({"image": [image] * len(labels), "label": labels}, features=features)
        rows.to_parquet(tmp_path / "data" / f"{part}-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=says("not among those to train on: ['c']")):
        load_splits(str(tmp_path))


def test_16_bit_images_keep_their_range(tmp_path):
    for part in ("train", "test"):
        for name in ("a", "b"):
            write(tmp_path / part / name, 8, np.uint16, 65535)
    splits = load_splits(str(tmp_path))
    mean, std = normalization(splits, 8)
    assert mean[0] == pytest.approx(0.5, abs=0.05)
    assert std[0] == pytest.approx(0.29, abs=0.05)
    pixels, _ = Images(splits.train, splits, np.asarray)[0]
    assert pixels.std() > 40


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(np.full((2, 2), 25700, np.uint16)),
        Image.fromarray(np.full((2, 2), 25700, np.int32)),
        Image.fromarray(np.full((2, 2), 100 / 255, np.float32)),
        Image.new("L", (2, 2), 100),
        Image.new("RGBA", (2, 2), (100, 100, 100, 0)),
        Image.new("LA", (2, 2), (100, 0)),
    ],
    ids=lambda image: image.mode,
)
def test_every_mode_becomes_the_same_rgb(image):
    assert to_rgb(image).getpixel((0, 0)) == (100, 100, 100)


@pytest.mark.parametrize("values", [np.full((2, 2), 300.0, np.float32), np.full((2, 2), -1, np.int32)])
def test_numbers_of_unknown_scale_are_refused(values):
    with pytest.raises(ValueError, match=says("has values from", "scale others before")):
        to_rgb(Image.fromarray(values))
