"""docs/usage.md and pixels.md: each recipe runs as written, finds the layer, and trains it without a warning."""

import logging
import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"
GUIDE = (DOCS / "usage.md").read_text(encoding="utf-8")
OTHER_PIXELS = (DOCS / "pixels.md").read_text(encoding="utf-8")
RECIPES = {part.split("\n")[0]: part for part in OTHER_PIXELS.split("\n## ")[1:]}
LAYERS = {
    "Satellite images, 13 bands": {"0": 832},
    "Two sensors with a stem each": {"optical": 832, "radar": 128},
    "CT": {"0": 64},
    "Grey images of 16 bits": {"0": 64},
    "Event cameras": {"0": 160},
    "Spectrograms": {"audio_spectrogram_transformer.embeddings.patch_embeddings.projection": 256},
    "Video": {"videomae.embeddings.patch_embeddings.projection": 384},
    "Time series": {"model.encoder.embedder.input_embedding": 8},
}


def run(text: str) -> dict:
    names = {}
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(block, names)
    return names


def test_every_recipe_is_looked_at():
    assert list(RECIPES) == list(LAYERS)


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_runs_as_written(title, caplog):
    with caplog.at_level(logging.WARNING, "hf_tract"):
        names = run(RECIPES[title])
        model, handle, pixels = names["model"], names["handle"], names["pixels"]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        out = model(*pixels) if isinstance(pixels, tuple) else model(pixels)
        logits = out if isinstance(out, torch.Tensor) else next(iter(out.values()))
        logits.square().mean().backward()
        optimizer.step()
    found = {layer.name: layer.module.weight[0].numel() for layer in handle.layers}
    assert found == LAYERS[title]
    assert {layer.source for layer in handle.layers} == {"reached first by the pixels"}
    for figures in handle.stats().values():
        assert 0.3 < figures["mean_eigenvalue"] < 3
        assert figures["grad_norm"] > 0
    assert not [record.getMessage() for record in caplog.records if record.name.startswith("hf_tract")]


def test_the_layer_is_shown_as_written(capsys):
    run(GUIDE.split("## Which layer is taken")[1])
    assert "0: Conv2d, n=48 (reached first by the pixels)" in capsys.readouterr().out


def test_lam_is_measured_as_written(capsys):
    run(GUIDE.split("## Which layer is taken")[0])
    assert "Spectrum(mean=0.3" in capsys.readouterr().out
