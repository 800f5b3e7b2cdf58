"""What the documents say follows from stored runs, and what does not follow is found."""

import json
import sys

import pytest

from benchmarks import ROOT
from benchmarks.common.records import read_records
from benchmarks.verify import __main__ as command
from benchmarks.verify.claims import SENTENCES, UNCHECKED, claims, figures
from benchmarks.verify.figures import contains, tables, uncovered, with_tables
from benchmarks.verify.stored import RESULTS
from benchmarks.verify.tables import TABLES

SUMMARY = "docs/results/index.md"
COST = "docs/performance.md"


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_every_figure_of_the_documents_follows_from_a_stored_run(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["verify"])
    command.main()
    assert f"{len(TABLES)} tables in" in capsys.readouterr().out


def test_the_documents_are_all_that_a_user_reads():
    names = {command.name_of(path) for path in command.documents()}
    assert {
        "README.md",
        "examples/README.md",
        "docs/tutorial.ipynb",
        "docs/usage.md",
        "model_cards/README.md",
    } <= names
    tutorial = command.text_of(ROOT / "docs" / "tutorial.ipynb")
    assert "# Tutorial" in tutorial
    assert "import torch" not in tutorial


def test_every_stored_run_says_what_made_it():
    files = sorted(RESULTS.glob("*.jsonl"))
    assert len(files) >= 4
    for file in files:
        for record in read_records(file).values():
            assert record.command, (file, record.key)
            assert record.hardware, (file, record.key)
            assert "torch" in record.versions, (file, record.key)
    lines = (RESULTS / "quickstart" / "records.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert {(row["arm"], row["seed"]) for row in rows} >= {("vanilla", seed) for seed in range(100, 105)}
    assert all(row["hardware"] and "quickstart.py" in row["command"] for row in rows)
    told = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("torch", "transformers"):
        (version,) = {row["versions"][name] for row in rows}
        assert f"{name} {version}" in told


def test_a_figure_that_is_not_the_runs_is_found():
    changed = text_of(SUMMARY).replace("+1.1 ± 0.7 with lambda .1", "+1.2 ± 0.7 with lambda .1")
    problems = list(command.problems_of(SUMMARY, changed))
    assert "gives '+1.1 ± 0.7 with lambda .1', which is not there" in problems[0]
    assert "'+1.2 ± 0.7' is in no sentence" in problems[1]


def test_a_figure_that_nobody_listed_is_found_with_its_line():
    added = text_of(SUMMARY) + "\nThis is new: 99.9 % in 3 ms.\n"
    line = len(added.splitlines())
    problems = list(command.problems_of(SUMMARY, added))
    assert [problem.split(" is in")[0] for problem in problems] == [
        f"{SUMMARY}:{line}: '99.9 %'",
        f"{SUMMARY}:{line}: '3 ms'",
    ]


def test_a_cell_that_is_not_the_runs_is_found_and_written_again():
    text = text_of(COST)
    rows = tables(text)["cost_step_gpu"]
    changed = text.replace("| x 1.003 (1.002-1.004)", "| x 1.000 (0.999-1.001)", 1)
    assert list(command.problems_of(COST, changed)) == [
        f"{COST}: the table cost_step_gpu is not what the stored runs give; --write writes it."
    ]
    written = {name: TABLES[name]() for name in tables(changed)}
    assert tables(with_tables(changed, written))["cost_step_gpu"] == rows
    assert with_tables(changed, written) == text


def test_a_table_of_an_unknown_name_is_found():
    text = "<!-- stored: nothing -->\n| a |\n<!-- end -->\n"
    (problem,) = command.problems_of("docs/none.md", text)
    assert "no stored table is called nothing; there are cost_step_cpu" in problem


def test_write_puts_the_tables_of_the_runs_into_the_documents(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    path = tmp_path / "docs" / "performance.md"
    path.write_text("before\n<!-- stored: bf16 -->\n| old |\n<!-- end -->\nafter\n")
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(command, "documents", lambda: [path])
    command.write_tables()
    text = path.read_text()
    assert tables(text)["bf16"] == TABLES["bf16"]()
    assert text.startswith("before\n")
    assert text.endswith("-->\nafter\n")


@pytest.mark.parametrize(
    ("markdown", "found"),
    [
        ("It gains 2.7 ± 1.0 points.", ["2.7 ± 1.0"]),
        ("It takes 12 % longer, x 1.02.", ["12 %", "x 1.02"]),
        ("It takes 3 hours and 0.5 ms.", ["3 hours", "0.5 ms"]),
        ("| arm | 54.7 |", ["54.7"]),
        ("It gains 2.7\npoints (p = 0.004).", ["2.7 points", "p = 0.004"]),
        ("| 2.7 |\n| points |", ["2.7"]),
        ("text\n\n| lam 0.1 | 54.7 |\n|---|---|\n\n| 1.5 |\n", ["0.1", "54.7", "1.5"]),
        ("It ends at 96.95 %, and 95 % of it is so.", ["96.95 %", "95 %"]),
        ("With lam 0.1 and torch 2.15.0, 95 % intervals.", []),
        ("`54 %` and\n```\n54 %\n```\n[text](https://a.b/54%20ms)", []),
        ("<!-- 54 % --> and <!-- stored: bf16 -->\n", []),
    ],
)
def test_what_looks_measured(markdown, found):
    assert [figure.text for figure in uncovered(markdown, [])] == found


def test_a_sentence_covers_its_figures_however_its_lines_break():
    text = "TrAct gains +2.7 ±\n  1.0 points, and 5 % more."
    assert contains(text, "gains +2.7 ± 1.0 points")
    assert [figure.text for figure in uncovered(text, ["gains +2.7 ± 1.0 points"])] == ["5 %"]
    assert uncovered(text, ["gains +2.7 ± 1.0 points"])[0].line == 2


def test_a_longer_number_is_another_number():
    assert not contains("it gains 12.7 % here", "2.7 % here")
    assert not contains("it gains 2.75", "gains 2.7")
    assert contains("it gains 2.7.", "gains 2.7")


def test_every_figure_that_is_computed_is_said():
    said = "".join(sentence for sentences in SENTENCES.values() for sentence in sentences)
    assert {name for name in figures() if f"{{{name}}}" not in said} == set()


def test_the_lists_name_documents_that_exist():
    for name in (*SENTENCES, *UNCHECKED, *claims()):
        assert (ROOT / name).exists(), name
