"""Pushing a model's folder by the Hub's real client, and all that may go wrong, against a server on loopback."""

import logging

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http as http
from huggingface_hub.utils import close_session

from helpers.hub_server import TOKEN, serving
from hf_tract import TrActError
from upload import push_folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(http.time, "sleep", lambda seconds: None)  # between the client's attempts
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        close_session()
        yield hub
        close_session()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights" * 100)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Model\n")
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "optimizer.pt").write_bytes(b"state")
    return folder


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_pushed_by_lfs_and_without_checkpoints(hub, folder):
    url = push_folder(folder, "tester/model", private=True)
    assert url == f"{hub.endpoint}/tester/model"
    repo = hub.repos["tester/model"]
    assert repo.private
    assert repo.files("main")["model.safetensors"] == b"weights" * 100
    assert not any("checkpoint" in path for path in repo.files("main"))
    assert any(request.startswith("PUT /lfs/") for request in hub.requests)


def test_a_name_alone_is_the_owners_and_a_revision_is_a_branch(hub, folder):
    assert push_folder(folder, "model", revision="lam-0.2").endswith("/tester/model/tree/lam-0.2")
    repo = hub.repos["tester/model"]
    assert "model.safetensors" in repo.files("lam-0.2")
    assert "model.safetensors" not in repo.files("main")


def test_a_repository_with_a_model_is_left_alone_unless_told(hub, folder):
    push_folder(folder, "tester/model")
    (folder / "model.safetensors").write_bytes(b"other")
    with pytest.raises(TrActError, match=r"`repo_id` \(='tester/model'\) holds a model already: choose another name"):
        push_folder(folder, "tester/model")
    assert hub.repos["tester/model"].files("main")["model.safetensors"] == b"weights" * 100
    push_folder(folder, "tester/model", update=True)
    assert hub.repos["tester/model"].files("main")["model.safetensors"] == b"other"


def test_without_a_token_nothing_is_asked_of_the_hub(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(TrActError, match=r"cannot be pushed to without a token: set HF_TOKEN or run `hf auth login`"):
        push_folder(folder, "tester/model")
    assert hub.requests == []


@pytest.mark.parametrize(("repo_id", "token"), [("somebody/model", TOKEN), ("tester/model", "hf_WrongWrongWrong")])
def test_without_permission_the_error_says_so_and_shows_no_token(hub, folder, monkeypatch, caplog, repo_id, token):
    monkeypatch.setenv("HF_TOKEN", token)
    with caplog.at_level(logging.DEBUG), pytest.raises(TrActError, match="the token may not write there") as error:
        push_folder(folder, repo_id)
    assert token not in str(error.value) + caplog.text
    assert hub.repos == {}


def test_a_network_that_goes_down_in_an_upload_loses_nothing(hub, folder):
    before = files(folder)
    hub.cut = "/lfs/"
    with pytest.raises(TrActError) as error:
        push_folder(folder, "tester/model", private=True, revision="v1")
    assert f"Everything is still in {folder}" in str(error.value)
    assert f"to go on: hf upload tester/model {folder} . --private --revision v1" in str(error.value)
    assert files(folder) == before
    hub.cut = None
    push_folder(folder, "tester/model", private=True, revision="v1")  # the repository is there, and no obstacle
    assert "model.safetensors" in hub.repos["tester/model"].files("v1")


def test_a_hub_that_is_not_there_is_an_error(folder, monkeypatch):
    with serving() as gone:
        endpoint = gone.endpoint
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(http.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    close_session()
    with pytest.raises(TrActError, match="the upload did not end"):
        push_folder(folder, "tester/model")
    close_session()


def test_a_name_that_is_none_and_a_folder_without_a_model_are_refused(hub, folder, tmp_path):
    with pytest.raises(TrActError, match=r"`repo_id` \(='a b/c'\): the upload did not end"):
        push_folder(folder, "a b/c")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrActError, match=r"`folder` \(='.*empty'\) has no model"):
        push_folder(tmp_path / "empty", "tester/model")
