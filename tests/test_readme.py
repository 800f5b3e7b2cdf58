"""The README tells the truth: its code runs, its test files and commands exist."""

import contextlib
import re
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer

import hf_tract
from helpers.models import STEM, Images, small_vit, trainer
from hf_tract.whitening.fresh import were_whitened

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_its_code_runs(tmp_path):
    model = small_vit()
    names = {"model": model, "args": trainer(tmp_path, model).args, "data": Images(), "Trainer": Trainer}
    data = [(x["pixel_values"][None], x["labels"][None]) for x in [Images()[index] for index in range(4)]]
    names |= {"micro_batches": data, "criterion": lambda out, labels: nn.functional.cross_entropy(out.logits, labels)}
    names |= {"train_loader": DataLoader([(pixels[0], labels[0]) for pixels, labels in data], batch_size=2)}
    names |= {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "contextlib": contextlib}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(block, names)
    assert were_whitened(model, [model.get_submodule(STEM)])
    names["trainer"].train()
    assert [layer.name for layer in names["handle"].layers] == [STEM]


def test_each_works_with_line_names_a_test_file():
    table = README.split("## Works with")[1].split("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ") and "tested in" not in line]
    assert len(lines) >= 9
    for line in lines:
        (file,) = re.findall(r"\| `(tests/\w+/\w+\.py)` \|$", line)
        assert (ROOT / file).exists()


def test_its_files_exist():
    for path in [
        *re.findall(r"\]\(((?!http)[^)#]+)\)", README),
        *re.findall(r"(?<!/)\b(?:examples|docs)/[\w./-]+\w", README),
    ]:
        assert (ROOT / path).exists(), path


def test_every_public_name_is_there_and_documented():
    for name in hf_tract.__all__:
        assert getattr(hf_tract, name).__doc__
