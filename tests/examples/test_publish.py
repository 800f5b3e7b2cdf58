"""Pre-train, push, load without hf-tract, fine-tune, push, classify, by the Hub's client and a server on loopback."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from helpers.environments import fresh_python
from helpers.hub_server import TOKEN, Repo, serving

EXAMPLES = Path(__file__).parents[2] / "examples"
FLOWERS = "dpdl-benchmark/oxford_flowers102"
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "patch_size": 8}


@pytest.fixture(scope="module")
def hub():
    with serving() as hub:
        yield hub


@pytest.fixture(scope="module")
def environment(hub, tmp_path_factory) -> dict[str, str]:
    """What makes a process use that server, and nothing else."""
    home = tmp_path_factory.mktemp("home")
    others = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    ours = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return {**others, **ours, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_UPDATE_CHECK": "0"}


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    return fresh_python(tmp_path_factory.mktemp("fresh") / "venv")


def run(environment, *arguments, cwd, python=sys.executable) -> str:
    done = subprocess.run(
        [python, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout


def flowers() -> bytes:
    """Makes noise in the layout of Flowers-102: 102 classes, columns `image` and `label`; one image grey, one RGBA."""
    random = np.random.default_rng(0)
    modes = {0: "L", 1: "RGBA"}
    images = [Image.fromarray(random.integers(0, 256, (40, 32, 3), dtype=np.uint8)) for _ in range(204)]
    rows = [{"image": image.convert(modes.get(i, "RGB")), "label": i % 102} for i, image in enumerate(images)]
    names = [f"flower {i}" for i in range(102)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    data = datasets.Dataset.from_list(rows, features=features)
    buffer = io.BytesIO()
    data.to_parquet(buffer)
    return buffer.getvalue()


def test_a_model_goes_from_pre_training_to_a_pipeline(hub, environment, python, tmp_path):
    data = Repo()
    part = flowers()
    data.commit("main", {f"data/{split}-00000-of-00001.parquet": part for split in ("train", "test")}, set(), "data")
    hub.repos[f"datasets/{FLOWERS}"] = data
    cpu = ["--cpu"]
    model = ["--model_config", json.dumps(TINY), "--epochs", "1", "--train_samples", "128", "--batch_size", "32"]
    push = ["--push_to_hub", "--hub_model_id", "tester/vit-crops", "--license", "mit"]
    run(environment, EXAMPLES / "pretrain_vit.py", *cpu, *model, *push, "--output_dir", "pretrain", cwd=tmp_path)
    loaded = run(environment, "-c", LOAD, "tester/vit-crops", cwd=tmp_path, python=python)
    assert loaded.split() == ["20", "True"]
    inspected = run(environment, "-m", "hf_tract", "inspect", "tester/vit-crops", "--json", cwd=tmp_path)
    assert json.loads(inspected)["layers"][0]["name"] == "vit.embeddings.patch_embeddings.projection"

    tune = ["--use_cpu", "--checkpoint", "tester/vit-crops", "--dataset", FLOWERS, "--num_train_epochs", "1"]
    push = ["--push_to_hub", "--hub_model_id", "tester/vit-flowers", "--hub_private_repo", "True"]
    quiet = ["--save_strategy", "epoch", "--disable_tqdm", "True", "--output_dir", "flowers"]
    out = run(environment, EXAMPLES / "transfer.py", *tune, *push, *quiet, cwd=tmp_path)
    assert "The head is made anew: tester/vit-crops knows 20 classes, the data set has 102." in out
    Image.new("RGB", (50, 40), "red").save(tmp_path / "image.png")
    label = run(environment, "-c", CLASSIFY, "tester/vit-flowers", "image.png", cwd=tmp_path, python=python)
    assert label.startswith("flower ")

    pushed = hub.repos["tester/vit-flowers"]
    assert pushed.private
    messages = [pushed.messages[commit] for commit in pushed.branches["main"]]
    assert messages[0] == "initial commit"
    assert messages[1].startswith("Training in progress, epoch 1")
    assert messages[2:] in (
        ["End of training"],
        [],
    )  # a push in training that comes late has all, and the last one nothing to add
    files = pushed.files("main")
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "tract_config.json", "README.md"} <= set(
        files
    )
    card = ModelCard(files["README.md"].decode())
    assert {"tract", "hf-tract"} <= set(card.data.tags)
    assert (card.data.base_model, card.data.datasets) == ("tester/vit-crops", [FLOWERS])
    assert card.data.eval_results[0].dataset_type == FLOWERS
    assert card.data.library_name == "transformers"
    assert "lam = 0.1" in card.text
    assert str(tmp_path) not in card.text
    assert all(TOKEN.encode() not in data for repo in hub.repos.values() for data in repo.files("main").values())


def test_a_timm_model_loads_by_timm_and_is_fine_tuned(hub, environment, python, tmp_path):
    model = [
        "--model",
        "test_vit",
        "--model_config",
        "{}",
        "--epochs",
        "1",
        "--train_samples",
        "64",
        "--batch_size",
        "32",
    ]
    model += ["--image_size", "160"]
    run(environment, EXAMPLES / "pretrain_vit.py", "--cpu", *model, "--output_dir", "timm", cwd=tmp_path)
    saved = json.loads((tmp_path / "timm" / "model" / "config.json").read_text())
    assert saved["pretrained_cfg"]["mean"] != [0.5, 0.5, 0.5] != saved["pretrained_cfg"]["std"]  # the photographs' own
    publish = EXAMPLES / "push_to_hub.py"
    run(environment, publish, "timm", "--repo_id", "tester/timm-crops", cwd=tmp_path)
    assert (
        run(environment, "-c", LOAD + TIMM, "tester/timm-crops", cwd=tmp_path, python=python).split()
        == ["20", "True"] * 2
    )
    tuned = [
        "--use_cpu",
        "--checkpoint",
        "hf-hub:tester/timm-crops",
        "--train_samples",
        "64",
        "--num_train_epochs",
        "1",
    ]
    run(environment, EXAMPLES / "transfer.py", *tuned, "--output_dir", "tuned", cwd=tmp_path)
    run(environment, publish, "tuned", "--repo_id", "tester/timm-digits", "--revision", "v1", cwd=tmp_path)
    card = ModelCard(hub.repos["tester/timm-digits"].files("v1")["README.md"].decode())
    assert (card.data.library_name, card.data.base_model) == ("timm", "tester/timm-crops")
    loaded = run(environment, "-c", LOAD + TIMM, "tester/timm-digits", "v1", cwd=tmp_path, python=python)
    assert loaded.split() == ["10", "True"] * 2


LOAD = """
import sys, torch
from transformers import AutoImageProcessor, AutoModelForImageClassification
name, revision = [*sys.argv[1:], "main"][:2]
model = AutoModelForImageClassification.from_pretrained(name, revision=revision)
processor = AutoImageProcessor.from_pretrained(name, revision=revision)
from PIL import Image
scores = model(**processor(Image.new("RGB", (50, 40)), return_tensors="pt")).logits
print(scores.shape[-1], bool(scores.isfinite().all()))
"""
CLASSIFY = """
import sys
from transformers import pipeline
print(pipeline("image-classification", model=sys.argv[1])(sys.argv[2])[0]["label"])
"""
TIMM = """
import timm
model = timm.create_model(f"hf-hub:{name}@{revision}", pretrained=True).eval()
scores = model(torch.rand(1, *model.pretrained_cfg["input_size"]))
print(scores.shape[-1], bool(scores.isfinite().all()))
"""
