"""Publishing a run by the Hub's real client, and all that may go wrong, against a server on loopback."""

import logging
import sys

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import _http as http
from huggingface_hub.utils import close_session

import pretrain_vit
import push_to_hub
import transfer
from helpers.hub_server import TOKEN, serving
from hf_tract import TrActConfig
from hf_tract.integrations import TrainingRecord


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
    """A run with a model, its record and a checkpoint."""
    folder = tmp_path / "run" / "model"
    record = TrainingRecord("x", "transformers", "photo_crops", TrActConfig(), metrics={"accuracy": 0.5, "top5": 0.9})
    record.save(folder)
    (folder / "model.safetensors").write_bytes(b"weights" * 100)
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "optimizer.pt").write_bytes(b"state")
    return folder


def publish(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["push_to_hub.py", *map(str, arguments)])
    push_to_hub.main()


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_pushed_by_lfs_with_its_card_and_without_checkpoints(hub, folder, monkeypatch, capsys):
    publish(monkeypatch, folder.parent, "--repo_id", "tester/model", "--private", "--license", "mit")
    assert capsys.readouterr().out == f"The model is published: {hub.endpoint}/tester/model\n"
    repo = hub.repos["tester/model"]
    assert repo.private
    assert repo.files("main")["model.safetensors"] == b"weights" * 100
    assert b"license: mit" in repo.files("main")["README.md"]
    assert not any("checkpoint" in path for path in repo.files("main"))
    assert any(request.startswith("PUT /lfs/") for request in hub.requests)


def test_a_name_alone_is_the_owners_and_a_revision_is_a_branch(hub, folder, monkeypatch, capsys):
    publish(monkeypatch, folder, "--repo_id", "model", "--revision", "lam-0.2")
    assert capsys.readouterr().out.endswith("/tester/model/tree/lam-0.2\n")
    repo = hub.repos["tester/model"]
    assert "model.safetensors" in repo.files("lam-0.2")
    assert "model.safetensors" not in repo.files("main")
    assert b'"tester/model"' in repo.files("lam-0.2")["README.md"]  # A name alone would load for nobody.


def test_a_new_branch_takes_a_model_beside_main_s_and_an_old_one_does_not(hub, folder, monkeypatch):
    publish(monkeypatch, folder, "--repo_id", "tester/model")
    (folder / "model.safetensors").write_bytes(b"other")
    publish(monkeypatch, folder, "--repo_id", "tester/model", "--revision", "new")
    repo = hub.repos["tester/model"]
    assert repo.files("new")["model.safetensors"] == b"other"
    assert repo.files("main")["model.safetensors"] == b"weights" * 100
    with pytest.raises(SystemExit, match=r"^tester/model holds a model already: name another, or a new --revision"):
        publish(monkeypatch, folder, "--repo_id", "tester/model", "--revision", "new")


def test_pre_training_for_a_repository_with_a_model_is_refused(hub, folder, monkeypatch):
    assert pretrain_vit.prepare_repository("model") == "tester/model"
    assert list(hub.repos) == ["tester/model"]
    publish(monkeypatch, folder, "--repo_id", "tester/model")
    arguments = ["--push_to_hub", "--hub_model_id", "model", "--output_dir", str(folder.parent)]
    monkeypatch.setattr(sys, "argv", ["pretrain_vit.py", *arguments])
    with pytest.raises(SystemExit, match=r"^tester/model holds a model already: .* push_to_hub\.py --update"):
        pretrain_vit.main()
    assert pretrain_vit.prepare_repository("tester/other") == "tester/other"


@pytest.mark.parametrize(
    ("repo_id", "token", "reason"),
    [("somebody/model", TOKEN, ".*403 Forbidden"), ("model", "hf_WrongWrongWrong", "Invalid user token")],
)
def test_pre_training_for_a_repository_that_cannot_be_written_is_refused(hub, repo_id, token, reason, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(sys, "argv", ["pretrain_vit.py", "--push_to_hub", "--hub_model_id", repo_id])
    with pytest.raises(SystemExit, match=rf"^--push_to_hub: {repo_id} cannot be written to: {reason}"):
        pretrain_vit.main()
    assert hub.repos == {}


def test_a_repository_with_a_model_is_left_alone_unless_told(hub, folder, monkeypatch):
    publish(monkeypatch, folder, "--repo_id", "tester/model")
    (folder / "model.safetensors").write_bytes(b"other")
    with pytest.raises(SystemExit, match=r"^tester/model holds a model already: name another, .* by --update"):
        publish(monkeypatch, folder, "--repo_id", "tester/model")
    assert hub.repos["tester/model"].files("main")["model.safetensors"] == b"weights" * 100
    publish(monkeypatch, folder, "--repo_id", "tester/model", "--update")
    assert hub.repos["tester/model"].files("main")["model.safetensors"] == b"other"


def test_a_model_in_another_form_is_left_alone_too(hub, folder, monkeypatch):
    HfApi().create_repo("tester/lora")
    HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="adapter_model.safetensors", repo_id="tester/lora")
    with pytest.raises(SystemExit, match=r"^tester/lora holds a model already"):
        publish(monkeypatch, folder, "--repo_id", "tester/lora")


def test_a_dry_run_needs_no_token_and_shows_what_would_be_uploaded(hub, folder, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    publish(monkeypatch, folder.parent, "--repo_id", "tester/model", "--dry_run")
    out = capsys.readouterr().out
    assert f"this would be uploaded from {folder} to tester/model; nothing is." in out
    assert "0.001 MB  model.safetensors" in out
    assert "MB  README.md" in out
    assert "optimizer.pt" not in out
    assert "The card is valid; its tags are tract, hf-tract" in out
    assert "It names no license: give one by --license." in out
    assert hub.requests == []


def test_without_a_token_nothing_is_asked_of_the_hub(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(SystemExit, match="cannot be pushed to without a token: set HF_TOKEN or run `hf auth login`"):
        publish(monkeypatch, folder, "--repo_id", "tester/model")
    assert hub.requests == []


@pytest.mark.parametrize(("repo_id", "token"), [("somebody/model", TOKEN), ("tester/model", "hf_WrongWrongWrong")])
def test_without_permission_the_error_says_so_and_shows_no_token(hub, folder, monkeypatch, caplog, repo_id, token):
    monkeypatch.setenv("HF_TOKEN", token)
    with caplog.at_level(logging.DEBUG), pytest.raises(SystemExit, match="the token may not write there") as error:
        publish(monkeypatch, folder, "--repo_id", repo_id)
    assert token not in str(error.value) + caplog.text
    assert hub.repos == {}


def test_a_network_that_goes_down_in_an_upload_loses_nothing(hub, folder, monkeypatch):
    options = ["--repo_id", "tester/model", "--private", "--revision", "v1"]
    publish(monkeypatch, folder, *options, "--dry_run")
    before = files(folder)
    hub.cut = "/lfs/"
    with pytest.raises(SystemExit) as error:
        publish(monkeypatch, folder, *options)
    assert f"All is still in {folder}" in str(error.value)
    left_out = "'--exclude=_*' '--exclude=checkpoint-*' '--exclude=checkpoints/*' '--exclude=seed-*'"
    assert f"to go on: hf upload tester/model {folder} . {left_out} --private --revision v1" in str(error.value)
    assert "\n" not in str(error.value)
    assert files(folder) == before
    hub.cut = None
    publish(monkeypatch, folder, *options)  # The repository is there, which is no obstacle.
    assert "model.safetensors" in hub.repos["tester/model"].files("v1")


def test_a_hub_that_is_not_there_is_told_in_one_line(folder, monkeypatch):
    with serving() as gone:
        endpoint = gone.endpoint
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(http.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    close_session()
    with pytest.raises(SystemExit, match=r"^The upload to tester/model did not end: ") as error:
        publish(monkeypatch, folder, "--repo_id", "tester/model")
    assert "\n" not in str(error.value)
    close_session()


def test_names_and_folders_that_cannot_be_are_told_in_one_line(folder, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"^--repo_id a b/c must be OWNER/NAME"):
        publish(monkeypatch, folder, "--repo_id", "a b/c")
    with pytest.raises(SystemExit, match="nowhere: there is no such folder"):
        publish(monkeypatch, tmp_path / "nowhere", "--repo_id", "tester/model")
    with pytest.raises(SystemExit, match=r"has no training_record.json: is the run finished\?"):
        publish(monkeypatch, tmp_path, "--repo_id", "tester/model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(SystemExit, match="has no model: it needs one of model"):
        publish(monkeypatch, folder, "--repo_id", "tester/model")
    (folder / "training_record.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(SystemExit, match="is no record of a training run"):
        publish(monkeypatch, folder, "--repo_id", "tester/model")


def test_a_public_repository_gets_no_private_model(hub, folder, monkeypatch):
    HfApi().create_repo("tester/open")
    with pytest.raises(SystemExit, match=r"^--private: tester/open exists and is public"):
        publish(monkeypatch, folder, "--repo_id", "tester/open", "--private")
    with pytest.raises(SystemExit, match=r"^--hub_private_repo: tester/open exists and is public"):
        pretrain_vit.prepare_repository("tester/open", private=True)
    with pytest.raises(SystemExit, match=r"^--hub_private_repo: tester/open exists and is public"):
        transfer.check_private("open")
    assert "model.safetensors" not in hub.repos["tester/open"].files("main")
    pretrain_vit.prepare_repository("tester/closed", private=True)
    assert hub.repos["tester/closed"].private
    publish(monkeypatch, folder, "--repo_id", "tester/closed", "--private")
    assert "model.safetensors" in hub.repos["tester/closed"].files("main")
