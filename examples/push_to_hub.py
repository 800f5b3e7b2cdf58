# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-tract", "huggingface_hub>=1.0", "matplotlib>=3.9"]
# ///
"""Publishes a run of pretrain_vit.py, transfer.py or trainer_minimal.py on the Hub, with a card from its record.

    python push_to_hub.py outputs/pretrain_vit --repo_id me/vit-photo-crops --license mit --dry_run
    python push_to_hub.py outputs/pretrain_vit --repo_id me/vit-photo-crops --license mit

--dry_run needs no token: it writes the card and shows what would be uploaded. The token is the environment's:
HF_TOKEN, or what `hf auth login` left.
"""

import argparse
import contextlib
import dataclasses
import fnmatch
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError

from hf_tract import TrActError
from hf_tract.integrations import TrainingRecord

RECORD_FILE = "training_record.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
MODELS = ("config.json", ".safetensors", ".bin", ".pt", ".pth", ".h5", ".onnx", ".gguf", ".msgpack")  # in any form
IGNORED = ("_*", "checkpoint-*", "checkpoints/*", "seed-*")  # what is not published
IS_MAIN_PROCESS = os.environ.get("RANK", "0") == "0"


def main() -> None:
    """Write the card, and upload the folder or show what would be uploaded."""
    args = parse_arguments()
    folder = find_model(args.run)
    write_card(folder, args)
    if args.dry_run:
        show(folder, args)
        return
    if get_token() is None:
        stop(f"{args.repo_id} cannot be pushed to without a token: set HF_TOKEN or run `hf auth login`.")
    options = []
    if args.private:
        options.append("--private")
    if args.revision:
        options += ["--revision", args.revision]
    with uploading(folder, args.repo_id, *options):
        print(f"The model is published: {push(folder, args)}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's --output_dir")
    parser.add_argument("--repo_id", required=True, metavar="OWNER/NAME")
    parser.add_argument("--license", help="of the model, as the Hub abbreviates it (mit, apache-2.0, cc-by-nc-4.0)")
    parser.add_argument("--dataset", metavar="ID", help="the data set's Hub id, if the run read it from a folder")
    parser.add_argument("--base_model", metavar="ID", help="the checkpoint's Hub id, if the run read it from a folder")
    parser.add_argument("--private", action="store_true", default=None, help="make the repository a private one")
    parser.add_argument("--revision", help="a branch, which is created if it does not exist")
    parser.add_argument("--update", action="store_true", help="replace a model; the old one stays in the history")
    parser.add_argument("--message", default="Add model", help="of the commit (default: %(default)s)")
    parser.add_argument("--dry_run", action="store_true", help="upload nothing, show what would be uploaded")
    args = parser.parse_args()
    if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", args.repo_id):
        stop(f"--repo_id {args.repo_id} must be OWNER/NAME, of letters, digits, '-', '_' and '.'.")
    return args


def find_model(run: Path) -> Path:
    """Return the folder of a run's model."""
    if not run.is_dir():
        stop(f"{run}: there is no such folder.")
    folder = run
    if not (folder / RECORD_FILE).exists():
        folder = run / "model"
    if not (folder / RECORD_FILE).exists():
        stop(f"{run} has no {RECORD_FILE}: is the run finished? Of several seeds, name one: {run}/seed-0.")
    if not any((folder / name).exists() for name in WEIGHTS):
        stop(f"{folder} has no model: it needs one of {', '.join(WEIGHTS)}.")
    return folder


def write_card(folder: Path, args: argparse.Namespace) -> None:
    """Write the card anew, with what is given on the command line."""
    changes = {"name": args.repo_id.split("/")[-1]}
    for name in ("license", "dataset", "base_model"):
        value = getattr(args, name)
        if value:
            changes[name] = value
    try:
        record = TrainingRecord.from_json_file(folder / RECORD_FILE)
        dataclasses.replace(record, **changes).save(folder, args.repo_id)
    except TrActError as error:
        stop(str(error))


def show(folder: Path, args: argparse.Namespace) -> None:
    """Print the files that would be uploaded, and whether the card's head can be read."""
    print(f"Dry run: this would be uploaded from {folder} to {args.repo_id}; nothing is.")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        ignored = any(fnmatch.fnmatch(name, pattern) for pattern in IGNORED)
        if path.is_file() and not ignored:
            print(f"  {path.stat().st_size / 1e6:9.3f} MB  {name}")
    try:
        card = ModelCard.load(folder / "README.md")
    except ValueError as error:
        stop(f"{folder / 'README.md'} is no valid card: {one_line(error)}")
    print(f"The card is valid; its tags are {', '.join(card.data.tags or ['none'])}.")
    if not card.data.license:
        print("It names no license: give one by --license.")
    if not card.data.datasets:
        print("It names no data set of the Hub: if yours is there, give its id by --dataset.")


def push(folder: Path, args: argparse.Namespace) -> str:
    """Upload the model's folder in one commit, and return its address."""
    api = HfApi()
    repo = api.create_repo(args.repo_id, private=args.private, exist_ok=True)
    args.repo_id = repo.repo_id
    if args.private and not api.model_info(repo.repo_id).private:
        stop(f"--private: {args.repo_id} exists and is public. Change it on the Hub, or name another.")
    write_card(folder, args)  # Its lines that load the model need the owner's name.
    branches = [branch.name for branch in api.list_repo_refs(repo.repo_id).branches]
    is_new_branch = args.revision is not None and args.revision not in branches
    if is_new_branch:
        api.create_branch(repo.repo_id, branch=args.revision)  # It begins with main's model, if there is one.
    files = api.list_repo_files(repo.repo_id, revision=args.revision)
    holds_model = any(name.endswith(MODELS) for name in files)
    if not args.update and not is_new_branch and holds_model:
        stop(f"{args.repo_id} holds a model already: name another, or a new --revision, or replace it by --update.")
    api.upload_folder(
        repo_id=repo.repo_id,
        folder_path=folder,
        revision=args.revision,
        commit_message=args.message,
        ignore_patterns=list(IGNORED),
    )
    if args.revision:
        return f"{repo}/tree/{args.revision}"
    return str(repo)


@contextlib.contextmanager
def uploading(folder: str | Path, repo_id: str, *options: str) -> Iterator[None]:
    """Turn an error of an upload inside into one line, with the command that uploads the rest.

    Args:
        folder: what is uploaded.
        repo_id: the repository that it is uploaded to.
        options: those of the command.
    """
    try:
        yield
    except Exception as error:  # The errors of the Hub's client and of its connections have no common class.
        reason = one_line(error)
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            reason = "the token may not write there; use one of an owner or member that may."
        left_out = [f"--exclude={pattern}" for pattern in IGNORED]
        command = shlex.join(["hf", "upload", repo_id, str(folder), ".", *left_out, *options])
        stop(f"The upload to {repo_id} did not end: {reason} All is still in {folder}; to go on: {command}")


def one_line(error: Exception) -> str:
    """Return the beginning of an error's text in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def stop(message: str) -> NoReturn:
    """End the script with one line, which only the main process prints."""
    raise SystemExit(message if IS_MAIN_PROCESS else 1)


if __name__ == "__main__":
    main()
