"""Pushes a model's folder to the Hub, with errors that say what to do and nothing lost when one happens."""

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

from hf_tract import TrActError

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
IGNORED = ["_*", "checkpoint-*", "checkpoints/*"]  # as Trainer does


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    update: bool = False,
    message: str = "Add model",
) -> str:
    """Uploads a model's folder in one commit; the token is the environment's (`HF_TOKEN` or `hf auth login`).

    Args:
        folder: what `save_pretrained` or timm saved, with its card.
        repo_id: owner/name, or a name of the token's owner; created if it does not exist.
        private: whether a repository that is created is private.
        revision: a branch, created if it does not exist; by default main.
        update: commit also to a repository that has a model already.
        message: of the commit.

    Returns:
        The address of the model.

    Raises:
        TrActError: without a token or permission, for a repository with a model, and for an upload that was cut off;
            the folder stays as it is, and the message has the command that goes on.
    """
    files = {path.name for path in Path(folder).glob("*")}
    if not files.intersection(WEIGHTS):
        raise TrActError(f"`folder` (={str(folder)!r}) has no model; it needs one of {', '.join(WEIGHTS)}.")
    check_token(repo_id)
    api = HfApi()
    with resumable(folder, repo_id, private=private, revision=revision):
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision:
            api.create_branch(repo.repo_id, branch=revision, exist_ok=True)
        if not update:
            _refuse_to_replace(repo.repo_id, api.list_repo_files(repo.repo_id, revision=revision))
        api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            ignore_patterns=list(IGNORED),
        )
    address = f"{repo.endpoint}/{repo.repo_id}"
    return f"{address}/tree/{revision}" if revision else address


def check_token(repo_id: str) -> None:
    """Raises a `TrActError` if there is no token to push with: call it before a training, not only after it."""
    if get_token() is None:
        raise TrActError(
            f"`repo_id` (={repo_id!r}) cannot be pushed to without a token: set HF_TOKEN or run `hf auth login`."
        )


@contextlib.contextmanager
def resumable(
    folder: str | Path, repo_id: str, *, private: bool | None = None, revision: str | None = None
) -> Iterator[None]:
    """Turns an error of an upload inside into a `TrActError` with the command that uploads the rest.

    Args:
        folder: what is uploaded.
        repo_id: the repository that it is uploaded to.
        private: whether the repository is private.
        revision: a branch.
    """
    try:
        yield
    except TrActError:
        raise
    except Exception as error:  # The errors of the Hub's client and of its connections have no common class.
        command = ["hf", "upload", repo_id, str(folder), "."]
        if private:
            command.append("--private")
        if revision:
            command += ["--revision", revision]
        raise TrActError(
            f"`repo_id` (={repo_id!r}): the upload did not end: {_reason(error)} Everything is still in {folder}; "
            f"to go on: {shlex.join(command)}"
        ) from error


def _refuse_to_replace(repo_id: str, files: list[str]) -> None:
    """Raises a `TrActError` if there is a model among the files of a repository."""
    if set(files).intersection(WEIGHTS):
        raise TrActError(
            f"`repo_id` (={repo_id!r}) holds a model already: choose another name or `revision`, or set `update` to "
            f"commit over it (the old one stays in its history)."
        )


def _reason(error: Exception) -> str:
    """Returns why an upload failed, in one line."""
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return "the token may not write there; use one of an owner or member, with the right to write."
    text = str(error)
    if error.__cause__ is not None:
        text += f" {error.__cause__}"
    one_line = " ".join(text.split())
    return one_line[:300] or type(error).__name__
