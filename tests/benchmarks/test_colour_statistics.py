"""Colour statistics are what they are called, and a stored run is not made again."""

import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks import colour_statistics
from benchmarks.common.records import read_records
from benchmarks.training.data import load_splits
from benchmarks.training.recipe import Recipe


def test_an_image_has_27_numbers_by_channel():
    ramp = np.zeros((4, 5, 3), dtype=np.uint8)
    ramp[..., 0] = 51  # a constant 0.2
    ramp[..., 1] = 51 * np.arange(5)  # 0.2 steeper with each column
    ramp[..., 2] = 51 * np.arange(4)[:, None]
    numbers = colour_statistics.statistics_of(Image.fromarray(ramp)).reshape(9, 3)
    mean, deviation, *quantiles, down, across = numbers
    assert mean == pytest.approx([0.2, 0.4, 0.3])
    assert deviation == pytest.approx([0, 0.2 * np.sqrt(2), 0.2 * np.sqrt(1.25)])
    assert quantiles[2] == pytest.approx([0.2, 0.4, 0.3])
    assert down == pytest.approx([0, 0, 0.2])
    assert across == pytest.approx([0, 0.2, 0])


def test_the_command_stores_each_seed_once(tmp_path, monkeypatch, capsys):
    few = load_splits(Recipe(train_samples=200, test_samples=100))
    monkeypatch.setattr(colour_statistics, "load_splits", lambda recipe: few)
    arguments = ["colour_statistics", "--trees", "20", "--seeds", "2", "--results", str(tmp_path / "x.jsonl")]
    monkeypatch.setattr(sys, "argv", arguments)
    colour_statistics.main()
    printed = capsys.readouterr().out
    stored = read_records(tmp_path / "x.jsonl")
    assert [record.seed for record in stored.values()] == [0, 1]
    # Chance is 5 %: colours alone tell many photographs apart.
    assert min(record.curve["top1"][0] for record in stored.values()) > 0.3
    monkeypatch.setattr(colour_statistics, "fit", None)
    colour_statistics.main()
    assert capsys.readouterr().out == printed
