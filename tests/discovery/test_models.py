"""The search on one model of each kind; and docs/models.md is what `python -m benchmarks.survey` finds today.

A new release of transformers or timm changes the table, so what compares with it runs on a schedule
(.github/workflows) and by `pytest -m survey`, and not with the other tests.
"""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.survey import look, table
from benchmarks.survey.check import differences, met_first, reference
from benchmarks.survey.models import subjects
from hf_tract import apply_tract


def models_in(markdown):
    """Return the lines of models, without the heads of their tables."""
    return [line for line in markdown.splitlines() if re.match(r"\| (?!---)", line) and not line.endswith(" status |")]


TABLE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
LINES = {tuple(line[2:].split(" | ")[:2]): line for line in models_in(TABLE)}  # family, name
STALE = f"docs/models.md is stale: run `{table.COMMAND}`"
ALL = {subject.name: subject for subject in subjects()}
# One of each kind: patches, windows, weight standardisation, flat patches, clips, rows with a grid, two stems and a
# skip connection of pixels, spectrograms, a backbone of timm's, tokens, forwards that look at values.
SAMPLE = [
    "ViTForImageClassification",
    "ResNetForImageClassification",
    "BitForImageClassification",
    "Siglip2ForImageClassification",
    "VideoMAEModel",
    "Qwen2VisionTransformerPretrainedModel",
    "VitMatteForImageMatting",
    "ASTForAudioClassification",
    "DetrModel",
    "ImageGPTForImageClassification",
    "PerceiverForImageClassificationFourier",
    "crossvit_tiny_240",
    "mobilenetv3_small_050",
]


@pytest.mark.parametrize("name", SAMPLE)
def test_a_model_of_each_kind_has_the_right_layer_and_gradient(name):
    status = look.look(ALL[name])["status"]
    assert status.startswith("refused: `model`" if "ImageGPT" in name else look.WORKS)


@pytest.mark.survey
def test_the_table_has_every_model_of_these_versions():
    assert all(f"{name} {number}" in TABLE for name, number in table.versions().items() if name != "torch"), STALE
    listed = [line.split(" | ")[1] for line in models_in(TABLE)]
    assert set(ALL) <= set(listed), STALE


@pytest.mark.survey
def test_every_line_of_the_table_is_true(tmp_path):
    found = table.rows(list(ALL.values()), tmp_path / "survey.jsonl", workers=2)
    lines = [f"| {' | '.join(table.cells_of(row))} |" for row in found]
    assert lines == [LINES[row["family"], row["name"]] for row in found], STALE


def test_at_least_95_percent_work_and_the_others_say_why():
    for library in table.LIBRARIES:
        good, count = map(int, re.search(rf"## {library}: (\d+) of (\d+) work", TABLE).groups())
        assert good >= 0.95 * count
        section = re.search(rf"## {library}: .*?(?=\n## |\Z)", TABLE, re.DOTALL).group()
        lines = models_in(section)
        assert len(lines) == count
        assert sum(" | ok" in line for line in lines) == good
    for line in LINES.values():
        assert line.endswith(" ok |") or re.search(r" (ok; |refused: |not built: |not run: |no gradient )", line)


class Net(nn.Module):
    """Pixels meet `first`, then `second`; `beside` reads what is no pixel."""

    def __init__(self):
        super().__init__()
        self.second, self.first, self.beside = nn.Linear(8, 4), nn.Linear(6, 8), nn.Linear(2, 4)

    def forward(self, x):
        return self.second(self.first(x).relu()) + self.beside(x.new_ones(2))


def test_the_check_finds_what_the_pixels_meet_first():
    assert met_first(Net(), torch.rand(5, 6), None) == ["first"]


def test_the_check_fails_where_something_is_wrong():
    model, x = Net(), torch.rand(5, 6)
    want = reference(model, x, ["first"], lam=0.1)
    with apply_tract(model, lam=0.1, layers="first"):
        assert differences(model, x, want) == []
    assert differences(model, x, want)[0].startswith("first.weight: relative error")
    with apply_tract(model, lam=0.11, layers="first"):
        assert differences(model, x, want)[0].startswith("first.weight: relative error")
    with apply_tract(model, lam=0.1, layers=["first", "second"]):
        assert differences(model, x, want) == ["second.weight: another gradient"]
    model.beside.bias.data += 1
    with apply_tract(model, lam=0.1, layers="first"):
        assert differences(model, x, want)[0] == "output 0 differs"
