"""The README tells the truth: its code runs, and its files, links and commands exist."""

import re

from helpers.documents import ROOT, commands_of, links_into_the_repository, run_snippets, snippets_of
from helpers.models import STEM
from hf_tract import TrActCallback, TrActTrainerCallback
from hf_tract.whitening.fresh import were_whitened

README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
MAX_WORDS = 900


def test_it_is_short():
    assert len(TEXT.split()) <= MAX_WORDS


def test_its_code_runs(tmp_path):
    assert len(snippets_of(README)) == 3
    names = run_snippets(README, tmp_path)
    assert [layer.name for layer in names["handle"].layers] == [STEM]
    assert were_whitened(names["model"], [names["model"].get_submodule(STEM)])
    assert names["trainer"].state.log_history[-2]["tract/grad_norm"] > 0


def test_it_shows_both_names_of_the_callback():
    assert TrActCallback is TrActTrainerCallback
    code = "".join(snippets_of(README))
    assert "import TrActCallback" in code
    assert "import TrActTrainerCallback" in code


def test_it_reads_on_a_package_index():
    """Its links and images are absolute, and those into the repository name files that exist."""
    assert not re.findall(r"\]\((?!https://)[^)]*\)", TEXT)
    files = links_into_the_repository(README)
    assert len(files) >= 10
    for file in files:
        assert (ROOT / file).exists(), file


def test_the_scripts_of_its_commands_exist():
    scripts = [word for command in commands_of(README) for word in command.split() if word.startswith("examples/")]
    assert "examples/quickstart.py" in scripts
    for script in scripts:
        assert (ROOT / script).is_file(), script


def test_it_has_one_command_that_runs_the_tests():
    """`.ci/run` takes it from here."""
    (command,) = [command for command in commands_of(README) if re.match(r"uv run .*pytest", command)]
    assert re.search(r"--group (\S+)", command)[1] == "test"
