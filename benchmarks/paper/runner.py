"""Runs the jobs of experiments, each once: what is in the file of results is done, what was killed goes on."""

import json
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import yaml

from benchmarks.common import records as results
from benchmarks.common.processes import Work, run_all
from benchmarks.common.records import RAN_ON, Result
from benchmarks.paper.experiments import Job
from hf_tract.integrations.training_record import without_local_path


def run(
    jobs: Iterable[Job],
    file: Path,
    folder: Path,
    datasets: Mapping[str, str],
    at_once: int = 1,
    processes: int = 1,
    devices: Sequence[str] = (),
    options: Sequence[str] = (),
    launch_options: Sequence[str] = (),
    keep: bool = False,
) -> list[str]:
    """Runs what is not in the file of results yet, and adds it.

    Args:
        jobs: what is wanted.
        file: the results, JSON lines.
        folder: where runs keep their checkpoints and logs.
        datasets: where a data set lies, by the name in the recipes.
        at_once: runs at the same time.
        processes: of each run, by `accelerate launch`.
        devices: CUDA_VISIBLE_DEVICES of the runs in turn.
        options: more options of train.py.
        launch_options: more options of `accelerate launch`.
        keep: keep the folder of a run that is done.

    Returns:
        What failed, in words.
    """
    have = results.read(file)
    todo = {job.key: job for job in jobs if job.key not in have}
    works = [_work(job, folder, datasets, processes, options, launch_options) for job in todo.values()]

    def done(work: Work) -> None:
        results.add(file, _result(todo[work.name], folder))
        if not keep:
            shutil.rmtree(folder / work.name)

    return run_all("runs", works, at_once, done, devices)


def _work(
    job: Job,
    folder: Path,
    datasets: Mapping[str, str],
    processes: int,
    options: Sequence[str],
    launch_options: Sequence[str],
) -> Work:
    commands = []
    for stage, values in enumerate(job.stages()):
        place = folder / job.key / str(stage)
        place.mkdir(parents=True, exist_ok=True)
        name = values["dataset"]
        dataset = {"dataset": datasets.get(name, name)}
        previous = {"model": str(folder / job.key / str(stage - 1) / "model"), "model_config": {}} if stage else {}
        (place / "recipe.yaml").write_text(yaml.safe_dump({**values, **dataset, **previous}), encoding="utf-8")
        script = ["-m", "benchmarks.paper.train", "--recipe", str(place / "recipe.yaml"), "--output_dir", str(place)]
        cpu = [] if torch.accelerator.is_available() else ["--cpu"]
        launch = ["-m", "accelerate.commands.launch", "--num_processes", str(processes), *cpu, *launch_options]
        launched = launch if processes > 1 or launch_options else []
        commands.append(
            [sys.executable, *launched, *script, "--resume_from_checkpoint", "latest", *job.options(), *options]
        )
    return Work(commands, folder / f"{job.key}.log", job.key)


def _result(job: Job, folder: Path) -> Result:
    last = folder / job.key / str(len(job.stages()) - 1)
    rows = [json.loads(line) for line in (last / "history.jsonl").read_text(encoding="utf-8").splitlines()]
    top1, top5, loss, seconds = ([row[name] for row in rows] for name in ("top1", "top5", "loss", "seconds"))
    config = {**job.config, "dataset": without_local_path(job.config["dataset"])}
    ran_on = json.loads((last / RAN_ON).read_text(encoding="utf-8"))
    return Result(job.key, job.scale, job.seed, config, top1, top5, loss, seconds, **ran_on)
