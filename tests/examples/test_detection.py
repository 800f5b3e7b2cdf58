"""Detectors: their first layer, its gradient where a batch's images differ in size, and the two examples."""

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
import yaml
from PIL import Image
from torch import nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import detect_detr
import detect_voc
import detection_data
from detection_data import VOC_NAMES, DetectionArguments, Objects
from detection_metrics import mean_average_precision
from digit_scenes import digit_scenes
from helpers.oracle import assert_close, expected
from hf_tract import apply_tract, find_first_layers
from recipe import Run

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
TINY_YOLOS = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": [64, 64],
    "num_detection_tokens": 5,
    "use_mid_position_embeddings": False,
}
SIZES = ((64, 96), (80, 48), (64, 64))  # height, width


def objects(count: int) -> list[Objects]:
    boxes = torch.tensor([[4.0, 4.0, 30.0, 40.0], [20.0, 10.0, 44.0, 44.0]])
    return [
        Objects(boxes[: 1 + i % 2], torch.arange(1 + i % 2), torch.zeros(1 + i % 2, dtype=torch.bool))
        for i in range(count)
    ]


def detr_inputs(processor) -> dict:
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in SIZES]
    examples = [detect_detr.Example(image, each) for image, each in zip(images, objects(3), strict=True)]
    return detect_detr.collate(processor, examples)


def faster_rcnn() -> tuple[nn.Module, list]:
    values = {"width": 0.125, "head_size": 16, "min_size": 64, "max_size": 96, "anchor_sizes": [16, 32], "regions": 8}
    model = detect_voc.faster_rcnn(3, detect_voc.Recipe(**values))
    targets = [{"boxes": each.boxes, "labels": each.labels + 1} for each in objects(3)]
    return model, [[torch.rand(3, *size) for size in SIZES], targets]


def detr() -> tuple[nn.Module, dict]:
    model = hf.DetrForObjectDetection(hf.AutoConfig.for_model("detr", **TINY_DETR))
    find_first_layers(model)[0].module.requires_grad_(True)
    return model, detr_inputs(hf.DetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 64}))


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


def test_mean_average_precision_is_that_by_hand():
    """Of two objects one is found exactly and first, one not at all; a false hit comes last. Eleven recalls: 6/11."""
    wanted = [
        Objects(
            torch.tensor([[0.0, 0, 20, 20], [40.0, 40, 60, 60]]), torch.tensor([1, 1]), torch.tensor([False, False])
        )
    ]
    boxes = torch.tensor([[0.0, 0, 20, 20], [70.0, 70, 90, 90]])
    found = [{"boxes": boxes, "scores": torch.tensor([0.9, 0.8]), "labels": torch.tensor([1, 1])}]
    figures = mean_average_precision(found, wanted)
    assert figures["map_voc07"] == pytest.approx(6 / 11)
    assert figures["map_50"] == pytest.approx(51 / 101)
    hard = [wanted[0]._replace(difficult=torch.tensor([False, True]))]
    assert mean_average_precision(found, hard)["map_voc07"] == pytest.approx(1.0)


def test_digit_scenes_are_the_same_for_a_seed_and_their_boxes_hold_digits():
    data = digit_scenes(train=12, test=4)
    again = digit_scenes(train=12, test=4)
    assert data["train"].features["objects"]["category"].feature.names == list("0123456789")
    for row, same in zip(data["train"], again["train"], strict=True):
        assert np.array_equal(row["image"], same["image"])
        assert row["objects"] == same["objects"]
        pixels = np.asarray(row["image"], dtype=float)
        assert 1 <= len(row["objects"]["bbox"]) <= 4
        for x, y, width, height in np.array(row["objects"]["bbox"], dtype=int):
            assert 0 <= x < x + width <= row["image"].width
            assert 0 <= y < y + height <= row["image"].height
            assert pixels[y : y + height, x : x + width].std() > 1.5 * 255 * 0.03  # more than the noise
    assert len({row["image"].size for row in data["train"]}) > 3
    other = digit_scenes(train=12, test=4, seed=1)
    assert not np.array_equal(data["train"][0]["image"], other["train"][0]["image"])


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
    data = DetectionArguments(dataset=str(voc)).load()
    assert (len(data.train), len(data.test), data.names) == (2, 2, VOC_NAMES)
    boxes, labels, difficult = data.train[1].objects
    assert boxes.tolist() == [[10, 20, 40, 50]] * 2
    assert [VOC_NAMES[label] for label in labels] == ["dog", "person"]
    assert difficult.tolist() == [False, True]
    _, target = detect_voc.Augmented(data.train, flip=1.0, seed=0)[0]
    assert target["boxes"].tolist() == [[40, 20, 70, 50]]
    assert target["labels"].tolist() == [VOC_NAMES.index("dog") + 1]


@pytest.mark.parametrize("box", ["coco", "pascal_voc"])
def test_a_data_set_of_the_hub_s_form_is_read(tmp_path, box):
    rows = [{"image": Image.new("L", (40, 30)), "objects": {"bbox": [[5.0, 6.0, 20.0, 16.0]], "category": [1]}}] * 2
    data = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    for split in ("train", "validation"):
        (tmp_path / "data").mkdir(exist_ok=True)
        data.to_parquet(tmp_path / "data" / f"{split}.parquet")
    found = DetectionArguments(dataset=str(tmp_path / "data"), bbox_format=box).load()
    boxes = found.test[0].objects.boxes.tolist()
    assert boxes == ([[5, 6, 25, 22]] if box == "coco" else [[5, 6, 20, 16]])
    assert found.names == ["0", "1"]
    assert found.train[0].image.mode == "RGB"


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"bbox_format": "yolo"}, "--bbox_format yolo: it must be coco or pascal_voc"),
        ({"train_split": "all"}, "digit_scenes has no split all, it has"),
    ],
)
def test_what_cannot_be_meant_is_refused(wrong, message):
    with pytest.raises(SystemExit, match=message):
        DetectionArguments(**wrong).load()


def test_a_data_set_without_boxes_is_refused(tmp_path):
    datasets.Dataset.from_dict({"label": [0]}).to_parquet(tmp_path / "train.parquet")
    datasets.Dataset.from_dict({"label": [0]}).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(SystemExit, match=r"has no column of images or none named objects; it has \['label'\]"):
        DetectionArguments(dataset=str(tmp_path)).load()


@pytest.fixture(autouse=True, scope="module")
def _few_scenes():
    """Draws the scenes once and few of them, which are most of the time of a run."""
    scenes = digit_scenes(train=8, test=4)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(detection_data, "digit_scenes", lambda: scenes)
        yield


VOC_FAST = ["--epochs", "2", "--batch_size", "4", "--width", "0.03", "--head_size", "16", "--warmup_steps", "2"]
DETR_FAST = ["--image_size", "64", "--num_train_epochs", "2", "--per_device_train_batch_size", "4", "--use_cpu"]


def run(script, monkeypatch, folder, *options) -> list[dict]:
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *options, "--output_dir", str(folder)])
    script.main()
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def test_faster_rcnn_trains_both_arms_goes_on_and_reports(tmp_path, monkeypatch, capsys):
    records = run(detect_voc, monkeypatch, tmp_path, *VOC_FAST)
    assert [(record["arm"], len(record["scores"])) for record in records] == [("vanilla", 2), ("TrAct", 2)]
    assert set(records[0]["more"]) == {"mAP, COCO", "mAP, VOC 2007"}
    out = " ".join(capsys.readouterr().out.split())
    assert "backbone.0: Conv2d, n=27" in out
    assert "mAP at IoU .5 in per cent" in out
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    assert run(detect_voc, monkeypatch, tmp_path, *VOC_FAST) == records


def test_faster_rcnn_killed_after_an_epoch_ends_in_the_same_weights(tmp_path, monkeypatch):
    run(detect_voc, monkeypatch, tmp_path / "whole", *VOC_FAST, "--flip", "0.5")

    class Killed(BaseException):
        pass

    add_epoch, calls = detect_voc.add_epoch, []

    def add_and_die(*args):
        calls.append(add_epoch(*args))
        if len(calls) == 2:
            raise Killed

    monkeypatch.setattr(detect_voc, "add_epoch", add_and_die)
    with pytest.raises(Killed):
        run(detect_voc, monkeypatch, tmp_path / "killed", *VOC_FAST, "--flip", "0.5")
    monkeypatch.setattr(detect_voc, "add_epoch", add_epoch)
    run(detect_voc, monkeypatch, tmp_path / "killed", *VOC_FAST, "--flip", "0.5")
    for arm in ("vanilla-0", "TrAct-0"):
        file = f"{arm}/model/model.safetensors"
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes()


@pytest.mark.parametrize("model, config", [("rt_detr", None), ("detr", TINY_DETR), ("yolos", TINY_YOLOS)])
def test_the_detr_family_trains_both_arms_and_reports(model, config, tmp_path, monkeypatch, capsys):
    options = [*DETR_FAST, "--model", model, *(["--model_config", json.dumps(config)] if config else [])]
    records = run(detect_detr, monkeypatch, tmp_path, *options)
    assert [(record["arm"], len(record["scores"])) for record in records] == [("vanilla", 2), ("TrAct", 2)]
    assert all(0 <= score <= 1 for record in records for score in record["scores"])
    assert ("freezes its first layer" in capsys.readouterr().out) == (model == "detr")
    state = json.loads(next((tmp_path / "TrAct-0").glob("checkpoint-*/trainer_state.json")).read_text())
    assert any("tract/condition" in entry for entry in state["log_history"])


def test_rt_detr_killed_within_an_epoch_ends_in_the_same_weights(tmp_path, monkeypatch):
    run(detect_detr, monkeypatch, tmp_path / "whole", *DETR_FAST)

    class Killed(BaseException):
        pass

    evaluate, calls = detect_detr.evaluate, []

    def die_at_the_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise Killed
        return evaluate(*args)

    monkeypatch.setattr(detect_detr, "evaluate", die_at_the_second)
    with pytest.raises(Killed):
        run(detect_detr, monkeypatch, tmp_path / "killed", *DETR_FAST)
    monkeypatch.setattr(detect_detr, "evaluate", evaluate)
    run(detect_detr, monkeypatch, tmp_path / "killed", *DETR_FAST)
    for arm in ("vanilla-0", "TrAct-0"):
        whole, killed = (next((tmp_path / name / arm).rglob("model.safetensors")) for name in ("whole", "killed"))
        assert whole.read_bytes() == killed.read_bytes()


@pytest.mark.parametrize("file", sorted(detect_voc.RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_recipes_name_what_exists(file, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["detect_voc.py", "--recipe", str(file)])
    recipe, _ = detect_voc.parse_with_recipe("detection/digit_scenes.yaml", detect_voc.Recipe, detect_voc.Run)
    assert isinstance(_, detect_voc.Run)
    assert not isinstance(_, Run)
    written = yaml.safe_load(file.read_text())
    assert {key: getattr(recipe, key) for key in written} == written
