"""Works with: transformers' Trainer, by one line, through every way in which training begins and ends."""

import copy
import json
import logging
import pickle
import subprocess
import sys

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from helpers.models import STEM, Images, Watch, has_tract, small_convnext, small_vit, stem_of, trainer, weights
from helpers.oracle import assert_close, expected, says
from hf_tract import TrActCallback, TrActConfig, TrActError, TrActTrainerCallback, apply_tract
from hf_tract.discovery import first_layer
from hf_tract.integrations import trainer_callback

SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


def test_one_line_trains_the_first_layer_by_tract(tmp_path):
    """One SGD step of Trainer is the dense formula's, and every other weight moves as without TrAct."""
    plain = small_vit()
    runs = {}
    for name, callbacks in {"vanilla": [], "tract": [TrActCallback(lam=0.1)]}.items():
        run = trainer(tmp_path, copy.deepcopy(plain), callbacks, max_steps=1, per_device_train_batch_size=64, **SGD)
        run.train()
        runs[name] = {key: (value - plain.state_dict()[key]) / -1e-2 for key, value in run.model.state_dict().items()}
    stem = f"{STEM}.weight"
    assert_close(runs["tract"][stem], expected(runs["vanilla"][stem], Images().pixels, stem_of(plain), 0.1), 1e-3)
    assert [key for key in runs["tract"] if not torch.equal(runs["tract"][key], runs["vanilla"][key])] == [stem]


def test_both_names_are_one_class_without_training_state():
    assert TrActTrainerCallback is TrActCallback
    assert not issubclass(TrActCallback, ExportableState)


@pytest.mark.parametrize("scope", ["local", "global"])
def test_the_scope_reaches_the_layer(tmp_path, scope):
    seen = set()

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.add(stem_of(model)._tract_preconditioner.config.scope)

    trainer(tmp_path, callbacks=[TrActCallback(scope=scope), Look()], max_steps=1).train()
    assert seen == {scope}


def test_it_is_on_in_training_and_off_after_it(tmp_path):
    watch, callback = Watch(), TrActCallback()
    run = trainer(tmp_path, callbacks=[callback, watch])
    assert not has_tract(run.model)
    for epochs in (1, 2):
        run.train()
        assert watch.had_tract == [True] * 4 * epochs
        assert not has_tract(run.model)


def test_load_best_model_at_end_leaves_no_tract(tmp_path):
    run = trainer(
        tmp_path,
        callbacks=[TrActCallback()],
        num_train_epochs=2,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
    )
    run.train()
    assert not has_tract(run.model)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_after_an_exception_a_second_train_has_tract_again(tmp_path, error):
    run = trainer(tmp_path, callbacks=[TrActCallback(), watch := Watch(raise_at=2, error=error)])
    with pytest.raises(error):
        run.train()
    run.train()
    assert watch.had_tract == [True] * 6
    assert not has_tract(run.model)


def test_an_interrupt_in_an_accumulation_leaves_nothing_behind(tmp_path):
    """The second train() is that of a Trainer that was never interrupted."""

    class Interrupt(TrainerCallback):
        done = False

        def on_substep_end(self, args, state, control, **kwargs):
            if not self.done:
                self.done = True
                raise KeyboardInterrupt

    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    run = trainer(tmp_path, small_vit(), [TrActCallback(), Interrupt()], **settings)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.model.zero_grad()
    run.train()
    other = trainer(tmp_path, small_vit(), [TrActCallback()], **settings)
    other.train()
    assert torch.equal(weights(run.model), weights(other.model))


def test_auto_find_batch_size_begins_again_with_tract(tmp_path):
    """Training begins a second time on the model that still has TrAct: once is enough."""
    watch = Watch(raise_at=1, error=RuntimeError)
    run = trainer(tmp_path, callbacks=[TrActCallback(), watch], auto_find_batch_size=True)
    run.train()
    assert run._train_batch_size < 16
    assert all(watch.had_tract)
    assert not has_tract(run.model)


def test_hyperparameter_search_trains_each_trial_with_tract(tmp_path):
    callback, watch = TrActCallback(), Watch()
    settings = {"save_strategy": "epoch", "eval_strategy": "epoch"}
    run = trainer(tmp_path, model_init=lambda: small_vit(), callbacks=[callback, watch], **settings)
    run.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("lr", 1e-3, 1e-2)}, n_trials=2, backend="optuna"
    )
    assert watch.had_tract == [True] * 8
    assert not has_tract(watch.model)
    assert len(list(tmp_path.glob("run-*/checkpoint-4/tract_config.json"))) == 2


def test_figures_are_in_the_logs_at_logging_steps_alone(tmp_path, monkeypatch):
    computed = []
    original = apply_tract(small_vit()).layers[0].module._tract_preconditioner.__class__
    stats = original.stats
    monkeypatch.setattr(original, "stats", lambda self: computed.append(1) or stats(self))
    run = trainer(tmp_path, callbacks=[TrActCallback()])
    run.train()
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    assert len(computed) == 2
    for entry in logged:
        assert entry["tract/grad_norm_raw"] > 0
        assert entry["tract/grad_norm"] > 0
        assert entry["tract/condition"] > 1
    assert not any("tract" in key for key in run.state.log_history[-1])  # train_runtime's


def test_which_layer_it_took_is_shown_once(tmp_path, capsys, caplog):
    """In one line, beside Trainer's own logs, whatever the logging level."""
    with caplog.at_level(logging.INFO, "hf_tract"):
        trainer(tmp_path, callbacks=[TrActCallback(lam=0.2)]).train()
    line = f"TrAct(lam=0.2, scope='global') {STEM}: Conv2d, n=48 (reached first by the pixels)"
    assert capsys.readouterr().out.count(line) == 1
    assert [r.getMessage() for r in caplog.records if r.name.startswith("hf_tract")] == [line]


def test_one_callback_serves_two_trainers_one_inside_the_other(tmp_path):
    callback, had_tract = TrActCallback(), []

    class Probe(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            trainer(tmp_path / "inner", small_vit(3), [callback]).train()

        def on_step_end(self, args, state, control, model=None, **kwargs):
            had_tract.append(has_tract(model))

    trainer(tmp_path / "outer", small_vit(), [callback, Probe()], eval_strategy="steps", eval_steps=2).train()
    assert had_tract == [True] * 4


def test_layers_of_a_model_that_is_to_be_sharded_are_found_before(tmp_path, caplog, monkeypatch):
    """accelerate shards on GPUs alone, so this only says that it does."""
    monkeypatch.setattr(trainer_callback, "SHARDING", (DistributedType.NO,))
    callback = TrActCallback()
    run = trainer(tmp_path, callbacks=[callback])
    monkeypatch.setattr(first_layer, "is_sharded", lambda model: True)
    run.train()
    (layer,) = callback.handle_of(run.model).layers
    assert (layer.name, layer.source) == (STEM, "named by the user")
    assert caplog.messages == []
    run.model = small_vit()
    callback.on_train_begin(run.args, run.state, run.control, model=run.model)
    assert "no trial run of the model met one of its layers" in caplog.text


def test_a_model_without_a_first_layer_trains_on_with_a_warning(tmp_path, caplog):
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))
            self.norm = nn.LayerNorm(4)

        def forward(self, pixel_values, labels):
            logits = self.norm(pixel_values[:, 0, 0, :4] * self.scale)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    trainer(tmp_path, Bag(), [TrActCallback()]).train()
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("hf_tract")]
    assert message.startswith("TrAct is off: `model` (=Bag) has no convolution or linear layer")
    assert "it has LayerNorm" in message


def test_a_frozen_first_layer_trains_on_with_a_warning(tmp_path, caplog):
    model = small_vit()
    stem_of(model).requires_grad_(False)
    trainer(tmp_path, model, [TrActCallback()]).train()
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("hf_tract")]
    assert f"the first layer ({STEM}) is frozen, so TrAct does nothing" in message


def test_a_wrong_name_stops_before_training(tmp_path):
    run = trainer(tmp_path, callbacks=[TrActCallback(layers="vit.embeddings.projection")])
    with pytest.raises(TrActError, match=says("`layers` (='vit.embeddings.projection') matches no", STEM)):
        run.train()
    assert not has_tract(run.model)


def test_a_wrong_setting_stops_before_the_trainer():
    with pytest.raises(TrActError, match=says("`lam` (=0)")):
        TrActCallback(lam=0)


def files_of(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_checkpoints_are_ordinary_but_for_the_settings(tmp_path):
    """A checkpoint loads without hf-tract: files, names and class are those of vanilla, with the settings beside."""
    for name, callbacks in {"vanilla": [], "tract": [TrActCallback(lam=0.25)]}.items():
        trainer(tmp_path / name, callbacks=callbacks, save_strategy="epoch").train()
    vanilla, tract = (files_of(tmp_path / name / "checkpoint-4") for name in ("vanilla", "tract"))
    assert set(tract) - set(vanilla) == {"tract_config.json"}
    assert tract["config.json"] == vanilla["config.json"]
    header = slice(8, 8 + int.from_bytes(vanilla["model.safetensors"][:8], "little"))  # names, shapes and dtypes
    assert tract["model.safetensors"][header] == vanilla["model.safetensors"][header]
    assert TrActConfig.from_json_file(tmp_path / "tract/checkpoint-4/tract_config.json") == TrActConfig(lam=0.25)
    code = (
        "import sys; sys.modules['hf_tract'] = None\n"
        "from transformers import AutoModelForImageClassification\n"
        f"model = AutoModelForImageClassification.from_pretrained({str(tmp_path / 'tract/checkpoint-4')!r})\n"
        f"assert type(model.get_submodule({STEM!r})).__name__ == 'Conv2d'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "make, accumulation",
    [
        (small_convnext, 1),
        (small_convnext, 2),
        (small_vit, 1),
        (small_vit, 2),
    ],
)
def test_stop_and_resume_is_bit_exact(tmp_path, make, accumulation):
    stop_at = 8 // accumulation

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == stop_at

    settings = {"num_train_epochs": 4, "save_strategy": "epoch", "gradient_accumulation_steps": accumulation}
    whole = trainer(tmp_path / "whole", make(), callbacks=[TrActCallback()], **settings)
    whole.train()
    half = trainer(tmp_path / "half", make(), callbacks=[TrActCallback(), Stop()], **settings)
    half.train()
    assert not torch.equal(weights(whole.model), weights(half.model))
    checkpoint = tmp_path / f"half/checkpoint-{stop_at}"
    # transformers 5.23 saves a ViT under other names than Trainer loads: docs/troubleshooting.md
    model = make(seed=7) if make is small_convnext else type(make()).from_pretrained(checkpoint)
    rest = trainer(tmp_path / "half", model, callbacks=[TrActCallback()], **settings)
    rest.train(resume_from_checkpoint=str(checkpoint))
    assert rest.state.global_step == whole.state.global_step
    assert torch.equal(weights(whole.model), weights(rest.model))


@pytest.mark.parametrize("lam", [0.1, 0.2, None])
def test_a_run_resumed_under_other_settings_says_so(tmp_path, caplog, lam):
    first = [] if lam is None else [TrActCallback(lam=lam)]
    trainer(tmp_path, callbacks=first, save_strategy="epoch").train()
    rest = trainer(tmp_path / "elsewhere", callbacks=[TrActCallback(lam=0.1)], num_train_epochs=2)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("hf_tract")]
    if lam == 0.1:
        assert messages == []
        return
    (message,) = messages
    then = "no TrAct" if lam is None else TrActConfig(lam=0.2).to_dict()
    now = TrActConfig(lam=0.1).to_dict()
    advice = "To go on as before, give `TrActCallback` those of then."
    settings = f"{then} then, {now} now"
    assert message == f"TrAct: this run resumes from step 4 of a run with other settings: {settings}. {advice}"


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("flag", [None, False, True])
def test_unused_parameters_are_told_where_a_user_sets_them(tmp_path, caplog, monkeypatch, flag, processes):
    run = trainer(tmp_path, ddp_find_unused_parameters=flag)
    monkeypatch.setattr(type(run.args), "world_size", processes)
    TrActCallback().on_train_begin(run.args, run.state, run.control, model=run.model)
    assert ("`find_unused_parameters=True`" in caplog.text) == (flag is True and processes > 1)


def test_a_callback_is_pickled_without_what_it_has_of_this_process(tmp_path):
    callback = TrActCallback(lam=0.3, whiten_init=True)
    run = trainer(tmp_path, callbacks=[callback])
    run.train()
    copied = pickle.loads(pickle.dumps(callback))
    assert (copied.config, copied.layers, copied.whiten_init) == (callback.config, "auto", True)
    assert copied.handle_of(run.model) is None
    again = trainer(tmp_path, callbacks=[copied])
    again.train()
    assert copied.handle_of(again.model) is not None


def test_accumulation_is_one_large_batch(tmp_path):
    """4 x 16 accumulated and 1 x 64: the same weights, to float32 rounding."""
    models = []
    for batch, accumulate in ((64, 1), (16, 4)):
        settings = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulate,
            "num_train_epochs": 5,
        }
        run = trainer(tmp_path, small_vit(), [TrActCallback()], **settings, **SGD)
        run.train()
        assert run.state.global_step == 5
        models.append(run.model)
    start = weights(small_vit())
    assert_close(weights(models[1]) - start, weights(models[0]) - start, 1e-5)


NEW_NAME = (
    "activation_checkpointing" in TrainingArguments.__dataclass_fields__
)  # gradient_checkpointing in older versions
CHECKPOINTING = "activation_checkpointing" if NEW_NAME else "gradient_checkpointing"


@pytest.mark.parametrize("settings", [{"bf16": True}, {CHECKPOINTING: True}, {"torch_compile": True}], ids=str)
def test_modes_of_trainer_train_on_with_the_same_gradient(tmp_path, settings):
    """Without TrAct the same mode gives the ordinary gradient; TrAct's is the formula's for that one."""
    steps, plain, bf16 = {}, small_vit(), "bf16" in settings
    for name, callbacks in {"vanilla": [], "tract": [TrActCallback()]}.items():
        mode = {} if bf16 and name == "vanilla" else settings  # the 16-bit gradient is compared with float32's
        run = trainer(
            tmp_path, copy.deepcopy(plain), callbacks, max_steps=1, per_device_train_batch_size=64, **SGD, **mode
        )
        run.train()
        steps[name] = (stem_of(run.model).weight - stem_of(plain).weight).detach() / -1e-2
    # The step is read off float32 weights: their rounding is the tolerance.
    wanted = expected(steps["vanilla"], Images().pixels, stem_of(plain), 0.1)
    assert_close(steps["tract"], wanted, 2e-2 if bf16 else 2e-3)


def test_settings_are_json(tmp_path):
    trainer(tmp_path, callbacks=[TrActCallback(layers="*.projection")], save_strategy="epoch").train()
    saved = json.loads((tmp_path / "checkpoint-4/tract_config.json").read_text())
    assert saved == {"lam": 0.1, "layers": [STEM], "scope": "global"}
