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


def run(environment, python, code, *arguments, cwd) -> str:
    done = subprocess.run(
        [python, "-c", code, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout


def run_scripts(environment, *commands: list[str], cwd) -> list[str]:
    """Runs commands one after the other in one interpreter, and returns what each printed."""
    out = run(environment, sys.executable, SCRIPTS, str(EXAMPLES), json.dumps(commands), cwd=cwd)
    return out.split(NEXT)[1:]


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
    few = ["--train_samples", "128", "--test_samples", "64", "--batch_size", "32", "--epochs", "1"]
    crops = ["--hub_model_id", "vit-crops", "--license", "mit"]  # The owner is who the token is of.
    model = ["--model_config", json.dumps(TINY)]
    pretrain = ["pretrain_vit.py", "--cpu", *model, *few, "--push_to_hub", *crops, "--output_dir", "pretrain"]
    inspect = ["hf_tract", "inspect", "tester/vit-crops", "--json"]
    tune = ["transfer.py", "--use_cpu", "--checkpoint", "tester/vit-crops", "--dataset", FLOWERS]
    tune += ["--num_train_epochs", "1", "--save_strategy", "epoch", "--disable_tqdm", "True"]
    flowers_model = ["--push_to_hub", "--hub_model_id", "tester/vit-flowers", "--hub_private_repo", "True"]
    tune += [*flowers_model, "--output_dir", "flowers"]
    _, inspected, tuned = run_scripts(environment, pretrain, inspect, tune, cwd=tmp_path)
    assert json.loads(inspected)["layers"][0]["name"] == "vit.embeddings.patch_embeddings.projection"
    assert "The head is new: tester/vit-crops knows 20 classes, the data set has 102." in tuned
    assert b'"tester/vit-crops"' in hub.repos["tester/vit-crops"].files("main")["README.md"]

    Image.new("RGB", (50, 40), "red").save(tmp_path / "image.png")
    code = LOADING + 'load("tester/vit-crops"); classify("tester/vit-flowers", "image.png")'
    loaded, classified = run(environment, python, code, cwd=tmp_path).splitlines()
    assert loaded == "20 True"
    assert classified.startswith("flower ")

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
    few = ["--train_samples", "64", "--test_samples", "32"]
    model = ["--model", "test_vit", "--model_config", "{}", "--image_size", "160"]
    once = ["--epochs", "1", "--batch_size", "32"]
    pretrain = ["pretrain_vit.py", "--cpu", *model, *few, *once, "--output_dir", "timm"]
    tune = ["transfer.py", "--use_cpu", "--checkpoint", "hf-hub:tester/timm-crops", *few, "--num_train_epochs", "1"]
    run_scripts(
        environment,
        pretrain,
        ["push_to_hub.py", "timm", "--repo_id", "tester/timm-crops"],
        [*tune, "--output_dir", "tuned"],
        ["push_to_hub.py", "tuned", "--repo_id", "tester/timm-digits", "--revision", "v1"],
        cwd=tmp_path,
    )
    saved = json.loads((tmp_path / "timm" / "model" / "config.json").read_text())
    assert saved["pretrained_cfg"]["mean"] != [0.5, 0.5, 0.5] != saved["pretrained_cfg"]["std"]  # the photographs' own
    card = ModelCard(hub.repos["tester/timm-digits"].files("v1")["README.md"].decode())
    assert (card.data.library_name, card.data.base_model) == ("timm", "tester/timm-crops")
    repositories = [["tester/timm-crops"], ["tester/timm-digits", "v1"]]
    code = LOADING + f"for each in {repositories}: load(*each); load_by_timm(*each)"
    loaded = run(environment, python, code, cwd=tmp_path).splitlines()
    assert loaded == ["20 True"] * 2 + ["10 True"] * 2


NEXT = "--- the next script ---\n"
SCRIPTS = f"""
import json, runpy, sys
from accelerate.state import AcceleratorState, GradientState
_, folder, commands = sys.argv
sys.path.insert(0, folder)
for name, *arguments in json.loads(commands):
    print(end={NEXT!r}, flush=True)
    sys.argv = [name, *arguments]
    try:
        if name.endswith(".py"):
            runpy.run_path(folder + "/" + name, run_name="__main__")
        else:
            runpy.run_module(name, run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, ended.code
    sys.stdout.flush()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
"""
LOADING = """
import timm, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

def load(name, revision="main"):
    model = AutoModelForImageClassification.from_pretrained(name, revision=revision)
    processor = AutoImageProcessor.from_pretrained(name, revision=revision)
    show(model(**processor(Image.new("RGB", (50, 40)), return_tensors="pt")).logits)

def load_by_timm(name, revision="main"):
    model = timm.create_model(f"hf-hub:{name}@{revision}", pretrained=True).eval()
    show(model(torch.rand(1, *model.pretrained_cfg["input_size"])))

def show(scores):
    print(scores.shape[-1], bool(scores.isfinite().all()))

def classify(name, image):
    print(pipeline("image-classification", model=name)(image)[0]["label"])

"""
