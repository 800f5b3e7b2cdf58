"""Detectors: their first layer, its gradient where a batch's images differ in size, and the example."""

import contextlib
import json
import logging
import sys

import datasets
import numpy as np
import pytest
import torch
import torchvision
import transformers as hf
from accelerate import PartialState
from PIL import Image
from torch import nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import detect_voc
import quickstart
from detect_voc import VOC_NAMES, DetectionOptions, Example, Seen, load_detections, mean_average_precision
from helpers.documents import ROOT, snippets_of
from helpers.environments import reset_accelerate
from helpers.oracle import assert_close, expected
from hf_tract import TrActCallback, apply_tract, find_first_layers

TINY_DETR = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "num_queries": 5,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "dropout": 0.0,
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 8, 8, 8],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_features": ["stage4"],
    },
}
SIZES = ((64, 96), (80, 48), (64, 64))  # height, width
BOXES = torch.tensor([[4.0, 4.0, 30.0, 40.0], [20.0, 10.0, 44.0, 44.0]])


def faster_rcnn() -> tuple[nn.Module, list]:
    values = {"width": 0.125, "head_size": 16, "min_size": 64, "max_size": 96, "anchor_sizes": [16, 32], "regions": 8}
    model = detect_voc.faster_rcnn(3, DetectionOptions(**values, batch_norm=False))
    targets = [{"boxes": BOXES[: 1 + i % 2], "labels": 1 + torch.arange(1 + i % 2)} for i in range(3)]
    return model, [[torch.rand(3, *size) for size in SIZES], targets]


def detr() -> tuple[nn.Module, dict]:
    model = hf.DetrForObjectDetection(hf.AutoConfig.for_model("detr", **TINY_DETR))
    find_first_layers(model)[0].module.requires_grad_(True)
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in SIZES]
    thing = {"bbox": [4, 4, 26, 36], "category_id": 0, "area": 936, "iscrowd": 0}
    processor = hf.DetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 64})
    annotations = [{"image_id": 0, "annotations": [thing]}] * 3
    return model, dict(processor(images, annotations=annotations, return_tensors="pt"))


def stem_gradients(model, batch, **tract) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """The first layer's gradient, everything else's, and what the layer read."""
    stem = find_first_layers(model)[0].module
    seen = []
    model.zero_grad()
    torch.manual_seed(0)  # regions are drawn
    with apply_tract(model, **tract) if tract else contextlib.nullcontext():
        hook = stem.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        out = model(*batch) if isinstance(batch, list) else model(**batch)
        loss = sum(out.values()) if isinstance(batch, list) else out.loss
        loss.backward()
        hook.remove()
    (read,) = seen
    return stem.weight.grad, [p.grad for p in model.parameters() if p.grad is not None and p is not stem.weight], read


@pytest.mark.parametrize("make", [faster_rcnn, detr])
def test_the_gradient_is_the_formula_s_over_padded_images_of_several_sizes(make):
    torch.manual_seed(1)
    model, batch = make()
    model.train()
    ordinary, others, read = stem_gradients(model, batch)
    padded = (read == 0).all(1).flatten(1).float().mean(1)
    assert padded.max() > 0.1  # some images are padded by a lot
    got, others_with, _ = stem_gradients(model, batch, lam=0.1)
    assert_close(got, expected(ordinary, read, find_first_layers(model)[0].module, 0.1), 1e-4)
    assert len(others) > 10
    assert all(torch.equal(a, b) for a, b in zip(others, others_with, strict=True))


@pytest.mark.parametrize(
    "name, stem",
    [
        ("fasterrcnn_resnet50_fpn", "backbone.body.conv1"),
        ("retinanet_resnet50_fpn", "backbone.body.conv1"),
        ("ssd300_vgg16", "backbone.features.0"),
        ("ssdlite320_mobilenet_v3_large", "backbone.features.0.0.0"),
    ],
)
def test_torchvision_s_detectors_are_seen_through(name, stem):
    sizes = {} if name.startswith("ssd") else {"min_size": 64, "max_size": 96}  # else it is tried on large images
    model = getattr(torchvision.models.detection, name)(weights=None, weights_backbone=None, **sizes)
    assert [layer.name for layer in find_first_layers(model)] == [stem]


@pytest.mark.parametrize("name", ["detr", "rt_detr", "yolos", "deformable_detr", "conditional_detr", "d_fine"])
def test_the_detr_family_is_seen_through(name):
    with torch.device("meta"):
        model = hf.AutoModelForObjectDetection.from_config(hf.AutoConfig.for_model(name))
    (layer,) = find_first_layers(model)
    stem = {"yolos": "vit.embeddings", "d_fine": "stem1", "rt_detr": "embedder"}.get(name, "conv1")
    assert stem in layer.name


def frozen_resnet() -> nn.Module:
    """As torchvision makes them: the stem frozen behind a FrozenBatchNorm, by its own default of trainable layers."""
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=3)
    return torchvision.models.detection.FasterRCNN(backbone, 4, min_size=64, max_size=96)


@pytest.mark.parametrize(
    "make", [frozen_resnet, lambda: hf.DetrForObjectDetection(hf.AutoConfig.for_model("detr", **TINY_DETR))]
)
def test_a_stem_that_the_library_froze_is_told_with_how_to_train_it(make, caplog):
    model = make()
    with caplog.at_level(logging.WARNING, "hf_tract"), apply_tract(model) as handle:
        (layer,) = handle.layers
    (record,) = caplog.records
    assert f"the first layer ({layer.name}) is frozen, so TrAct does nothing" in record.getMessage()
    line = f"model.get_submodule('{layer.name}').requires_grad_(True)"
    assert line in record.getMessage()
    caplog.clear()
    eval(line, {"model": model})
    with apply_tract(model):
        assert not caplog.records


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_the_document_s_snippet_trains_detr_by_trainer_and_its_frozen_stem_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (train,) = snippets_of(ROOT / "docs" / "detection.md")
    names = {}
    exec(train, names)
    model, stem = names["model"], names["stem"]
    assert stem.name.endswith("embedder.embedder.convolution")
    assert names["trainer"].state.global_step == 2
    callbacks = names["trainer"].callback_handler.callbacks
    (tract,) = [callback for callback in callbacks if isinstance(callback, TrActCallback)]
    assert tract.handle_of(model) is not None  # which a frozen stem has not


def test_mean_average_precision_is_that_by_hand():
    """Of two objects one is found exactly and first, one not at all; a false hit comes last. Eleven recalls: 6/11."""
    boxes = torch.tensor([[0.0, 0, 20, 20], [40.0, 40, 60, 60]])
    labels = torch.tensor([1, 1])
    guessed = torch.tensor([[0.0, 0, 20, 20], [70.0, 70, 90, 90]])
    found = {"boxes": guessed, "scores": torch.tensor([0.9, 0.8]), "labels": labels}
    image = Image.new("RGB", (100, 100))

    def figures(difficult: list[bool]) -> dict[str, float]:
        example = Example(image, boxes, labels, torch.tensor(difficult))
        return mean_average_precision([Seen(found, detect_voc.wanted_of(example))])

    assert figures([False, False])["map_voc07"] == pytest.approx(6 / 11)
    assert figures([False, False])["map_50"] == pytest.approx(51 / 101)
    assert figures([False, True])["map_voc07"] == pytest.approx(1.0)


def test_digit_scenes_are_the_same_at_each_call_and_their_boxes_hold_digits():
    scenes = detect_voc.digit_scenes(12, "train")
    for scene, again in zip(scenes, detect_voc.digit_scenes(12, "train"), strict=True):
        assert np.array_equal(scene.image, again.image)
        assert torch.equal(scene.boxes, again.boxes)
        pixels = np.asarray(scene.image, dtype=float)
        assert 1 <= len(scene.boxes) == len(scene.labels) <= 4
        for left, top, right, bottom in scene.boxes.int().tolist():
            assert 0 <= left < right <= scene.image.width
            assert 0 <= top < bottom <= scene.image.height
            assert pixels[top:bottom, left:right].std() > 1.5 * 255 * 0.03  # more than the noise
    assert len({scene.image.size for scene in scenes}) > 3
    assert not np.array_equal(detect_voc.digit_scenes(1, "test")[0].image, scenes[0].image)


@pytest.fixture
def voc(tmp_path):
    """A VOCdevkit of two images with two objects each, one of them difficult."""
    root = tmp_path / "VOCdevkit" / "VOC2007"
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / name).mkdir(parents=True)
    box = "<bndbox><xmin>11</xmin><ymin>21</ymin><xmax>40</xmax><ymax>50</ymax></bndbox>"
    entry = f"<object><name>{{}}</name><difficult>{{}}</difficult>{box}</object>"
    for name in ("000001", "000002"):
        Image.new("RGB", (80, 64), "white").save(root / "JPEGImages" / f"{name}.jpg")
        inside = entry.format("dog", 0) + entry.format("person", 1)
        (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{inside}</annotation>")
    for split in ("trainval", "test"):
        (root / "ImageSets/Main" / f"{split}.txt").write_text("000001\n000002\n")
    return tmp_path


def test_a_voc_folder_is_read(voc):
    data = load_detections(DetectionOptions(dataset=str(voc)))
    assert (len(data.train), len(data.test), data.names) == (2, 2, VOC_NAMES)
    example = data.train[1]
    assert example.boxes.tolist() == [[10, 20, 40, 50]] * 2
    assert [VOC_NAMES[label] for label in example.labels] == ["dog", "person"]
    assert example.difficult.tolist() == [False, True]
    _, target = detect_voc.TrainingImages(data.train, flip=1.0, seed=0)[0]
    assert target["boxes"].tolist() == [[40, 20, 70, 50]]
    assert target["labels"].tolist() == [VOC_NAMES.index("dog") + 1]


@pytest.mark.parametrize("box", ["coco", "pascal_voc"])
def test_a_data_set_of_the_hub_s_form_is_read(tmp_path, box):
    rows = [{"image": Image.new("L", (40, 30)), "objects": {"bbox": [[5.0, 6.0, 20.0, 16.0]], "category": [1]}}] * 2
    data = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    for split in ("train", "validation"):
        (tmp_path / "data").mkdir(exist_ok=True)
        data.to_parquet(tmp_path / "data" / f"{split}.parquet")
    found = load_detections(DetectionOptions(dataset=str(tmp_path / "data"), bbox_format=box))
    assert found.test[0].boxes.tolist() == ([[5, 6, 25, 22]] if box == "coco" else [[5, 6, 20, 16]])
    assert found.names == ["0", "1"]
    assert found.train[0].image.mode == "RGB"


def parquet_of(folder, objects: dict) -> str:
    rows = datasets.Dataset.from_list([{"image": Image.new("L", (40, 30)), "objects": objects}] * 2)
    for split in ("train", "test"):
        rows.cast_column("image", datasets.Image()).to_parquet(folder / f"{split}.parquet")
    return str(folder)


def test_a_box_without_an_area_is_not_trained_on(tmp_path):
    boxes = [[5.0, 6.0, 20.0, 16.0], [5.0, 6.0, 0.0, 16.0]]
    folder = parquet_of(tmp_path, {"bbox": boxes, "category": [1, 0]})
    data = load_detections(DetectionOptions(dataset=folder))
    _, target = detect_voc.TrainingImages(data.train, flip=0.0, seed=0)[0]
    assert target["boxes"].tolist() == [[5, 6, 25, 22]]
    assert target["labels"].tolist() == [2]
    assert detect_voc.wanted_of(data.test[0])["boxes"].tolist() == [[5, 6, 25, 22]]


def test_classes_of_objects_that_are_words_are_refused(tmp_path):
    folder = parquet_of(tmp_path, {"bbox": [[5.0, 6.0, 20.0, 16.0]], "category": ["dog"]})
    with pytest.raises(SystemExit, match=r"category must be numbers or a ClassLabel, and is Value\('string'\)"):
        load_detections(DetectionOptions(dataset=folder))


def test_a_precision_that_the_device_lacks_is_told_in_one_line(tmp_path, monkeypatch):
    def refuse(**settings):
        raise ValueError("bf16 mixed precision requires PyTorch >= 1.10 and a supported device.")

    monkeypatch.setattr(detect_voc, "Accelerator", refuse)
    with pytest.raises(SystemExit, match=r"^--mixed_precision bf16: bf16 mixed precision requires"):
        detect_voc.make_run_accelerator(tmp_path, 0, DetectionOptions(mixed_precision="bf16"))


def test_a_data_set_without_boxes_is_refused(tmp_path):
    for split in ("train", "test"):
        datasets.Dataset.from_dict({"label": [0]}).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(SystemExit, match=r"needs a column of images and one named objects with bbox and category"):
        load_detections(DetectionOptions(dataset=str(tmp_path)))


def test_objects_that_are_a_list_are_refused(tmp_path):
    """In place of one list for boxes and one for classes."""
    objects = [{"bbox": [5.0, 6.0, 20.0, 16.0], "category": 1}]
    rows = datasets.Dataset.from_list([{"image": Image.new("L", (40, 30)), "objects": objects}] * 2)
    for split in ("train", "test"):
        rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(SystemExit, match=r"needs a column of images and one named objects with bbox and category"):
        load_detections(DetectionOptions(dataset=str(tmp_path)))


def run(monkeypatch, folder, *options) -> list[dict]:
    monkeypatch.setattr(sys, "argv", ["detect_voc.py", *options, "--output_dir", str(folder)])
    detect_voc.main()
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--epochs", "0"], "--epochs 0: give 1 or more"),
        (["--lam", "nan"], "--lam nan: give a number above 0"),
        (["--warmup_steps", "-1"], "--warmup_steps -1: give 0 or more"),
        (["--flip", "2"], "--flip 2.0: give a share from 0 to 1"),
        (["--anchor_sizes", "16", "0"], r"--anchor_sizes \[16, 0\]: give sizes of 1 or more"),
        (["--imagenet"], "--imagenet: VGG-16's weights need --width 1 --batch_norm False --head_size 4096"),
        (["--cpu", "--mixed_precision", "fp16"], "--mixed_precision fp16 needs an accelerator"),
        (["--paper"], "--paper needs --dataset FOLDER"),
        (["--train_samples", "2"], "--batch_size 4: all processes need 4 images, of 2"),
        (["--dataset", "/no/such/folder"], "--dataset /no/such/folder cannot be read; it must be digit_scenes, "),
    ],
)
def test_each_wrong_option_is_told_in_one_line(wrong, message, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=message) as error:
        run(monkeypatch, tmp_path, *wrong)
    assert "\n" not in str(error.value)


def test_each_process_needs_a_whole_batch(tmp_path, monkeypatch):
    """Or accelerate makes no step at all."""
    monkeypatch.setattr(detect_voc, "PROCESSES", 2)
    with pytest.raises(SystemExit, match="--batch_size 4: all processes need 8 images, of 6"):
        run(monkeypatch, tmp_path, "--train_samples", "6")


def test_a_split_that_is_not_there_is_told_with_those_that_are(voc, tmp_path):
    with pytest.raises(SystemExit, match=f"--dataset {voc}, --voc_year 2007, split all: "):
        load_detections(DetectionOptions(dataset=str(voc), train_split="all"))


@pytest.fixture(autouse=True, scope="module")
def _few_scenes():
    """Draws the scenes once and few of them, which are most of the time of a run."""
    scenes = {"train": detect_voc.digit_scenes(8, "train"), "test": detect_voc.digit_scenes(4, "test")}
    draw = detect_voc.digit_scenes
    with pytest.MonkeyPatch.context() as monkeypatch:
        few = lambda count, split: scenes[split] if count >= 200 else draw(count, split)  # noqa: E731
        monkeypatch.setattr(detect_voc, "digit_scenes", few)
        yield


FAST = ["--epochs", "2", "--width", "0.03", "--head_size", "16", "--warmup_steps", "2", "--flip", "0.5", "--cpu"]


def test_an_interrupted_run_goes_on_and_ends_in_the_weights_of_a_whole_one(tmp_path, monkeypatch, capsys):
    records = run(monkeypatch, tmp_path / "whole", *FAST)
    assert [(record["arm"], len(record["epochs"])) for record in records] == [("vanilla", 2), ("TrAct", 2)]
    assert set(records[0]["epochs"][0]) == {"map_50", "map", "map_voc07"}
    out = " ".join(capsys.readouterr().out.split())
    assert "backbone.0: Conv2d, n=27" in out
    assert "mAP at IoU .5 on digit_scenes, in per cent" in out
    assert (tmp_path / "whole/comparison.png").stat().st_size > 10_000
    assert run(monkeypatch, tmp_path / "whole", *FAST) == records
    assert "training" not in capsys.readouterr().err

    class Killed(BaseException):
        pass

    measure, calls = detect_voc.measure_precision, []

    def die_at_the_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise Killed
        return measure(*args)

    monkeypatch.setattr(detect_voc, "measure_precision", die_at_the_second)
    with pytest.raises(Killed):
        run(monkeypatch, tmp_path / "killed", *FAST)
    monkeypatch.setattr(detect_voc, "measure_precision", measure)
    run(monkeypatch, tmp_path / "killed", *FAST)
    assert "Resumed from" in capsys.readouterr().out
    for arm in ("vanilla-0", "TrAct-0"):
        whole, killed = (next((tmp_path / name).glob(f"{arm}-*/model/*")) for name in ("whole", "killed"))
        assert whole.read_bytes() == killed.read_bytes()


def test_a_run_on_two_processes_is_not_answered_by_that_of_one(tmp_path, monkeypatch):
    trained = []

    def train_detector(arm, seed, settings, data, options):
        trained.append(settings)
        return {"arm": arm, "seed": seed, "settings": settings}

    data = detect_voc.Detections([None] * 8, [None] * 4, ["a"])
    monkeypatch.setattr(detect_voc, "load_detections", lambda options: data)
    monkeypatch.setattr(detect_voc, "train_detector", train_detector)
    monkeypatch.setattr(detect_voc, "report_precision", lambda found, options: None)
    run(monkeypatch, tmp_path, *FAST)
    run(monkeypatch, tmp_path, *FAST)
    assert len(trained) == 2
    assert "processes" not in trained[0]
    monkeypatch.setattr(detect_voc, "PROCESSES", 2)
    run(monkeypatch, tmp_path, *FAST)
    assert trained[2:] == [{**settings, "processes": 2} for settings in trained[:2]]


def test_a_run_is_not_answered_by_that_of_other_images(voc, monkeypatch, capsys):
    trained = []

    def train_detector(arm, seed, settings, data, options):
        trained.append(settings)
        return {"arm": arm, "seed": seed, "settings": settings}

    monkeypatch.setattr(detect_voc, "train_detector", train_detector)
    monkeypatch.setattr(detect_voc, "report_precision", lambda found, options: None)
    options = ["--dataset", str(voc), "--batch_size", "2", *FAST]
    run(monkeypatch, voc / "out", *options)
    assert "finished runs" not in capsys.readouterr().out
    run(monkeypatch, voc / "out", *options)
    assert len(trained) == 2
    said = f"{voc / 'out' / 'records.jsonl'} holds 2 finished runs; those with the same settings and images"
    assert capsys.readouterr().out.count(said) == 1
    (annotation,) = voc.rglob("000001.xml")
    annotation.write_text(annotation.read_text().replace("dog", "cat"))
    run(monkeypatch, voc / "out", *options)
    assert len(trained) == 4


@pytest.mark.parametrize("paper", [["--paper"], ["--paper=True"], ["--paper", "yes"]])
def test_the_paper_s_setting_changes_the_defaults_and_yields_to_options(voc, monkeypatch, paper):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as a plain `accelerate launch` does
    monkeypatch.setattr(sys, "argv", ["detect_voc.py", *paper, "--dataset", str(voc), "--epochs", "3"])
    options = detect_voc.parse_detection_options()
    assert {name: getattr(options, name) for name in detect_voc.PAPER} == {**detect_voc.PAPER, "epochs": 3}
    assert options.optimizer == "sgd"


def test_without_the_paper_s_setting_the_defaults_stay(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["detect_voc.py", "--paper", "False"])
    assert detect_voc.parse_detection_options() == DetectionOptions()


@pytest.mark.parametrize("option, expected", [([], "bf16"), (["--mixed_precision", "no"], "no")])
def test_the_precision_that_accelerate_launch_is_told_is_a_default(option, expected, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setattr(sys, "argv", ["detect_voc.py", *option])
    assert detect_voc.parse_detection_options().mixed_precision == expected


def test_a_precision_of_accelerate_launch_that_needs_an_accelerator_is_refused_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(SystemExit, match="--mixed_precision fp16 needs an accelerator: use no or bf16"):
        run(monkeypatch, tmp_path, "--cpu")


@pytest.mark.parametrize("script", [detect_voc, quickstart], ids=lambda script: script.__name__)
def test_earlier_runs_are_read_before_a_device_is_chosen(script, tmp_path):
    """Otherwise `--cpu` would come too late."""
    reset_accelerate()
    (tmp_path / "records.jsonl").write_text("{}\n")
    assert script.read_records(tmp_path) == [{}]
    assert PartialState._shared_state == {}
