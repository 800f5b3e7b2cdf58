"""Images as people have them: class folders without a split, labels as words, 16 bits, any mode, broken files."""

import json
import re

import datasets
import numpy as np
import pytest
from PIL import Image

from pretrain_vit import DataOptions, ImageError, load_images, measure_look, read_image

RNG = np.random.default_rng(0)


def write(folder, count: int = 10, dtype=np.uint8, top: int = 255, suffix: str = "png") -> None:
    folder.mkdir(parents=True)
    for index in range(count):
        Image.fromarray(RNG.integers(0, top, (8, 8)).astype(dtype)).save(folder / f"{index}.{suffix}")


def load(folder, **options):
    return load_images(DataOptions(str(folder), **options))


@pytest.fixture
def pets(tmp_path):
    """A folder with a class folder for cats and one for dogs."""
    for name in ("cat", "dog"):
        write(tmp_path / "pets" / name)
    return tmp_path / "pets"


def test_class_folders_without_a_split_hold_out_the_same_share_of_each_class_each_time(pets, capsys):
    data = load(pets)
    assert (len(data.train), len(data.test), data.names) == (16, 4, ["cat", "dog"])
    assert data.eval_split == "a held-out fifth of train"
    assert sorted(data.test["label"]) == [0, 0, 1, 1]
    said = capsys.readouterr().out
    assert "4 of its 20 images are held out for that, drawn with seed 0, the same share of each class" in said
    paths = [row["image"]["path"] for row in data.test]
    assert [row["image"]["path"] for row in load(pets).test] == paths


def test_a_class_of_one_image_is_held_out_or_not_and_that_is_said(tmp_path, capsys):
    write(tmp_path / "many", 8)
    write(tmp_path / "one", 1)
    assert len(load(tmp_path).test) == 2
    assert "drawn with seed 0, whatever their class" in capsys.readouterr().out


def test_only_the_main_process_says_what_is_held_out(pets, monkeypatch, capsys):
    monkeypatch.setattr("pretrain_vit.IS_MAIN_PROCESS", False)
    load(pets)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("split", ["test", "val", "valid", "validation", "dev"])
def test_a_split_to_test_on_is_found_by_its_usual_names(tmp_path, split):
    for part in ("train", split):
        write(tmp_path / part / "cat", 4)
        write(tmp_path / part / "dog", 3)
    data = load(tmp_path)
    assert len(data.test) == 7
    assert data.eval_split == ("test" if split == "test" else "validation")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_words_in_a_metadata_file_are_classes(tmp_path, kind):
    for part in ("train", "test"):
        write(tmp_path / part, 4)
        rows = [{"file_name": f"{index}.png", "label": "ab"[index % 2]} for index in range(4)]
        lines = [json.dumps(row) for row in rows]
        if kind == "csv":
            lines = ["file_name,label", *(",".join(row.values()) for row in rows)]
        (tmp_path / part / f"metadata.{kind}").write_text("\n".join(lines))
    data = load(tmp_path)
    assert data.names == ["a", "b"]
    assert sorted(data.train["label"]) == [0, 0, 1, 1]


def grey_images(labels, feature=None, column: str = "label"):
    """Rows with these labels."""
    features = datasets.Features({"picture": datasets.Image(), column: feature or datasets.Value("string")})
    columns = {"picture": [Image.new("L", (4, 4))] * len(labels), column: labels}
    return datasets.Dataset.from_dict(columns, features=features)


def write_parquet(folder, column: str = "label", feature=None, **splits):
    """Writes a data set whose images are grey, with these labels in each split."""
    folder.mkdir()
    for split, labels in splits.items():
        grey_images(labels, feature, column).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def test_numbers_that_are_labels_are_named_by_themselves_in_their_order(tmp_path):
    folder = write_parquet(tmp_path / "data", feature=datasets.Value("int64"), train=[10, 9, 10], test=[10])
    data = load(folder)
    assert data.names == ["9", "10"]
    assert list(data.train["label"]) == [1, 0, 1]
    assert list(data.test["label"]) == [1]


def test_what_save_to_disk_wrote_is_read(pets, tmp_path):
    splits = datasets.load_dataset(str(pets))
    splits.save_to_disk(tmp_path / "all")
    splits["train"].save_to_disk(tmp_path / "train")
    assert len(load(tmp_path / "all").test) == len(load(tmp_path / "train").test) == 4


def test_nothing_is_written_into_the_folder_of_a_stored_data_set(pets, tmp_path):
    folder = tmp_path / "stored"
    datasets.load_dataset(str(pets))["train"].save_to_disk(folder)
    files = sorted(folder.iterdir())
    assert len(load(folder, train_samples=3).train) == 3
    assert sorted(folder.iterdir()) == files


def test_a_split_without_labels_is_not_chosen_to_test_on(tmp_path):
    names = datasets.ClassLabel(names=["a", "b"])
    folder = write_parquet(tmp_path / "data", feature=names, train=[0, 1], test=[-1, -1], validation=[1])
    data = load(folder)
    assert (data.eval_split, list(data.test["label"])) == ("validation", [1])
    with pytest.raises(SystemExit, match=r"^--eval_split test: .* has rows without a label there"):
        load(folder, eval_split="test")


@pytest.mark.parametrize("label", [None, -1])
def test_training_images_without_a_label_are_refused(tmp_path, label):
    folder = write_parquet(tmp_path / "data", feature=datasets.ClassLabel(names=["a", "b"]), train=[0, label])
    with pytest.raises(SystemExit, match=r"^--train_split train: .* has rows without a label there"):
        load(folder)


def test_the_label_column_is_named_by_an_option_where_nothing_tells_it(tmp_path):
    folder = write_parquet(tmp_path / "data", column="species", train=["a", "b"], test=["a"])
    with pytest.raises(SystemExit, match=r"which of its columns is it \(picture, species\)\? .* --label_column"):
        load(folder)
    assert load(folder, label_column="species").names == ["a", "b"]


def test_words_to_test_on_that_training_does_not_have_are_refused(tmp_path):
    folder = write_parquet(tmp_path / "data", train=["a", "b"], test=["c"])
    with pytest.raises(SystemExit, match=r"no training image has the labels \['c'\]"):
        load(folder)


def test_each_split_s_numbers_are_read_by_its_own_names(tmp_path):
    """As of `class_encode_column`, which numbers the labels of each split by itself."""
    splits = datasets.DatasetDict(
        {
            "train": grey_images([0, 1, 2], datasets.ClassLabel(names=["ant", "bee", "cat"])),
            "test": grey_images([0, 1, 0], datasets.ClassLabel(names=["bee", "cat"])),
        }
    )
    splits.save_to_disk(tmp_path / "some")
    data = load(tmp_path / "some")
    assert [data.names[number] for number in data.test["label"]] == ["bee", "cat", "bee"]
    splits["test"] = grey_images([0, 1], datasets.ClassLabel(names=["bee", "dog"]))
    splits.save_to_disk(tmp_path / "others")
    with pytest.raises(SystemExit, match=r"no training image has the labels \['dog'\]"):
        load(tmp_path / "others")


def test_an_empty_class_folder_is_said(pets, capsys):
    (pets / "bird").mkdir()
    assert load(pets).names == ["cat", "dog"]
    assert "has no training image of bird: such a class is not learned" in capsys.readouterr().out


def test_a_class_that_is_only_tested_is_said(tmp_path, capsys):
    for folder in ("train/cat", "train/dog", "test/cat", "test/fox"):
        write(tmp_path / folder, 2)
    assert load(tmp_path).names == ["cat", "dog", "fox"]
    assert "has no training image of fox" in capsys.readouterr().out


def test_a_class_folder_that_is_only_empty_for_testing_is_learned(tmp_path, capsys):
    for folder in ("train/cat", "train/dog", "test/cat"):
        write(tmp_path / folder, 2)
    (tmp_path / "test" / "dog").mkdir()
    (tmp_path / "val").mkdir()
    assert load(tmp_path).names == ["cat", "dog"]
    assert "no training image" not in capsys.readouterr().out


def test_images_that_two_splits_would_read_are_refused(tmp_path):
    for folder in ("train/bus", "train/train", "test/bus", "test/train"):
        write(tmp_path / folder, 2)
    message = r"train/0\.png would be read twice, for train and for test. A folder is .*: rename all others"
    with pytest.raises(SystemExit, match=message) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_class_folders_beside_one_that_is_named_like_a_split_are_said(tmp_path, capsys):
    for folder in ("bus", "car", "train", "test tube"):
        write(tmp_path / folder, 2)
    with pytest.raises(SystemExit):  # The one class that is left is none.
        load(tmp_path)
    said = capsys.readouterr().out
    assert "4 files are not read, among them those of bus (.png), car (.png)." in said
    assert "rename it if it is a class" in said


def test_files_of_formats_that_are_not_read_are_said(pets, capsys):
    for index, name in enumerate(("bird/1.heic", "bird/2.heic", "cat/1.AVIF", "cat/notes.txt", ".git/1.heic")):
        (pets / name).parent.mkdir(exist_ok=True)
        (pets / name).write_bytes(b"0" * index)
    (pets / ".git" / "tags").mkdir()
    assert load(pets).names == ["cat", "dog"]
    said = capsys.readouterr().out
    assert "3 files are not read, among them those of bird (.heic), cat (.AVIF). HEIC and AVIF must be" in said
    assert "no training image" not in said


def test_nothing_is_said_of_files_that_are_all_read(tmp_path, capsys):
    for part in ("train", "test"):
        write(tmp_path / part, 2)
        (tmp_path / part / "metadata.csv").write_text("file_name,label\n0.png,a\n1.png,b\n")
    load(tmp_path)
    assert capsys.readouterr().out == ""


def test_samples_are_the_same_each_time(pets):
    some = [load(pets, train_samples=5, test_samples=2) for _ in range(2)]
    assert [len(some[0].train), len(some[0].test)] == [5, 2]
    assert some[0].train["label"][:] == some[1].train["label"][:]


@pytest.mark.parametrize(
    "name, message",
    [
        ("/no/such/folder", "--dataset /no/such/folder: there is no such folder"),
        ("./folder", "--dataset ./folder: there is no such folder"),
        (
            "nobody/nothing",
            "--dataset nobody/nothing must be a folder of images by class or of parquet files, or a Hub",
        ),
        ("empty", "--dataset empty must be a folder of images"),
        ("file.png", "--dataset file.png is a file: name its folder"),
        ("text", "--dataset text: which of its columns is it (text)?"),
        ("flat", "--dataset flat: which of its columns is it (image)? Please name it by --label_column, or sort"),
        ("single", "--dataset single has one image"),
        ("same", "--dataset same has one class, a: a classifier needs two or more"),
    ],
)
def test_what_is_no_data_set_is_told_in_one_line(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "text"):
        (tmp_path / folder).mkdir()
    (tmp_path / "text" / "a.txt").write_text("no image")
    Image.new("L", (4, 4)).save("file.png")
    write(tmp_path / "flat", 2)
    write_parquet(tmp_path / "same", train=["a", "a"])
    write_parquet(tmp_path / "single", feature=datasets.ClassLabel(names=["a", "b"]), train=[0])
    with pytest.raises(SystemExit, match=re.escape(message)) as error:
        load(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "option, message",
    [
        ({"train_split": "trian"}, "--train_split trian: PETS has the splits train."),
        ({"eval_split": "best"}, "--eval_split best: PETS has the splits train."),
        ({"label_column": "class"}, "--label_column class: PETS has the columns image, label."),
        ({"image_column": "label"}, "--image_column label holds no images, but ClassLabel("),
        ({"dataset_config": "large"}, "BuilderConfig 'large' not found"),
    ],
)
def test_a_wrong_split_or_column_is_told_in_one_line_with_those_there_are(pets, option, message):
    with pytest.raises(SystemExit, match=re.escape(message.replace("PETS", str(pets)))) as error:
        load(pets, **option)
    assert "\n" not in str(error.value)


def test_a_row_without_an_image_is_a_corrupt_one(tmp_path, capsys):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    images = [Image.new("RGB", (4, 4))] * 3 + [None]
    rows = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 0, 1]}, features=features)
    rows.to_parquet(tmp_path / "train.parquet")
    rows.select(range(3)).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(ImageError, match="image 3 cannot be read"):
        read_image(load(tmp_path).train, 3)
    assert len(load(tmp_path, corrupt_images="skip").train) == 3
    assert "Left out: image 3 cannot be read" in capsys.readouterr().out


def test_a_tilde_is_the_home_folder(pets, monkeypatch):
    monkeypatch.setenv("HOME", str(pets.parent))
    assert len(load("~/pets").train) == 16


def test_a_corrupt_image_is_named_with_the_option_that_skips_it(pets, capsys):
    (pets / "cat" / "3.png").write_bytes((pets / "cat" / "3.png").read_bytes()[:60])
    (pets / "dog" / "5.png").write_bytes(b"")
    data = load(pets)
    errors = []
    for rows in (data.train, data.test):
        for index in range(len(rows)):
            try:
                read_image(rows, index)
            except ImageError as error:
                errors.append(str(error))
    assert len(errors) == 2
    for error, file in zip(sorted(errors), ("cat/3.png", "dog/5.png"), strict=True):
        assert str(pets / file) in error
        assert "leave such images out by --corrupt_images skip" in error
    capsys.readouterr()
    skipped = load(pets, corrupt_images="skip")
    assert len(skipped.train) + len(skipped.test) == 18
    out = capsys.readouterr().out
    assert f"Left out: {pets / 'cat' / '3.png'} cannot be read" in out
    assert "skip" not in out.partition("Left out")[2]


def test_16_bit_images_keep_their_range(tmp_path):
    for part in ("train", "test"):
        for name in ("a", "b"):
            write(tmp_path / part / name, 8, np.uint16, 65535)
    data = load(tmp_path)
    look = measure_look(data.train, 8)
    assert look.mean[0] == pytest.approx(0.5, abs=0.05)
    assert look.std[0] == pytest.approx(0.29, abs=0.05)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(np.full((2, 2), 25700, np.uint16)),
        Image.fromarray(np.full((2, 2), 25700, np.int32)),
        Image.fromarray(np.full((2, 2), 100 / 255, np.float32)),
        Image.new("L", (2, 2), 100),
        Image.new("RGBA", (2, 2), (100, 100, 100, 0)),
        Image.new("LA", (2, 2), (100, 0)),
        Image.new("RGB", (2, 2), (100, 100, 100)).convert("P", palette=Image.Palette.ADAPTIVE),
    ],
    ids=lambda image: image.mode,
)
def test_every_mode_becomes_the_same_rgb(tmp_path, image):
    suffix = "tiff" if image.mode in ("I", "F") else "png"
    image.save(tmp_path / f"image.{suffix}")
    rows = [{"image": {"bytes": None, "path": str(tmp_path / f"image.{suffix}")}}]
    pixel = read_image(rows, 0).getpixel((0, 0))
    assert pixel == (100, 100, 100)


def test_a_palette_with_transparency_is_read_without_a_warning(tmp_path):
    image = Image.new("P", (2, 2))
    image.putpalette([100, 100, 100])
    image.save(tmp_path / "image.png", transparency=b"\x80")
    rows = [{"image": {"bytes": (tmp_path / "image.png").read_bytes(), "path": None}}]
    assert read_image(rows, 0).getpixel((0, 0)) == (100, 100, 100)


def test_a_photograph_is_turned_as_its_camera_says(tmp_path):
    image = Image.new("RGB", (4, 2))
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter to the right
    image.save(tmp_path / "image.jpg", exif=exif)
    rows = [{"image": {"bytes": None, "path": str(tmp_path / "image.jpg")}}]
    assert read_image(rows, 0).size == (2, 4)


@pytest.mark.parametrize("values", [np.full((2, 2), 300.0, np.float32), np.full((2, 2), np.nan, np.float32)])
def test_numbers_of_unknown_scale_are_refused_by_the_files_name(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "depth.tiff")
    rows = [{"image": {"bytes": None, "path": str(tmp_path / "depth.tiff")}}]
    with pytest.raises(ImageError, match=r"depth\.tiff has values from .* scale integers to 0 \.\.\. 65535"):
        read_image(rows, 0)


def test_a_folder_named_like_a_built_in_data_set_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    load("photo_crops")
    assert "is built in" not in capsys.readouterr().out
    (tmp_path / "photo_crops").mkdir()
    load("photo_crops")
    assert "--dataset photo_crops is built in; the folder of that name is ./photo_crops." in capsys.readouterr().out
