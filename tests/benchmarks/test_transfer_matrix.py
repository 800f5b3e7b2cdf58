"""The transfer matrix runs each cell once, and tells means and gains with their intervals."""

import json
import shutil
import sys

import pytest
import yaml
from PIL import Image

from benchmarks import transfer_matrix
from benchmarks.common.records import read_records


def option(command, name):
    return command[command.index(name) + 1]


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Collects commands in place of running them; each leaves what a run would."""
    commands = []

    def run_here(what, works, at_once, done):
        for work in works:
            (command,) = work.commands
            commands.append(command)
            folder = tmp_path / "m" / option(command, "--output_dir").rpartition("/")[2]
            recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
            top1 = 0.5 + 0.1 * ("--no_tract" not in command) + 0.2 * ("pretrain-TrAct" in str(recipe.get("model")))
            top1 += 0.01 * recipe.get("seed", 0)
            row = {"curve": {"top1": [0.1, top1]}, "seconds": [1.0, 2.0]}
            (folder / "run.json").write_text(json.dumps(row))
            (folder / "model").mkdir()
            look = {"image_mean": [0.5] * 3, "image_std": [0.2] * 3}
            (folder / "model" / "preprocessor_config.json").write_text(json.dumps(look))
            done(work)
        return []

    monkeypatch.setattr(transfer_matrix, "run_all", run_here)
    return commands


def test_the_matrix_runs_each_cell_from_each_seed_once(tmp_path, monkeypatch, ran):
    arguments = ["--pretrain_dataset", "photo_crops", "--datasets", "/data/digits", "--seeds", "2"]
    options = [*arguments, "--output_dir", str(tmp_path / "m")]
    monkeypatch.setattr(sys, "argv", [transfer_matrix.__file__, *options])
    transfer_matrix.main()
    assert len(ran) == 2 + 4 * 2
    assert sum("--save_model" in command for command in ran) == 2
    lines = (tmp_path / "m" / "matrix.md").read_text().splitlines()
    assert lines[2] == "| digits | 50.5 ± 6.4 | 60.5 ± 6.4 | 70.5 ± 6.4 | 80.5 ± 6.4 |"
    assert lines[6].startswith("| digits | +20.0 ± 0.0 | +10.0 ± 0.0 | +30.0 ± 0.0 |")
    assert "Pre-training (TrAct) reached 60.0 % on photo_crops." in lines
    with Image.open(tmp_path / "m" / "matrix.png") as image:
        assert image.width > 400
    records = read_records(tmp_path / "m" / "matrix.jsonl").values()
    assert not [record for record in records if str(tmp_path) in str(record)]
    transfer_matrix.main()
    assert len(ran) == 2 + 4 * 2


def test_another_pretraining_makes_another_matrix(tmp_path, monkeypatch, ran):
    for epochs in (1, 2):
        recipe = tmp_path / f"{epochs}.yaml"
        recipe.write_text(yaml.safe_dump({"epochs": epochs}))
        arguments = ["--pretrain_dataset", "photo_crops", "--datasets", "/data/digits", "--seeds", "2"]
        options = [*arguments, "--pretrain_recipe", str(recipe), "--output_dir", str(tmp_path / "m")]
        monkeypatch.setattr(sys, "argv", [transfer_matrix.__file__, *options])
        transfer_matrix.main()
    assert len(ran) == 2 * (2 + 4 * 2)
    assert len({option(command, "--output_dir") for command in ran}) == len(ran)
    lines = (tmp_path / "m" / "matrix.md").read_text().splitlines()
    assert lines[2] == "| digits | 50.5 ± 6.4 | 60.5 ± 6.4 | 70.5 ± 6.4 | 80.5 ± 6.4 |"


def test_a_pretraining_whose_folder_is_gone_is_told(tmp_path, monkeypatch, ran):
    options = ["--pretrain_dataset", "photo_crops", "--datasets", "/data/digits", "--output_dir", str(tmp_path / "m")]
    monkeypatch.setattr(sys, "argv", [transfer_matrix.__file__, *options])
    transfer_matrix.main()
    for folder in (tmp_path / "m").glob("pretrain-*"):
        shutil.rmtree(folder)
    with pytest.raises(SystemExit, match=r"is not there, though .* has its run: name another --output_dir"):
        transfer_matrix.main()


def test_the_matrix_ends_where_a_run_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["transfer_matrix", "--output_dir", str(tmp_path / "m")])
    monkeypatch.setattr(transfer_matrix, "run_all", lambda what, works, at_once, done: ["why"])
    with pytest.raises(SystemExit, match="1 of 2 runs failed"):
        transfer_matrix.main()
