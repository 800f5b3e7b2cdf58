"""Tells how much of a data set colour and gradient statistics solve, by a random forest on 27 numbers of each image.

    uv run --group bench python -m benchmarks.colour_statistics --dataset photo_crops

prints top-1 on the test images and adds the run to --results. Where this comes near a vision model's accuracy, the
data set says little about the model.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestClassifier

from benchmarks import ROOT
from benchmarks.common.options import new_parser
from benchmarks.common.records import RunRecord, add_record, command, environment, key_of, read_records
from benchmarks.training.data import Splits, fingerprint, load_splits, to_rgb
from benchmarks.training.recipe import Recipe
from hf_tract.integrations.training_record import without_local_path

Statistics = NDArray[np.float64]
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def main() -> None:
    """Fit, print and store."""
    args = parse()
    recipe = Recipe(dataset=args.dataset, train_samples=args.train_samples)
    settings = {
        "dataset": without_local_path(args.dataset),
        "train_samples": args.train_samples,
        "trees": args.trees,
    }
    for seed in range(args.seeds):
        key = key_of("colour statistics", settings, seed)
        if key not in read_records(args.results):
            add_record(args.results, fit(load_splits(recipe), settings, seed, key))
        top1 = read_records(args.results)[key].curve["top1"][0]
        print(f"seed {seed}: {100 * top1:.1f} % of the test images of {settings['dataset']}")


def fit(splits: Splits, settings: dict[str, Any], seed: int, key: str) -> RunRecord:
    """Return the record of a forest that is fitted to the training images and tested on the others."""
    start = time.process_time()
    forest = RandomForestClassifier(settings["trees"], random_state=seed)
    forest.fit(*table_of(splits, splits.train))
    top1 = float(forest.score(*table_of(splits, splits.test)))
    seconds = [round(time.process_time() - start, 3)]
    data = fingerprint(splits)
    record = RunRecord(key, "random forest", settings, seed, {"top1": [top1]}, seconds, data, command())
    for name, value in environment().items():
        setattr(record, name, value)
    return record


def table_of(splits: Splits, rows: Any) -> tuple[Statistics, Statistics]:
    """Return the statistics (rows, 27) and the labels (rows,) of images."""
    statistics = [statistics_of(to_rgb(row[splits.image])) for row in rows]
    return np.stack(statistics), np.asarray(rows[splits.label])


def statistics_of(image: Any) -> Statistics:
    """Return, for each of three channels: mean, deviation, five quantiles, and the mean steepness down and across."""
    pixels = np.asarray(image, dtype=np.float64) / 255
    numbers = [pixels.mean((0, 1)), pixels.std((0, 1)), *np.quantile(pixels, QUANTILES, axis=(0, 1))]
    for axis in (0, 1):
        numbers.append(np.abs(np.diff(pixels, axis=axis)).mean((0, 1)))
    return np.concatenate(numbers)


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--dataset", default="photo_crops", help="photo_crops, a Hub id, or a folder (default: photo_crops)")
    add("--train_samples", type=int, default=0, help="use that many training images; 0 for all (default: 0)")
    add("--trees", type=int, default=300, help="of the forest (default: 300)")
    add("--seeds", type=int, default=3, help="seeds 0 to N-1 (default: 3)")
    add("--results", type=Path, default=ROOT / "docs" / "results" / "colour_statistics.jsonl", help="JSON lines")
    return parser.parse_args()


if __name__ == "__main__":
    main()
