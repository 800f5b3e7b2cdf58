"""The pages of docs/: their code runs, and what they list is what there is."""

import dataclasses
import re

import pytest
from transformers import TrainingArguments
from typer.main import get_command

import hf_tract
import hf_tract.integrations
from helpers.documents import ROOT, commands_of, links_into_the_repository, run_snippets, snippets_of
from helpers.models import STEM
from hf_tract.cli.main import app
from hf_tract.whitening.fresh import were_whitened

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def name_of(page):
    return str(page.relative_to(ROOT))


@pytest.mark.filterwarnings(
    "ignore:'pin_memory' argument:UserWarning"
)  # Trainer's default, on a machine without a GPU
def test_getting_started_runs(tmp_path):
    page = DOCS / "index.md"
    assert len(snippets_of(page)) == 2
    names = run_snippets(page, tmp_path)
    assert [layer.name for layer in names["handle"].layers] == [STEM]
    assert list((tmp_path / "outputs").rglob("events.out.tfevents*"))


def test_a_whitened_start_runs(tmp_path):
    page = DOCS / "whitening.md"
    assert len(snippets_of(page)) == 2
    names = run_snippets(page, tmp_path)
    assert were_whitened(names["model"], [names["model"].get_submodule(STEM)])


def test_each_works_with_line_names_a_test_file():
    lines = [line for line in (DOCS / "works_with.md").read_text().splitlines() if line.startswith("| ")]
    assert len(lines) > 25
    for line in lines[1:]:
        (file,) = re.findall(r"\| `(tests/\w+/\w+\.py)` \|$", line)
        assert (ROOT / file).exists(), file


def test_the_command_is_documented_with_every_option():
    (inspect,) = get_command(app).commands.values()
    options = {name for parameter in inspect.params for name in parameter.opts if name.startswith("--")}
    documented = set(re.findall(r"^\| `(--[\w-]+)` \|", (DOCS / "cli.md").read_text(), re.MULTILINE))
    assert documented == options


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_into_the_repository_name_files(page):
    """Those between pages are checked by `mkdocs build --strict`."""
    for file in links_into_the_repository(page):
        assert (ROOT / file).exists(), file


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_scripts_of_commands_exist(page):
    for command in commands_of(page):
        for script in re.findall(r"(?:examples|benchmarks)/[\w/]+\.(?:py|yaml)", command):
            assert (ROOT / script).is_file(), script
        for module in re.findall(r"python -m (benchmarks[\w.]*)", command):
            file = ROOT / module.replace(".", "/")
            assert file.with_suffix(".py").is_file() or (file / "__main__.py").is_file(), module


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=name_of)
def test_options_of_commands_exist(page):
    for command in commands_of(page):
        script = re.search(r"\w+\.py", command)
        if "python -m" in command or not script or not (ROOT / "examples" / script.group()).exists():
            continue
        text = (ROOT / "examples" / script.group()).read_text(encoding="utf-8")
        known = {field.name for field in dataclasses.fields(TrainingArguments)}
        known |= {
            *re.findall(r"^    (\w+): .*(?:option|field)\(", text, re.MULTILINE),
            *re.findall(r'"--(\w+)"', text),
        }
        used = set(re.findall(r" --(\w+)", command.partition(script.group())[2].partition("#")[0]))
        assert used <= known, command


@pytest.mark.parametrize("package", [hf_tract, hf_tract.integrations], ids=lambda package: package.__name__)
def test_every_public_name_is_in_the_reference(package):
    page = (DOCS / "api.md").read_text()
    documented = set(re.findall(r"^::: hf_tract\.(?:integrations\.)?(\w+)$", page, re.MULTILINE))
    assert set(package.__all__) - documented == {"TrActTrainerCallback"}  # the same class as TrActCallback
    for name in package.__all__:
        assert getattr(package, name).__doc__
