"""Works with: Lightning, whose automatic and manual accumulation take the step of one large batch."""

import copy
import logging

import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from helpers.models import Images, small_vit, weights
from helpers.oracle import assert_close
from hf_tract import apply_tract

pytestmark = [
    pytest.mark.filterwarnings(
        f"ignore:{message}"
    )  # Lightning's advice on workers, and what it calls that is deprecated
    for message in (".*:UserWarning:lightning", ":DeprecationWarning:lightning", "`isinstance:FutureWarning")
]


class Automatic(lightning.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch, index):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)


class Manual(Automatic):
    def __init__(self, model: nn.Module, micros: int) -> None:
        super().__init__(model)
        self.automatic_optimization, self.micros = False, micros

    def training_step(self, batch, index):
        self.manual_backward(self.model(**batch).loss / self.micros)
        if (index + 1) % self.micros == 0:
            self.optimizers().step()
            self.optimizers().zero_grad()


def train(kind: str, micros: int, folder) -> torch.Tensor:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    model = small_vit()
    apply_tract(model, lam=0.1)
    module = Automatic(model) if kind == "automatic" else Manual(model, micros)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        accumulate_grad_batches=micros if kind == "automatic" else 1,
    )
    trainer.fit(module, DataLoader(Images(), 64 // micros))
    return weights(model)


@pytest.mark.parametrize("kind", ["automatic", "manual"])
def test_accumulation_is_one_large_batch(kind, tmp_path):
    start = copy.deepcopy(weights(small_vit()))
    whole, parts = train(kind, 1, tmp_path), train(kind, 4, tmp_path)
    assert_close(parts, whole, 1e-5)
    assert (whole - start).norm() > 1e-3 * start.norm()
