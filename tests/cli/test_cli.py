"""`hf-tract inspect` as a user calls it, and what it tells."""

import json
import re
import sys

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from typer.testing import CliRunner

from helpers.documents import ROOT
from helpers.oracle import moment, says
from hf_tract import apply_tract
from hf_tract.cli import loading
from hf_tract.cli.cost import moment_cost, solve_cost
from hf_tract.cli.loading import LoadedModel, load
from hf_tract.cli.main import app
from hf_tract.cli.report import Report, inspect_model, warnings_for
from hf_tract.cli.scale import IMAGENET, Normalization, spectrum_of_images
from hf_tract.config import TrActError
from hf_tract.core.patches import PatchSpec

SMALL = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def inspect(*args: str) -> dict:
    result = CliRunner().invoke(app, ["inspect", *map(str, args), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def checkpoint(tmp_path):
    model = hf.ViTForImageClassification(hf.ViTConfig(**SMALL, image_size=32, patch_size=8))
    model.save_pretrained(tmp_path / "model")
    processor = {"image_processor_type": "ViTImageProcessor", "do_normalize": True, "do_rescale": True}
    processor |= {"image_mean": IMAGENET.mean, "image_std": IMAGENET.std}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(processor))
    return tmp_path / "model"


def test_a_folder_is_inspected(checkpoint):
    told = inspect(checkpoint, "--batch-size", 8)
    (layer,) = told["layers"]
    assert layer["name"] == "vit.embeddings.patch_embeddings.projection"
    assert layer["source"] == "reached first by the pixels"
    assert (layer["rows"], layer["columns"], layer["patches"]) == (24, 192, 16)
    assert layer["operation"] == "Conv2d 8x8, patches"
    assert told["operations"] == 8 * layer["moment"]["operations"] + layer["solve"]["operations"]
    assert told["share"] == told["operations"] / (3 * 8 * told["forward_operations"])
    assert told["warnings"] == []


def test_the_text_is_the_one_in_the_document(monkeypatch):
    """Its figures too: they are arithmetic on the model's shapes."""
    monkeypatch.setenv("COLUMNS", "100")
    shown = re.search(r"```text\n(.*?)```", (ROOT / "docs" / "cli.md").read_text(), re.DOTALL).group(1)
    result = CliRunner().invoke(app, ["inspect", "vit_small_patch16_224"])
    assert " ".join(result.stdout.split()) == " ".join(shown.split())


MEAN = "The mean eigenvalue of C, the mean square of what the layer reads, is about"


def test_a_processor_that_is_missing_or_does_not_normalise_is_warned_of(checkpoint):
    path = checkpoint / "preprocessor_config.json"
    path.write_text(json.dumps({"do_normalize": False, "do_rescale": False}))
    (warning,) = inspect(checkpoint)["warnings"]
    assert warning.startswith(f"{MEAN} 1.6e+04.")
    path.write_text(json.dumps({"do_normalize": False}))
    assert inspect(checkpoint)["warnings"][0].startswith(
        "The mean eigenvalue of C, the mean square of what the layer reads, is about 0.25"
    )
    path.unlink()
    assert inspect(checkpoint)["warnings"] == [
        "Nothing says how this model's pixels are normalised; lam assumes a mean square of about 1."
    ]


@pytest.mark.parametrize(
    ("changes", "mean", "std"),
    [
        ({}, 0.5, 0.25),
        ({"do_rescale": False}, 0.5 / 255, 0.25 / 255),
        ({"rescale_factor": 1 / 127.5, "offset": True}, 0.75, 0.125),
        ({"do_rescale": False, "do_normalize": False}, 0, 1 / 255),
    ],
)
def test_a_processors_scaling_is_part_of_the_normalisation(checkpoint, changes, mean, std):
    path = checkpoint / "preprocessor_config.json"
    path.write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3, **changes}))
    found = load(str(checkpoint)).normalization
    assert found.mean[0] == pytest.approx(mean)
    assert found.std[0] == pytest.approx(std)


def test_a_timm_model_in_a_folder_of_transformers_has_its_own_normalisation(tmp_path):
    config = hf.TimmWrapperConfig.from_dict({"architecture": "resnet10t", "num_classes": 4})
    config.pretrained_cfg = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    config.architectures = ["TimmWrapperForImageClassification"]
    config.save_pretrained(tmp_path)
    assert load(str(tmp_path)).normalization == Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_remote_code_may_have_a_classifier_alone(monkeypatch):
    config, made = hf.ViTConfig(**SMALL), torch.nn.Linear(2, 2)
    config.auto_map = {"AutoModelThatIsGone": "x.Y", "AutoModelForImageClassification": "x.Z"}
    monkeypatch.setattr(hf.AutoModelForImageClassification, "from_config", lambda config, trust_remote_code: made)
    assert loading._make(config, trust_remote_code=True) is made


def test_timm_models_and_model_types_are_inspected_by_name():
    assert inspect("crossvit_tiny_240")["layers"][1]["source"] == "timm's first_conv"
    assert inspect("timm/resnet18")["layers"][0]["operation"] == "Conv2d 7x7, stride 2x2"
    assert inspect("swin", "--layers", "*patch_embeddings*")["layers"][0]["source"] == "named by the user"


def test_a_folder_of_images_gives_the_eigenvalues(checkpoint, tmp_path):
    folder = tmp_path / "images" / "some"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for index in range(5):
        Image.fromarray(generator.integers(0, 256, (40, 32, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    told = inspect(checkpoint, "--dataset", folder.parent, "--samples", 4)["spectrum"]
    assert told["n"] == 192
    assert 0.5 < told["mean"] < 3
    assert told["condition"] <= 1.001 * (told["largest"] + 0.1) / 0.1
    by_less = inspect(checkpoint, "--dataset", folder.parent, "--samples", 4, "--lam", 1e-4)["spectrum"]
    assert by_less["condition"] > 10 * told["condition"]
    (checkpoint / "preprocessor_config.json").unlink()
    told = inspect(checkpoint, "--dataset", folder.parent, "--lam", 0.03)
    assert told["spectrum"]["mean"] < 0.5
    assert told["warnings"] == [
        "Nothing says how this model's pixels are normalised; the images were measured with values from 0 to 1."
    ]


def test_the_report_shows_shape_cost_and_mean_eigenvalue(checkpoint):
    result = CliRunner().invoke(app, ["inspect", str(checkpoint)])
    assert result.exit_code == 0
    text = " ".join(result.output.split())
    assert "24 x 192" in text
    assert "16 of an input of 3 x 32 x 32" in text
    assert "A step of 64 such inputs:" in text
    assert "of its operations" in text
    assert "Mean eigenvalue of C for natural images: about 1; lam is 0.1." in text


def test_images_are_not_expected_at_a_layer_that_a_user_names(checkpoint):
    result = CliRunner().invoke(app, ["inspect", str(checkpoint), "--layers", "classifier"])
    assert result.exit_code == 0
    text = " ".join(result.output.split())
    assert "Mean eigenvalue of C for natural images, where the layer reads their pixels: about 1;" in text


@pytest.mark.parametrize(
    "args, parts",
    [
        (["vit_smal_patch16_224"], ("`model` (='vit_smal_patch16_224') is no folder", "vit_small_patch16_224")),
        (["bert"], ("reads `input_ids` and no pixels",)),
        (["resnet18", "--layers", "conv9"], ("`layers` (='conv9') matches no",)),
        (["resnet18", "--lam", "0"], ("`lam` (=0.0) must be a positive",)),
        (["resnet18", "--dataset", "no/such"], ("`dataset` (='no/such') cannot be read",)),
    ],
)
def test_an_error_is_one_sentence(args, parts):
    result = CliRunner().invoke(app, ["inspect", *args])
    assert result.exit_code == 2
    text = " ".join(result.output.split())
    assert all(part in text for part in parts), text


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(TrActError, match=says("is a folder without a config that transformers knows")):
        load(str(tmp_path))


def test_without_typer_it_names_what_to_install(monkeypatch):
    from hf_tract.__main__ import main

    monkeypatch.setitem(sys.modules, "hf_tract.cli.main", None)
    with pytest.raises(SystemExit, match=says("pip install 'hf-tract[cli]'")):
        main()


def test_a_frozen_layer_and_a_large_one_are_told():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 32, 32)).requires_grad_(False)
    loaded = LoadedModel(model, IMAGENET, "test")
    warnings = warnings_for(Report("model", loaded, inspect_model(model), batch_size=64, lam=0.1, spectrum=None))
    assert warnings[0] == "0 is frozen: TrAct does nothing until its weight requires a gradient."
    assert warnings[1].startswith("n is 3072:")


def test_the_expected_mean_is_that_of_such_pixels():
    torch.manual_seed(0)
    normalization = Normalization((0.5, 0.4, 0.3), (0.5, 0.2, 0.3))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    images = torch.randn(8, 3, 64, 64) * std + mean
    spec = PatchSpec((4, 4), (4, 4), (0,) * 4, (1, 1))
    spectrum = spectrum_of_images(normalization.apply(images), spec, lam=0.1)
    assert spectrum.mean == pytest.approx(normalization.expected_mean_eigenvalue(), rel=0.02)


def test_grey_images_are_normalised_by_the_average_of_three_channels():
    grey = Normalization((0.3, 0.4, 0.5), (0.1, 0.2, 0.3)).apply(torch.full((2, 1, 4, 4), 0.6))
    assert grey.shape == (2, 1, 4, 4)
    assert grey.mean() == pytest.approx(1)


def test_pixels_that_are_not_finite_are_told():
    with pytest.raises(TrActError, match="`dataset` has pixels that are not finite"):
        spectrum_of_images(torch.full((1, 1, 4, 4), torch.nan), PatchSpec((2, 2), (2, 2), (0,) * 4, (1, 1)), lam=0.1)


def test_the_spectrum_is_the_dense_moments():
    x, layer = torch.randn(6, 3, 12, 12), torch.nn.Conv2d(3, 4, 3, 2, 1)
    values = torch.linalg.eigvalsh(moment(x, layer))
    told = spectrum_of_images(x, PatchSpec((3, 3), (2, 2), (1,) * 4, (1, 1)), lam=0.5)
    assert told.mean == pytest.approx(float(values.mean()))
    assert told.largest == pytest.approx(float(values.max()))
    assert told.condition == pytest.approx(float((values.max() + 0.5) / (values.min() + 0.5)))
    assert told.above == int((values > 0.5).sum())


def test_costs_count_groups_and_rows():
    whole, grouped = (
        moment_cost((2, 8, 12, 12), PatchSpec((4, 4), (4, 4), (0,) * 4, (1, 1), groups)) for groups in (1, 4)
    )
    assert whole.operations == 2 * (2 * 9) * 128 * 128
    assert grouped.operations == whole.operations // 4
    assert moment_cost((2, 9, 128), PatchSpec()).operations == whole.operations
    assert solve_cost(10, 6).operations == 6**3 // 3 + 2 * 10 * 36


def test_the_inspection_takes_what_apply_tract_takes_and_changes_nothing():
    model = hf.ViTForImageClassification(hf.ViTConfig(**SMALL, image_size=32, patch_size=8)).train()
    state, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    inspection = inspect_model(torch.nn.DataParallel(model))
    assert [layer.name for layer in inspection.layers] == [layer.name for layer in apply_tract(model).layers]
    assert inspection.layers[0].patches == 16
    assert model.training
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_it_prints_its_version():
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.startswith("hf-tract ")


def test_options_take_underscores_and_hyphens(checkpoint):
    assert (
        inspect(checkpoint, "--batch_size", "8")["batch_size"]
        == inspect(checkpoint, "--batch-size", "8")["batch_size"]
        == 8
    )


def test_a_long_name_stands_in_one_piece(checkpoint, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = CliRunner().invoke(app, ["inspect", str(checkpoint)])
    assert "vit.embeddings.patch_embeddings.projection" in result.stdout


@pytest.mark.parametrize("name", ["runs[/final]/vit", "bert", "hf-hub:nobody/nothing"])
def test_an_error_is_a_line_without_markup(name):
    result = CliRunner().invoke(app, ["inspect", name])
    assert result.exit_code == 2
    assert result.output.startswith("Error: `model` (=")
    assert len(result.output.strip().splitlines()) == 1
    assert "[/final]" in result.output or "[" not in name
