"""The training loop of the benchmarks goes on where a run was killed, and takes its data as it says."""

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


def test_a_fingerprint_is_of_the_data_alone():
    first = fingerprint(load_splits(RECIPE))
    assert first == fingerprint(load_splits(RECIPE))
    assert first != fingerprint(load_splits(Recipe(train_samples=64, test_samples=33)))


def test_a_recipe_with_an_unknown_field_is_refused(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("epoch: 3")
    with pytest.raises(SystemExit, match=r"recipe.yaml sets epoch, which a recipe does not have; it has dataset,"):
        read_recipe(file)


def test_images_in_memory_refuse_what_they_cannot_have(tmp_path):
    recipe = Recipe(train_samples=16, in_memory=True, crop_scale=1.0)
    with pytest.raises(SystemExit, match=r"color_jitter 0.3: images in memory are only cropped"):
        train(recipe, Options(tmp_path))
