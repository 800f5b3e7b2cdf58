"""TrAct's figures in the trackers that Trainer reports to, without any setting."""

import sys
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from transformers.integrations import TensorBoardCallback

from helpers.models import trainer
from hf_tract import TrActCallback, apply_tract
from hf_tract.integrations import trackers
from hf_tract.integrations.trackers import Trackers, stats_to_log

FIGURES = ("grad_norm_raw", "grad_norm", "condition", "mean_eigenvalue")


def scalars(folder) -> dict[str, list[int]]:
    """Returns the steps of each figure in the one run of TensorBoard below `folder`."""
    (run,) = {file.parent for file in folder.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(run)).Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("variable", [True, False], ids=["TENSORBOARD_LOGGING_DIR", "the usual folder"])
def test_tensorboard_has_them_in_the_run_of_trainer(tmp_path, monkeypatch, variable):
    if variable:
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "boards"))
    trainer(tmp_path, callbacks=[TrActCallback()], report_to="tensorboard").train()
    found = scalars(tmp_path)
    assert found["train/loss"] == [2, 4]
    for name in FIGURES:
        assert found[f"train/tract/{name}"] == found["train/loss"]


def test_tensorboardx_writes_them_where_there_is_no_tensorboard(tmp_path, monkeypatch):
    opened = []
    (tmp_path / "events.out.tfevents.1").touch()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    writer = SimpleNamespace(SummaryWriter=lambda folder, filename_suffix: opened.append(folder))
    monkeypatch.setitem(sys.modules, "tensorboardX", writer)
    Trackers(SimpleNamespace(report_to=["tensorboard"], output_dir=str(tmp_path)))
    assert opened == [str(tmp_path)]


def test_a_tracker_that_is_named_behind_the_callback_has_them_once(tmp_path):
    trainer(tmp_path, callbacks=[TrActCallback(), TensorBoardCallback()], report_to="none").train()
    assert scalars(tmp_path)["train/tract/condition"] == [2, 4]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_have_them(tmp_path, monkeypatch, name):
    logged = []
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(log=logged.append, run=object()))
    writer = Trackers(SimpleNamespace(report_to=[name], output_dir=str(tmp_path)))
    writer.write({"tract/condition": 2.0}, 10)
    writer.close()
    assert logged == [{"train/tract/condition": 2.0, "train/global_step": 10}]


@pytest.mark.parametrize(("word", "told"), [("none", False), ("mlflow", True), (None, False)])
def test_what_set_logging_leaves_is_one_word(tmp_path, caplog, word, told):
    Trackers(SimpleNamespace(report_to=word, output_dir=str(tmp_path)))
    assert ("not in mlflow" in caplog.text) == told
    assert ("TrAct" in caplog.text) == told


def test_the_word_all_is_every_tracker_that_is_installed(tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(trackers, "get_available_reporting_integrations", lambda: ["wandb"])
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(log=logged.append, run=object()))
    Trackers(SimpleNamespace(report_to="all", output_dir=str(tmp_path))).write({"tract/condition": 2.0}, 10)
    assert len(logged) == 1


def test_figures_keep_their_names_where_a_layer_has_not_run_yet():
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})
    handle = apply_tract(model, layers=["a", "b"])
    model["a"](torch.randn(4, 3)).sum().backward()
    assert set(stats_to_log(handle)) == {f"tract/a/{name}" for name in FIGURES}
    model["b"](torch.randn(4, 3)).sum().backward()
    assert len(stats_to_log(handle)) == 2 * len(FIGURES)


def test_a_run_that_wandb_has_not_begun_gets_nothing(tmp_path, monkeypatch):
    logged = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(log=logged.append, run=None))
    Trackers(SimpleNamespace(report_to=["wandb"], output_dir=str(tmp_path))).write({"tract/condition": 2.0}, 10)
    assert not logged


def test_other_trackers_are_named_with_the_way_to_have_them_there(tmp_path, caplog):
    Trackers(SimpleNamespace(report_to=["mlflow"], output_dir=str(tmp_path)))
    assert "not in mlflow" in caplog.text
    assert 'report_to="none"' in caplog.text
