"""The training loop of the benchmarks goes on where a run was killed, and takes its data as it says."""

import dataclasses

import pytest

from benchmarks.training import loop
from benchmarks.training.data import fingerprint, load_splits
from benchmarks.training.loop import Options, train
from benchmarks.training.recipe import Recipe, read_recipe
from helpers.environments import reset_accelerate

VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "patch_size": 4}
RECIPE = Recipe(model_config=VIT, train_samples=64, test_samples=32, batch_size=16, epochs=2)


def test_a_run_that_was_killed_ends_in_the_same_weights(tmp_path, monkeypatch):
    whole = train(RECIPE, Options(tmp_path / "whole"))
    save = loop.save

    def save_and_die(accelerator, checkpoints, epoch):
        save(accelerator, checkpoints, epoch)
        (checkpoints / "partial").mkdir()  # what a kill leaves in the middle of the next checkpoint
        raise KeyboardInterrupt

    reset_accelerate()
    monkeypatch.setattr(loop, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train(RECIPE, Options(tmp_path / "killed"))
    monkeypatch.undo()
    reset_accelerate()
    resumed = train(RECIPE, Options(tmp_path / "killed"))
    for mine, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert mine.equal(theirs)
    assert resumed.figures["loss"] == whole.figures["loss"]
    assert resumed.figures["top1"] == whole.figures["top1"]
    assert resumed.figures["seconds"][1] > resumed.figures["seconds"][0] > 0


def test_the_time_of_a_whitened_start_is_training_time(tmp_path, monkeypatch):
    ticks = [0.0]
    real = loop._clock
    monkeypatch.setattr(loop, "whiten_first_layer", lambda *args, **options: ticks.append(1000.0))
    monkeypatch.setattr(loop, "_clock", lambda: real() + sum(ticks))
    recipe = dataclasses.replace(RECIPE, whiten_init=True, epochs=1)
    trained = train(recipe, Options(tmp_path))
    assert 1000 < trained.figures["seconds"][0] < 1500


def test_a_fingerprint_is_of_the_data_alone():
    first = fingerprint(load_splits(RECIPE))
    assert first == fingerprint(load_splits(RECIPE))
    assert first != fingerprint(load_splits(Recipe(train_samples=64, test_samples=33)))


def test_validation_rows_are_training_rows_that_no_run_trains_on():
    whole = load_splits(Recipe())
    splits = load_splits(Recipe(train_samples=64, validation_samples=16))
    shuffled = whole.train.shuffle(seed=0)
    assert splits.train["label"] == shuffled["label"][:64]
    assert splits.test["label"] == shuffled["label"][64:80]
    assert splits.test[0]["image"].tobytes() == shuffled[64]["image"].tobytes()
    few = load_splits(Recipe(train_samples=64, validation_samples=16, test_samples=8))
    assert len(few.test) == 8


@pytest.mark.parametrize("train_samples", [0, 10**6])
def test_validation_rows_need_room_behind_the_training_rows(train_samples):
    with pytest.raises(SystemExit, match=f"validation_samples 16: it needs train_samples.*is {train_samples}"):
        load_splits(Recipe(train_samples=train_samples, validation_samples=16))


def test_a_recipe_with_an_unknown_field_is_refused(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("epoch: 3")
    with pytest.raises(SystemExit, match=r"recipe.yaml sets epoch, which a recipe does not have; it has dataset,"):
        read_recipe(file)


def test_images_in_memory_refuse_what_they_cannot_have(tmp_path):
    recipe = Recipe(train_samples=16, in_memory=True, crop_scale=1.0)
    with pytest.raises(SystemExit, match=r"color_jitter 0.3: images in memory are only cropped"):
        train(recipe, Options(tmp_path))
