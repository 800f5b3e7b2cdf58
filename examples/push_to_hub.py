"""Publishes the model of a finished run of pretrain_vit.py or transfer.py on the Hub, with its card.

    python examples/push_to_hub.py outputs/pretrain_vit --repo_id me/vit-photo-crops --license mit

The token is the environment's: HF_TOKEN, or what `hf auth login` left. The card is written anew from the run's record;
look at it first by --dry_run.
"""

import argparse
import dataclasses
from pathlib import Path

from hf_tract import TrActError
from hf_tract.integrations import TrainingRecord
from hf_tract.integrations.training_record import RECORD_FILE
from upload import push_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's --output_dir")
    parser.add_argument("--repo_id", required=True, metavar="OWNER/NAME")
    parser.add_argument("--license", help="of the model, as the Hub abbreviates it (mit, apache-2.0, cc-by-nc-4.0)")
    parser.add_argument("--dataset", metavar="ID", help="the data set's Hub id, where the run had it from a folder")
    parser.add_argument(
        "--base_model", metavar="ID", help="the checkpoint's Hub id, where the run had it from a folder"
    )
    parser.add_argument("--private", action="store_true", default=None)
    parser.add_argument("--revision", help="a branch, made where there is none")
    parser.add_argument(
        "--update", action="store_true", help="also where a model is already; the old one stays in the history"
    )
    parser.add_argument("--message", default="Add model")
    parser.add_argument("--dry_run", action="store_true", help="write the card, upload nothing")
    args = parser.parse_args()
    folder = next((each for each in (args.run, args.run / "model") if (each / RECORD_FILE).exists()), None)
    if folder is None:
        parser.error(f"{args.run} has no {RECORD_FILE}: is the run finished?")
    try:
        given = {name: value for name in ("license", "dataset", "base_model") if (value := getattr(args, name))}
        record = dataclasses.replace(
            TrainingRecord.from_json_file(folder / RECORD_FILE), name=args.repo_id.split("/")[-1], **given
        )
        record.save(folder, args.repo_id)
        if args.dry_run:
            print(f"{folder / 'README.md'} is written, nothing is uploaded.")
        else:
            options = {
                "private": args.private,
                "revision": args.revision,
                "update": args.update,
                "message": args.message,
            }
            print(push_folder(folder, args.repo_id, **options))
    except TrActError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
