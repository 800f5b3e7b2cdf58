"""Works with: Lightning, whose accumulation takes the step of one large batch, and the callback for its Trainer."""

import copy
import csv
import importlib
import logging
import sys
from types import SimpleNamespace

import lightning
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from helpers.models import Images, small_vit, weights
from helpers.oracle import assert_close
from helpers.ranks import on_two_ranks
from hf_tract import TrActError, apply_tract
from hf_tract.core.attach import TrActLayer
from hf_tract.integrations.lightning_callback import TrActLightningCallback

pytestmark = [
    pytest.mark.filterwarnings(
        f"ignore:{message}"
    )  # Lightning's advice on workers, and what it calls that is deprecated
    for message in (".*:UserWarning:lightning", ":DeprecationWarning:lightning", "`isinstance:FutureWarning")
]
SETTINGS = {
    "accelerator": "cpu",
    "max_epochs": 3,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
FIGURES = ["tract/grad_norm_raw", "tract/grad_norm", "tract/condition", "tract/mean_eigenvalue"]


class Automatic(lightning.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values)

    def training_step(self, batch, index):
        loss = self.model(**batch).loss
        self.log("loss", loss)
        return loss

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


class KilledError(Exception):
    pass


class KilledInThirdEpoch(Automatic):
    def on_train_epoch_start(self):
        if self.current_epoch == 2:
            raise KilledError


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def fit(module: Automatic, batch_size: int = 16, ckpt_path=None, **settings) -> torch.Tensor:
    trainer = lightning.Trainer(**{**SETTINGS, **settings})
    sampler = None
    if trainer.world_size > 1:  # Lightning's own sampler shuffles
        sampler = DistributedSampler(Images(), trainer.world_size, trainer.global_rank, shuffle=False)
    trainer.fit(module, DataLoader(Images(), batch_size, sampler=sampler), ckpt_path=ckpt_path)
    return weights(module.model)


def train(kind: str, micros: int) -> torch.Tensor:
    model = small_vit()
    apply_tract(model, lam=0.1)
    if kind == "manual":
        return fit(Manual(model, micros), 64 // micros)
    return fit(Automatic(model), 64 // micros, accumulate_grad_batches=micros)


@pytest.mark.parametrize("kind", ["automatic", "manual"])
def test_accumulation_is_one_large_batch(kind):
    start = copy.deepcopy(weights(small_vit()))
    whole, parts = train(kind, 1), train(kind, 4)
    assert_close(parts, whole, 1e-5)
    assert (whole - start).norm() > 1e-3 * start.norm()


@pytest.mark.parametrize("micros", [1, 4])
def test_the_callback_trains_as_apply_tract_does_and_is_off_afterwards(micros):
    module = Automatic(small_vit())
    callback = TrActLightningCallback(lam=0.1)
    got = fit(module, 64 // micros, accumulate_grad_batches=micros, callbacks=[callback])
    assert_close(got, train("automatic", 1), 1e-5)
    assert not any(isinstance(layer, TrActLayer) for layer in module.modules())


@pytest.mark.parametrize("micros", [1, 2])
def test_the_loggers_get_the_figures_of_the_steps_that_lightning_logs(micros, tmp_path):
    written = CSVLogger(tmp_path)
    settings = {"log_every_n_steps": 2, "accumulate_grad_batches": micros}
    fit(Automatic(small_vit()), logger=written, callbacks=[TrActLightningCallback()], **settings)
    with open(f"{written.log_dir}/metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 12 // micros, 2))
    assert all(float(row[name]) > 0 for row in rows for name in [*FIGURES, "loss"])
    assert len({row["tract/grad_norm"] for row in rows}) == len(rows)


def test_the_callback_resumes_with_the_same_weights(tmp_path):
    whole = fit(Automatic(small_vit()), callbacks=[TrActLightningCallback()])
    stopped = lightning.Trainer(**{**SETTINGS, "max_epochs": 2}, callbacks=[TrActLightningCallback()])
    stopped.fit(Automatic(small_vit()), DataLoader(Images(), 16))
    stopped.save_checkpoint(tmp_path / "last.ckpt")
    callbacks = [TrActLightningCallback()]
    assert torch.equal(fit(Automatic(small_vit(1)), ckpt_path=tmp_path / "last.ckpt", callbacks=callbacks), whole)


def test_the_callback_removes_tract_after_an_exception():
    module = KilledInThirdEpoch(small_vit())
    seen = []
    module.on_train_batch_start = lambda *args: seen.append(isinstance(find_stem(module), TrActLayer))
    with pytest.raises(KilledError):
        fit(module, callbacks=[TrActLightningCallback()])
    assert seen == [True] * 8
    assert not isinstance(find_stem(module), TrActLayer)


def find_stem(module: Automatic) -> nn.Module:
    return module.model.get_submodule("vit.embeddings.patch_embeddings.projection")


@pytest.mark.parametrize("name", ["DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy"])
def test_the_callback_refuses_accumulation_under_a_strategy_that_hides_where_a_step_begins(name):
    strategy = type(name, (), {})()
    accumulating = SimpleNamespace(strategy=strategy, accumulate_grad_batches=4)
    with pytest.raises(TrActError, match=rf"`accumulate_grad_batches` \(=4\) must be 1 under {name}"):
        TrActLightningCallback().on_fit_start(accumulating, Automatic(small_vit()))
    plain = SimpleNamespace(strategy=strategy, accumulate_grad_batches=1)
    for callback, trainer in (
        (TrActLightningCallback(scope="local"), accumulating),
        (TrActLightningCallback(), plain),
    ):
        module = Automatic(small_vit())
        callback.on_fit_start(trainer, module)
        assert find_stem(module)._tract_preconditioner.config.scope == callback.config.scope


def ranks_job(rank: int, name: str) -> torch.Tensor:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    accumulated = {"one batch": 1, "accumulated": 2}[name]
    settings = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
    settings |= {"accumulate_grad_batches": accumulated, "callbacks": [TrActLightningCallback()]}
    return fit(Automatic(small_vit()), 16 // accumulated, **settings)


@pytest.mark.parametrize("name", ["one batch", "accumulated"])
def test_two_processes_give_the_update_of_one(name, two_ranks):
    first, second = (results[name] for results in two_ranks)
    assert torch.equal(first, second)
    assert_close(first, fit(Automatic(small_vit()), 32, callbacks=[TrActLightningCallback()]), 1e-5)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return on_two_ranks(tmp_path_factory.mktemp("lightning"), ranks_job, ["one batch", "accumulated"])


def test_without_lightning_the_error_has_the_line_that_installs_it(monkeypatch):
    name = "hf_tract.integrations.lightning_callback"
    monkeypatch.delitem(sys.modules, name)
    for missing in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match="needs Lightning: `pip install lightning`"):
        importlib.import_module(name)


def test_a_search_that_runs_before_tract_is_told(caplog):
    callback = TrActLightningCallback()
    callback.setup(lightning.Trainer(callbacks=[callback], logger=False), None, "fit")
    assert caplog.text == ""
    finder = lightning.pytorch.callbacks.LearningRateFinder()
    callback.setup(lightning.Trainer(callbacks=[callback, finder], logger=False), None, "fit")
    assert "TrAct: LearningRateFinder runs before TrAct is on" in caplog.text
