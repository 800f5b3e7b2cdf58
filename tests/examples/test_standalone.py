"""Each example is one file that may be copied anywhere: its header names what it imports, and it runs alone."""

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
TREES = {file.stem: ast.parse(file.read_text(encoding="utf-8")) for file in EXAMPLES}
HEADER = re.compile(r"^# /// script\n((?:#.*\n)+?)# ///$", re.MULTILINE)
# Every script has its own of these.
OWN = {"main", "parse_arguments"}

# Options of a run that is as short as can be. IMAGES is a folder of images, MODEL what trainer_minimal.py made of it.
SHORT_RUNS = {
    "trainer_minimal": "--dataset IMAGES --epochs 1",
    "quickstart": "--epochs 1 --train_samples 32 --test_samples 32 --batch_size 16",
    "pretrain_vit": "--epochs 1 --train_samples 32 --test_samples 32 --batch_size 16",
    "transfer": "--checkpoint MODEL --dataset IMAGES --num_train_epochs 1",
    "push_to_hub": "MODEL --repo_id me/model --license mit --dry_run",
    "detect_voc": "--epochs 1 --train_samples 8 --test_samples 4 --width 0.03 --head_size 16 --cpu",
}

every_example = pytest.mark.parametrize("name", TREES)


def header_of(name: str) -> dict:
    """Return the script metadata (PEP 723) at the head of an example."""
    (block,) = HEADER.findall((ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8"))
    return tomllib.loads(re.sub(r"^# ?", "", block, flags=re.MULTILINE))


def imported_by(name: str) -> set[str]:
    """Return the packages that an example imports, wherever in it."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            found.add(node.module.split(".")[0])
    return found


@every_example
def test_the_header_names_what_is_imported(name):
    header = header_of(name)
    assert header["requires-python"] == ">=3.11"
    named = {canonicalize_name(Requirement(each).name) for each in header["dependencies"]}
    assert "hf-tract" in named
    distributions = packages_distributions() | {"hf_tract": ["hf-tract"]}
    for package in imported_by(name) - set(sys.stdlib_module_names):
        providers = {canonicalize_name(each) for each in distributions[package]}
        assert providers & named, f"{name}.py imports {package}, of {providers}, which its header does not name"


@every_example
def test_no_neighbour_is_imported(name):
    assert not imported_by(name) & (set(TREES) | {"benchmarks", "tests"})


def test_what_several_examples_define_has_one_text():
    texts = defaultdict(dict)
    for name, tree in TREES.items():
        source = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in OWN:
                texts[node.name][name] = ast.get_source_segment(source, node)
    shared = {name: copies for name, copies in texts.items() if len(copies) > 1}
    assert shared, "no example shares a function with another, so this test sees nothing"
    different = {name: sorted(copies) for name, copies in shared.items() if len(set(copies.values())) > 1}
    assert not different


def copy_alone(name: str, folder: Path) -> Path:
    """Copy an example into a new folder, where there is nothing else."""
    folder.mkdir()
    copy = folder / f"{name}.py"
    copy.write_bytes((ROOT / "examples" / copy.name).read_bytes())
    return copy


def run_alone(command: list[str], folder: Path, **environment: str) -> str:
    """Run a command in `folder`, without what this process adds to the search path."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        command, cwd=folder, env={**variables, **environment}, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Write a small folder of images by class, which is not split."""
    folder = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for name, brightness in {"dark": 60, "light": 255}.items():
        (folder / name).mkdir()
        for number in range(10):
            pixels = draw.integers(0, brightness, (16, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def model(images, tmp_path_factory) -> Path:
    """Train a model by trainer_minimal.py, alone in its folder."""
    copy = copy_alone("trainer_minimal", tmp_path_factory.mktemp("minimal") / "alone")
    out = run_alone([sys.executable, copy.name, "--dataset", str(images), "--epochs", "1"], copy.parent)
    assert "The model is in outputs/minimal" in out
    return copy.parent / "outputs" / "minimal"


def short_run(name: str, images: Path, model: Path) -> list[str]:
    options = SHORT_RUNS[name].replace("IMAGES", str(images)).replace("MODEL", str(model))
    return [f"{name}.py", *options.split()]


def test_each_example_has_a_short_run():
    assert set(SHORT_RUNS) == set(TREES)


@pytest.mark.parametrize("name", [name for name in SHORT_RUNS if name != "trainer_minimal"])
def test_each_runs_alone_in_an_empty_folder(name, images, model, tmp_path):
    """That trainer_minimal.py does is in the fixture `model`."""
    copy = copy_alone(name, tmp_path / "alone")
    assert run_alone([sys.executable, *short_run(name, images, model)], copy.parent)


@pytest.fixture(scope="module")
def wheel_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(["uv", "build", "--wheel", "--out-dir", str(folder)], cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT_RUNS)
def test_uv_runs_each_with_the_wheel_in_an_environment_by_its_header(name, images, model, wheel_folder, tmp_path):
    copy = copy_alone(name, tmp_path / "alone")
    find_links = {"UV_FIND_LINKS": str(wheel_folder), "VIRTUAL_ENV": ""}
    assert "--" in run_alone(["uv", "run", copy.name, "--help"], copy.parent, **find_links)
    assert run_alone(["uv", "run", *short_run(name, images, model)], copy.parent, **find_links)


@pytest.mark.parametrize("name", ["quickstart", "detect_voc", "transfer"])
def test_an_option_is_not_completed_to_another(name, monkeypatch, capsys):
    """`--seed 3`, which other scripts have, would mean three seeds."""
    wrong = {"transfer": "--lear", "quickstart": "--seed", "detect_voc": "--seed"}[name]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", wrong, "3"])
    with pytest.raises(SystemExit):
        importlib.import_module(name).main()
    assert wrong in capsys.readouterr().err
