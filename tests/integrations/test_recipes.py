"""docs/recipes.md: the snippets that need no more than the tests run as written and train the first layer by TrAct."""

import logging

import pytest
import torch

from helpers.documents import ROOT, snippets_of
from hf_tract import find_first_layers

PAGE = ROOT / "docs" / "recipes.md"
LAYERS = {
    "ViTMAEForPreTraining": "vit.embeddings.patch_embeddings.projection",
    "timm": "patch_embed.proj",
    "LightningModule": "model.0",
}


@pytest.mark.filterwarnings(
    "ignore:.*pin_memory.*:UserWarning",
    "ignore:.*:UserWarning:lightning",
    "ignore::DeprecationWarning:lightning",
    "ignore:`isinstance:FutureWarning",
)
@pytest.mark.parametrize("word", LAYERS)
def test_a_snippet_runs_as_written_and_trains_the_first_layer(word, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (snippet,) = [snippet for snippet in snippets_of(PAGE) if word in snippet]
    names = {}
    with caplog.at_level(logging.INFO, "hf_tract"):
        exec(snippet, names)
    model = names.get("module", names.get("model"))
    (layer,) = find_first_layers(model)
    assert layer.name == LAYERS[word]
    messages = [record.getMessage() for record in caplog.records]
    assert any(f"{layer.name}: Conv2d" in message for message in messages)
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_every_snippet_that_needs_no_more_than_the_tests_do_is_run():
    assert len(snippets_of(PAGE)) == len(LAYERS)
