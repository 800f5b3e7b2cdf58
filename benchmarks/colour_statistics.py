"""Tells how much of a data set colour and gradient statistics solve, by a random forest on 27 numbers of each image.

    uv run --group bench python -m benchmarks.colour_statistics --dataset photo_crops

prints top-1 on the test images and adds the run to --results. Where this comes near a vision model's accuracy, the
data set says little about the model.
"""

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

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
    have = read_records(args.results)
    tables = None
    for seed in range(args.seeds):
        key = key_of("colour statistics", settings, seed)
        if key not in have:
            tables = tables or tables_of(load_splits(recipe))
            have[key] = fit(tables, settings, seed, key)
            add_record(args.results, have[key])
        top1 = have[key].curve["top1"][0]
        print(f"seed {seed}: {100 * top1:.1f} % of the test images of {settings['dataset']}")


class Tables(NamedTuple):
    """Holds statistics and labels to fit to and to test on, the fingerprint of the data, and the seconds it took."""

    train: tuple[Statistics, Statistics]
    test: tuple[Statistics, Statistics]
    data: str
    seconds: float


def tables_of(splits: Splits) -> Tables:
    """Return the statistics of all images, which every seed shares."""
    start = time.process_time()
    train = table_of(splits, splits.train)
    test = table_of(splits, splits.test)
    return Tables(train, test, fingerprint(splits), time.process_time() - start)


def fit(tables: Tables, settings: dict[str, Any], seed: int, key: str) -> RunRecord:
    """Return the record of a forest that is fitted to the training images and tested on the others."""
    start = time.process_time()
    forest = RandomForestClassifier(settings["trees"], random_state=seed)
    forest.fit(*tables.train)
    curve = {"top1": [float(forest.score(*tables.test))]}
    seconds = [round(tables.seconds + time.process_time() - start, 3)]
    told = environment()
    return RunRecord(key, "random forest", settings, seed, curve, seconds, tables.data, command(), **told)


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
    add("--dataset", default="photo_crops", help="photo_crops, a Hub id, or a folder")
    add("--train_samples", type=int, default=0, help="use that many training images; 0 for all")
    add("--trees", type=int, default=300, help="of the forest")
    add("--seeds", type=int, default=3, help="seeds 0 to N-1")
    add("--results", type=Path, default=ROOT / "docs" / "results" / "colour_statistics.jsonl", help="JSON lines")
    return parser.parse_args()


if __name__ == "__main__":
    main()
