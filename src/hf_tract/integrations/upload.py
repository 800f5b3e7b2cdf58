"""A model's folder to the Hub: errors that say what to do, and nothing lost when one happens."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

from hf_tract.config import TrActError

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
        repo_id: owner/name, or a name of the token's owner; made if there is none.
        private: whether a repository that is made is private.
        revision: a branch, made if there is none; by default main.
        update: commit also to a repository that holds a model already.
        message: of the commit.

    Returns:
        The address of the model.

    Raises:
        TrActError: without a token or permission, for a repository with a model, and for an upload that was cut off; the
            folder stays as it is, and the message has the command that goes on.
    """
    if not any((Path(folder) / name).exists() for name in WEIGHTS):
        raise TrActError(f"`folder` (={str(folder)!r}) has no model; it needs one of {', '.join(WEIGHTS)}.")
    check_token(repo_id)
    api = HfApi()
    with resumable(folder, repo_id, private=private, revision=revision):
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision:
            api.create_branch(repo.repo_id, branch=revision, exist_ok=True)
        if not update and set(WEIGHTS) & set(api.list_repo_files(repo.repo_id, revision=revision)):
            raise TrActError(
                f"`repo_id` (={repo.repo_id!r}) holds a model already: choose another name or `revision`, or set `update` "
                f"to commit over it (the old one stays in its history)."
            )
        api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            ignore_patterns=list(IGNORED),
        )
    return f"{repo.endpoint}/{repo.repo_id}" + (f"/tree/{revision}" if revision else "")


def check_token(repo_id: str) -> None:
    """Raises a `TrActError` where there is no token to push with: better before a training than after it."""
    if get_token() is None:
        raise TrActError(
            f"`repo_id` (={repo_id!r}) cannot be pushed to without a token: set HF_TOKEN or run `hf auth login`."
        )


@contextlib.contextmanager
def resumable(
    folder: str | Path, repo_id: str, *, private: bool | None = None, revision: str | None = None
) -> Iterator[None]:
    """Turns what goes wrong in an upload into a `TrActError` with the command that does the rest.

    Args:
        folder: what is uploaded.
        repo_id: where to.
        private: whether the repository is private.
        revision: a branch.
    """
    try:
        yield
    except TrActError:
        raise
    except Exception as error:  # what the Hub's client and its connections raise has no common class
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        said = " ".join(f"{each}" for each in (error, error.__cause__) if each is not None)
        why = REFUSED if status in (401, 403) else " ".join(said.split())[:300] or type(error).__name__
        options = [*(["--private"] if private else []), *(["--revision", revision] if revision else [])]
        again = shlex.join(["hf", "upload", repo_id, str(folder), ".", *options])
        raise TrActError(
            f"`repo_id` (={repo_id!r}): the upload did not end: {why} Everything is still in {folder}; to go on: {again}"
        ) from error


REFUSED = "the token may not write there; use one of an owner or member, with the right to write."
