"""Reads the documents of the repository, and runs the code in them."""

import contextlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer

from helpers.models import Images, small_vit, trainer

ROOT = Path(__file__).parents[2]
REPOSITORY = "https://github.com/hf-tract/hf-tract"
IMAGES = "https://raw.githubusercontent.com/hf-tract/hf-tract/main/"


class Logits(nn.Module):
    """Runs a model of transformers, whose parts keep their names, and returns a tensor as most models do."""

    def __init__(self) -> None:
        super().__init__()
        model = small_vit()
        self.vit = model.vit
        self.classifier = model.classifier

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.vit(pixels).last_hidden_state[:, 0])


def snippets_of(document: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)


def commands_of(document: Path) -> list[str]:
    """Returns the lines of the shell blocks, those that end in a backslash joined with the next."""
    blocks = re.findall(r"```bash\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
    return "".join(blocks).replace("\\\n", "").splitlines()


def links_into_the_repository(document: Path) -> list[str]:
    """Returns the files that the document's absolute links and images name, without anchors."""
    text = document.read_text(encoding="utf-8")
    pages = re.findall(rf"\({REPOSITORY}/(?:blob|tree)/main/([^)#]+)", text)
    return pages + re.findall(rf"\({re.escape(IMAGES)}([^)#]+)", text)


def run_snippets(document: Path, folder: Path) -> dict[str, Any]:
    """Runs the document's Python in `folder`, with a model, data and so on in the place of the reader's.

    A snippet that speaks of a Trainer gets a model of transformers, any other one a model that returns a tensor.
    """
    images = Images()
    with contextlib.chdir(folder):
        names: dict[str, Any] = {}
        for snippet in snippets_of(document):
            model = small_vit() if "Trainer" in snippet else Logits()
            names |= {
                "Trainer": Trainer,
                "args": trainer(folder, model).args,
                "criterion": nn.functional.cross_entropy,
                "data": images,
                "loader": DataLoader(TensorDataset(images.pixels, images.labels), batch_size=16),
                "model": model,
                "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
            }
            exec(snippet, names)
    return names
