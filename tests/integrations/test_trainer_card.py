"""What Trainer saves and pushes tells of TrAct: tags, settings, a card of its own."""

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import (
    TrainerCallback,
    TrainerState,
    ViTConfig,
    ViTForMaskedImageModeling,
    YolosConfig,
    YolosForObjectDetection,
)

from helpers.models import STEM, small_convnext, small_vit, trainer
from hf_tract import TrActCallback, TrActConfig, apply_tract
from hf_tract.core.attach import TrActLayer
from hf_tract.integrations import TrainingRecord, trainer_card, trainer_facts, use_model_card
from hf_tract.integrations.trainer_facts import base_model_of, history_of, task_of
from hf_tract.integrations.training_record import CONFIG_FILE, RECORD_FILE

BEST = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy"}
EVALUATED = {"eval_strategy": "epoch", "num_train_epochs": 2, "logging_strategy": "epoch"}


def right(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


class Scores:
    """Gives these accuracies one after the other, whatever is predicted."""

    def __init__(self, *scores: float) -> None:
        self.scores = iter(scores)

    def __call__(self, prediction):
        return {"accuracy": next(self.scores)}


class Holder(torch.nn.Module):
    """Holds a model of transformers, as a module of one's own does."""

    def __init__(self, inner) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixel_values, labels=None):
        return self.inner(pixel_values=pixel_values, labels=labels)


def test_trainers_own_card_has_the_tags_without_a_word_more(tmp_path):
    run = trainer(tmp_path, callbacks=[TrActCallback()])
    run.train()
    run.create_model_card(tags=list(run.model.model_tags))  # as push_to_hub does
    assert {"tract", "hf-tract"} <= set(ModelCard.load(tmp_path / "README.md").data.tags)


def test_use_model_card_lets_the_card_tell_of_tract(tmp_path):
    run = trainer(tmp_path, callbacks=[TrActCallback(lam=0.2)], seed=5, **EVALUATED)
    run.compute_metrics = right
    use_model_card(run, dataset="uoft-cs/cifar10", license="mit", split="validation")
    run.train()
    run.create_model_card(tags=["mine"])
    card = ModelCard.load(tmp_path / "README.md")
    assert {"tract", "hf-tract", "mine", "generated_from_trainer"} <= set(card.data.tags)
    assert (card.data.license, card.data.datasets) == ("mit", ["uoft-cs/cifar10"])
    assert "lam = 0.2" in card.text
    assert f"`{STEM}`" in card.text
    record = TrainingRecord.from_json_file(tmp_path / RECORD_FILE)
    logged = [entry for entry in run.state.log_history if "eval_loss" in entry]
    assert record.metrics == {"accuracy": logged[-1]["eval_accuracy"]}
    assert [row["eval_loss"] for row in record.history] == [entry["eval_loss"] for entry in logged]
    assert record.hyperparameters["per_device_train_batch_size"] == 16
    assert (record.seed, record.split, record.tract.lam) == (5, "validation", 0.2)
    assert card.data.eval_results[0].metric_value == pytest.approx(record.metrics["accuracy"], abs=1e-4)


def test_without_tract_the_card_says_so(tmp_path):
    run = trainer(tmp_path)
    use_model_card(run, dataset="noise")
    run.train()
    run.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert "without TrAct" in card.text
    assert "tract" not in card.data.tags


def test_a_frozen_first_layer_makes_no_tract_model(tmp_path):
    model = small_vit()
    model.get_submodule(STEM).requires_grad_(False)
    run = trainer(tmp_path, model, [TrActCallback()])
    use_model_card(run, dataset="noise")
    run.train()
    run.create_model_card()
    assert "tract" not in ModelCard.load(tmp_path / "README.md").data.tags
    assert not getattr(run.model, "model_tags", None)


def test_a_push_in_training_brings_card_and_settings(tmp_path):
    """Trainer calls `on_push_begin` before it uploads the folder, in which it writes no card before the end."""
    callback = TrActCallback(lam=0.3)
    run = trainer(tmp_path, callbacks=[callback], **EVALUATED)
    callback.on_push_begin(run.args, run.state, run.control, model=run.model)
    assert not (tmp_path / "README.md").exists()  # nothing was trained
    run.train()
    assert not (tmp_path / "README.md").exists()  # nor saved
    callback.on_push_begin(run.args, run.state, run.control, model=run.model)
    assert "lam = 0.3" in ModelCard.load(tmp_path / "README.md").text
    assert TrActConfig.from_json_file(tmp_path / CONFIG_FILE).lam == 0.3
    (tmp_path / "README.md").unlink()
    (tmp_path / CONFIG_FILE).unlink()
    callback.on_push_begin(run.args, TrainerState(is_world_process_zero=False), run.control, model=run.model)
    assert not (tmp_path / "README.md").exists()  # one process writes


def test_what_is_saved_has_card_and_settings_beside_it(tmp_path):
    run = trainer(tmp_path, callbacks=[TrActCallback(lam=0.3)], save_strategy="epoch", **EVALUATED)
    run.train()
    assert "lam = 0.3" in ModelCard.load(tmp_path / "README.md").text
    assert TrActConfig.from_json_file(tmp_path / CONFIG_FILE).lam == 0.3
    record = TrainingRecord.from_trainer(run)
    assert record == TrainingRecord.from_json_file(tmp_path / RECORD_FILE)
    assert (record.layers, record.dataset) == ([STEM], "a data set that its author did not name")


def test_a_card_that_cannot_be_written_ends_no_training(tmp_path, caplog):
    """The weights may not be saved yet. Windows' shells write UTF-16, and others lock files."""
    (tmp_path / "README.md").write_text("my notes", encoding="utf-16")
    run = trainer(tmp_path, callbacks=[TrActCallback()], save_strategy="epoch")
    run.train()
    assert (tmp_path / "README.md").read_text(encoding="utf-16") == "my notes"
    (tmp_path / RECORD_FILE).unlink()
    (tmp_path / RECORD_FILE).mkdir()
    run.train()
    assert "the model card could not be written: " in caplog.text


def test_of_the_best_weights_the_card_has_their_scores(tmp_path):
    # Only convnext: transformers does not load the best ViT whole (docs/troubleshooting.md).
    callback, settings = TrActCallback(), {**EVALUATED, **BEST, "num_train_epochs": 3, "save_strategy": "epoch"}
    run = trainer(tmp_path, small_convnext(), [callback], **settings)
    run.compute_metrics = Scores(0.9, 0.1, 0.2)
    run.train()
    (tmp_path / RECORD_FILE).unlink()
    callback.on_push_begin(run.args, run.state, run.control, model=run.model)  # as push_to_hub does
    for record in (TrainingRecord.from_json_file(tmp_path / RECORD_FILE), TrainingRecord.from_trainer(run)):
        assert record.metrics == {"accuracy": 0.9}
        assert [row["accuracy"] for row in record.history] == [0.9, 0.1, 0.2]
        assert record.split == "evaluation"


def test_if_the_best_weights_were_not_saved_the_card_has_the_scores_of_the_last(tmp_path):
    settings = {**BEST, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 4}
    run = trainer(tmp_path, small_convnext(), [TrActCallback()], max_steps=4, **settings)
    run.compute_metrics = Scores(0.9, 0.1)
    run.train()
    assert run.state.best_global_step == 2
    assert run.state.best_model_checkpoint is None
    assert TrainingRecord.from_json_file(tmp_path / RECORD_FILE).metrics == {"accuracy": 0.1}


def test_of_a_module_of_ones_own_the_card_claims_no_origin_and_the_state_dict_alone(tmp_path):
    small_vit().save_pretrained(tmp_path / "base")
    inner = type(small_vit()).from_pretrained(tmp_path / "base")
    run = trainer(tmp_path / "out", Holder(inner), [TrActCallback()], save_strategy="epoch")
    run.train()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    for claim in ("random weights", "fine-tuned", "from_pretrained", "pipeline("):
        assert claim not in card.text
    assert "A model, trained on a data set" in card.text
    assert "`load_state_dict` loads these weights" in card.text
    assert card.data.library_name == "pytorch"
    assert TrainingRecord.from_trainer(run, base_model="me/base").base_model == "me/base"


def test_weights_whose_origin_is_not_known_are_not_called_random(tmp_path):
    """They may have come by `load_state_dict`."""
    run = trainer(tmp_path, callbacks=[TrActCallback()], save_strategy="epoch")
    run.train()
    assert "An image classifier, trained on a data set" in (tmp_path / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("scores", "kept", "told"),
    [
        ({"accuracy": {"accuracy": 0.5}}, {}, ""),
        ({"accuracy": 91.3}, {}, "leaves out accuracy, which is 91.3 and no share of 1"),
        ({"top1": 0.5, "top5": 1.0}, {"accuracy": 0.5}, ""),
    ],
    ids=["no number", "per cent", "all classes are among the best five"],
)
def test_a_card_has_no_score_that_says_nothing(tmp_path, monkeypatch, caplog, scores, kept, told):
    monkeypatch.setattr(trainer_facts, "_warned", set())
    run = trainer(tmp_path, callbacks=[TrActCallback()], save_strategy="epoch", **EVALUATED)
    run.compute_metrics = lambda prediction: dict(scores)
    run.train()
    assert TrainingRecord.from_json_file(tmp_path / RECORD_FILE).metrics == kept
    assert ("no share of 1" in caplog.text) == bool(told)
    assert told in caplog.text


def test_a_model_without_a_config_keeps_its_top_5(tmp_path):
    assert trainer_facts.shares_of({"top5": 0.9}, torch.nn.Linear(2, 100)) == {"top5": 0.9}


def test_a_later_run_without_tract_takes_the_place_of_the_card(tmp_path):
    trainer(tmp_path, callbacks=[TrActCallback(lam=0.3)], save_strategy="epoch").train()
    frozen = small_vit()
    frozen.get_submodule(STEM).requires_grad_(False)
    later = trainer(tmp_path, frozen, [TrActCallback(), Unfreezes()], save_strategy="epoch")
    callback = later.callback_handler.callbacks[-2]
    callback.on_push_begin(later.args, later.state, later.control, model=frozen)
    assert "lam = 0.3" in ModelCard.load(tmp_path / "README.md").text  # This one has trained nothing yet.
    later.train()
    assert "It was trained without TrAct" in ModelCard.load(tmp_path / "README.md").text
    assert not (tmp_path / CONFIG_FILE).exists()


class Unfreezes(TrainerCallback):
    """After TrAct has said that it does nothing."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.get_submodule(STEM).requires_grad_(True)
        assert not isinstance(model.get_submodule(STEM), TrActLayer)


def test_tract_is_found_on_the_model_without_the_callback(tmp_path):
    model = small_vit()
    apply_tract(model, lam=0.3)
    run = trainer(tmp_path, model)
    use_model_card(run, dataset="noise")
    run.train()
    run.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert "lam = 0.3" in card.text
    assert "tract" in card.data.tags
    assert TrainingRecord.from_trainer(run).layers == [STEM]
    model.get_submodule(STEM).requires_grad_(False)
    assert TrainingRecord.from_trainer(run).tract is None


def test_a_trainer_that_only_pushes_keeps_the_record_of_the_one_that_trained(tmp_path):
    first = trainer(tmp_path, callbacks=[TrActCallback(lam=0.3)], save_strategy="epoch", **EVALUATED)
    first.compute_metrics = right
    first.train()
    first.save_model()
    record = TrainingRecord.from_json_file(tmp_path / RECORD_FILE)
    again = trainer(tmp_path, type(first.model).from_pretrained(tmp_path))
    use_model_card(again, dataset="uoft-cs/cifar10", license="mit")
    again.evaluate()
    again.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert "lam = 0.3" in card.text
    assert card.data.license == "mit"
    assert TrActConfig.from_json_file(tmp_path / CONFIG_FILE).lam == 0.3
    kept = TrainingRecord.from_json_file(tmp_path / RECORD_FILE)
    assert kept.dataset == "uoft-cs/cifar10"
    assert (kept.tract, kept.metrics, kept.history, kept.base_model) == (
        record.tract,
        record.metrics,
        record.history,
        "",
    )


@pytest.mark.parametrize("foreign", ["[]", "no JSON", '{"epochs": 3}'])
def test_another_programs_record_beside_the_base_model_ends_no_training(tmp_path, foreign):
    small_vit().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / RECORD_FILE).write_text(foreign)
    model = type(small_vit()).from_pretrained(tmp_path / "base")
    trainer(tmp_path / "out", model, [TrActCallback()], save_strategy="epoch").train()
    assert TrainingRecord.from_json_file(tmp_path / "out" / RECORD_FILE).base_model == "base"


def test_a_record_that_cannot_be_made_ends_no_training(tmp_path, monkeypatch, caplog):
    def fail(*args):
        raise ValueError("no such fact")

    monkeypatch.setattr(trainer_card, "facts_of_run", fail)
    trainer(tmp_path, callbacks=[TrActCallback()], save_strategy="epoch").train()
    assert "the model card could not be written: no such fact" in caplog.text


def test_the_card_lists_what_the_run_used(tmp_path):
    run = trainer(tmp_path, callbacks=[TrActCallback()], save_strategy="epoch", max_steps=3)
    run.state.train_batch_size = 16
    run.train()
    record = TrainingRecord.from_trainer(run)
    assert record.hyperparameters["max_steps"] == 3
    assert "num_train_epochs" not in record.hyperparameters
    run.state.train_batch_size = 14  # auto_find_batch_size
    assert TrainingRecord.from_trainer(run).hyperparameters["per_device_train_batch_size"] == 14
    model = type(run.model).from_pretrained(tmp_path / "checkpoint-3")
    assert base_model_of(model, run.args) == "a checkpoint of the same run"
    other = trainer(tmp_path / "other", model, [TrActCallback()])
    assert TrainingRecord.from_trainer(other).base_model == "checkpoint-3"


def test_the_task_is_the_models():
    assert task_of(small_vit()) == "image-classification"
    size = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    assert task_of(ViTForMaskedImageModeling(ViTConfig(**size))) is None
    assert task_of(YolosForObjectDetection(YolosConfig(**size))) == "object-detection"

    class Mine(type(small_vit())):
        pass

    assert task_of(Mine(small_vit().config)) == "image-classification"
    assert task_of(torch.nn.Linear(2, 2)) is None
    assert task_of(torch.nn.parallel.DataParallel(small_vit())) == "image-classification"


def test_an_adapters_card_is_left_to_peft(tmp_path):
    attention = ["q_proj", "query"]  # by the version of transformers
    model = get_peft_model(
        small_vit(), LoraConfig(target_modules=attention, modules_to_save=["projection", "classifier"])
    )
    run = trainer(tmp_path, model, [TrActCallback()], save_strategy="epoch", label_names=["labels"])
    use_model_card(run, dataset="noise")
    run.train()
    run.save_model()
    run.create_model_card()
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "peft"
    assert (tmp_path / CONFIG_FILE).exists()


def test_the_history_has_a_row_for_each_evaluation():
    log = [
        {"loss": 2.0, "epoch": 0.5},
        {"loss": 1.0, "epoch": 1.0, "grad_norm": 3.0},
        {"eval_loss": 1.5, "eval_top1": 0.4, "eval_top5": 0.9, "eval_runtime": 1.0, "epoch": 1.0},
        {"eval_loss": 1.2, "eval_accuracy": 0.5, "epoch": 2.0},
        {"train_runtime": 3.0},
    ]
    assert history_of(log) == [
        {"epoch": 1.0, "loss": 1.0, "eval_loss": 1.5, "accuracy": 0.4, "top5": 0.9},
        {"epoch": 2.0, "loss": 1.0, "eval_loss": 1.2, "accuracy": 0.5},
    ]
