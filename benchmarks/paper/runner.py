"""Runs the jobs of experiments, each once: what is in the file of results is done, what was killed goes on."""

import json
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.common.processes import Work, run_all
from benchmarks.common.records import RunRecord, add_record, command, read_records
from benchmarks.paper.experiment import Donor, Job
from benchmarks.paper.train import RUN_FILE
from hf_tract.integrations.training_record import without_local_path

TRAIN = ("-m", "benchmarks.paper.train")
# What takes long to import, once for all runs.
IMPORTED = ("benchmarks.paper.train", "transformers.models.vit.modeling_vit")


@dataclass(frozen=True)
class Launch:
    """Says where and how runs are started."""

    # The folder for checkpoints and logs.
    folder: Path
    # The folder of a data set, by its name in the recipes.
    datasets: Mapping[str, str] = field(default_factory=dict)
    at_once: int = 1
    # The processes of each run, by accelerate launch.
    processes: int = 1
    # CUDA_VISIBLE_DEVICES of the runs, in turn.
    devices: Sequence[str] = ()
    # More options of benchmarks.paper.train.
    options: Sequence[str] = ()
    # More options of accelerate launch.
    launch_options: Sequence[str] = ()
    # Keep the folders of runs that are done.
    keep: bool = False

    def command(self, options: Sequence[str]) -> list[str]:
        """Return the command of a run with these options."""
        words = [sys.executable]
        if self.processes > 1 or self.launch_options:
            words += ["-m", "accelerate.commands.launch", "--num_processes", str(self.processes)]
            if not torch.accelerator.is_available():
                words.append("--cpu")
            words += self.launch_options
        return [*words, *TRAIN, *options, *self.options]


def run(jobs: Iterable[Job], file: Path, launch: Launch) -> list[str]:
    """Run what is not in the file of results yet, and add it; return what failed, in words."""
    have = read_records(file)
    todo = {}
    for job in jobs:
        if job.key not in have:
            todo[job.key] = job
    failed = _train_donors(todo.values(), launch)
    if failed:
        return failed
    works = [_work(job, launch) for job in todo.values()]

    def done(work: Work) -> None:
        add_record(file, _record(todo[work.name], launch.folder))
        if not launch.keep:
            shutil.rmtree(launch.folder / work.name)

    failed = run_all("runs", works, launch.at_once, done, launch.devices, IMPORTED)
    if not failed and not launch.keep:
        shutil.rmtree(launch.folder / "donors", ignore_errors=True)
    return failed


def _train_donors(jobs: Iterable[Job], launch: Launch) -> list[str]:
    """Train the models whose first layers runs start from, each once; return what failed, in words."""
    works = {}
    for job in jobs:
        donor = job.donor
        if not donor or (_donor_model(donor, launch) / "config.json").exists():
            continue
        folder = _donor_model(donor, launch).parent
        options = [*write_recipe(folder, _placed(donor.recipe, launch)), *donor.options, "--save_model"]
        works[donor.key] = Work([launch.command(options)], launch.folder / f"{donor.key}.log", donor.key)
    if not works:
        return []
    name = "first layers to start from"
    return run_all(name, list(works.values()), launch.at_once, lambda work: None, launch.devices, IMPORTED)


def _donor_model(donor: Donor, launch: Launch) -> Path:
    return launch.folder / "donors" / donor.key / "model"


def _placed(values: Mapping[str, Any], launch: Launch) -> dict[str, Any]:
    """Return a recipe whose data set lies where the command line says."""
    return {**values, "dataset": launch.datasets.get(values["dataset"], values["dataset"])}


def _work(job: Job, launch: Launch) -> Work:
    folder = launch.folder / job.key
    stages = job.stages()
    commands = []
    for stage, values in enumerate(stages):
        values = _placed(values, launch)
        if stage:
            values |= {"model": str(folder / str(stage - 1) / "model"), "model_config": {}}
        options = job.options()
        if job.donor:
            options += ["--donor", str(_donor_model(job.donor, launch))]
        if stage + 1 < len(stages):
            options.append("--save_model")
        commands.append(launch.command([*write_recipe(folder / str(stage), values), *options]))
    return Work(commands, launch.folder / f"{job.key}.log", job.key)


def write_recipe(folder: Path, values: Mapping[str, Any]) -> list[str]:
    """Write a recipe into the folder of a run, and return the options that name both."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(dict(values)), encoding="utf-8")
    return ["--recipe", str(recipe), "--output_dir", str(folder)]


def read_run(folder: Path) -> dict[str, Any]:
    """Return what a finished run left in its folder, as fields of a record."""
    row: dict[str, Any] = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    return row


def _record(job: Job, folder: Path) -> RunRecord:
    last = folder / job.key / str(len(job.stages()) - 1)
    settings = {**job.config, "dataset": without_local_path(job.config["dataset"])}
    return RunRecord(job.key, job.arm, settings, job.seed, command=command(), **read_run(last))
