"""The paper's experiments: recipes as in docs/results/paper.md, every arm runs, the report tells what came out."""

import dataclasses
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy import stats

from benchmarks import ROOT
from benchmarks.common.processes import Work
from benchmarks.common.records import RunRecord, add_record, read_records
from benchmarks.common.statistics import Interval
from benchmarks.paper import __main__ as command
from benchmarks.paper import plots, report, runner, train
from benchmarks.paper.beyond import BEYOND
from benchmarks.paper.catalogue import ALL, PLANNED
from benchmarks.paper.choices import FRESH_SEED
from benchmarks.paper.cifar_models import cifar_model
from benchmarks.paper.evidence import EVIDENCE
from benchmarks.paper.experiment import Experiment, Job
from benchmarks.paper.experiments import CIFAR100, EXPERIMENTS
from benchmarks.paper.layers import first_layer
from benchmarks.paper.runner import Launch
from benchmarks.paper.summary import Arm, collect, gain, holm, speed_up, speed_up_in_time
from benchmarks.training.recipe import Recipe
from helpers.environments import reset_accelerate

PAPER = (ROOT / "docs" / "results" / "paper.md").read_text()
SECTIONS = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##)", PAPER, re.S | re.M))


# What a recipe that says nothing has.
DEFAULTS = {
    each.name: each.default if each.default is not dataclasses.MISSING else each.default_factory()
    for each in dataclasses.fields(Recipe)
}


def value(cell):
    """A cell of a table: YAML, and numbers as the paper writes them."""
    if power := re.fullmatch(r"10\^(-[\d.]+)", cell):
        return 10 ** float(power[1])
    return yaml.safe_load(cell.replace("1/255", str(1 / 255)))


def table(text, first):
    """The rows of the table whose first column has that name, as dicts without empty cells."""
    lines = re.search(rf"^\| {first} \|.*\n(?:\|.*\n)+", text, re.M)
    if not lines:
        return []
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[0].splitlines()]
    return [{key: cell for key, cell in zip(head, row, strict=True) if cell} for row in rows]


def fields(name):
    rows = {row["field"]: row["value"] for row in table(SECTIONS[name], "field")}
    return {**(fields(rows.pop("like")) if "like" in rows else {}), **rows}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_full_recipe_is_the_papers_field_by_field(name):
    told, experiment = fields(name), EXPERIMENTS[name]
    settings = {row.pop("setting"): row for row in table(SECTIONS[name], "setting")}
    arms = {row.pop("arm"): row for row in table(SECTIONS[name], "arm")}
    assert (list(settings), list(arms)) == (list(experiment.settings), list(experiment.arms))
    for setting, arm in ((setting, arm) for setting in settings for arm in arms):
        config = experiment.config("full", setting, arm)
        expected = {key: value(cell) for key, cell in {**told, **settings[setting], **arms[arm]}.items()}
        if expected.get("no_tract") and "lam" not in arms[arm]:
            expected["lam"] = config["lam"]  # which makes no difference
        expected, config = {**DEFAULTS, **expected}, {**DEFAULTS, **config}
        assert expected.keys() == config.keys()
        for key, wanted in expected.items():
            assert config[key] == (pytest.approx(wanted) if isinstance(wanted, float | list) else wanted), (
                setting,
                arm,
                key,
            )


def test_the_papers_means_are_all_there():
    rows = table(PAPER[PAPER.index("### CIFAR-100\n") :], "model")
    assert len(rows) == 36 + 1
    means = {row["model"]: float(row["vanilla top-1"].split()[0]) for row in rows}
    average = means.pop("average (average deviation)")
    assert np.mean(list(means.values())) == pytest.approx(average, abs=0.01)
    left_out = SECTIONS["cifar100"].split("why it is left out")[1]
    assert all((name in CIFAR100) != bool(re.search(rf"[ ,|]{re.escape(name)}[ ,|]", left_out)) for name in means)


@pytest.mark.parametrize("name", CIFAR100)
def test_the_models_of_cifar100_have_the_stem_of_a_small_image(name):
    with torch.device("meta"):
        setting = CIFAR100[name]
        model = cifar_model(setting["model"], 100, setting["model_config"]).eval()
        first = model.get_submodule(first_layer(model))
        seen = []
        first.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 100)
    assert (first.kernel_size, first.stride) == ((3, 3), (1, 1))
    assert seen[0][2:] == (32, 32)


def test_a_run_that_two_experiments_ask_for_is_one():
    keys = [
        {job.key for job in EXPERIMENTS[name].jobs("small")} for name in ("cifar10_vit", "lambda_sweep", "baselines")
    ]
    assert len(keys[0]) == 12
    assert len(keys[0] & keys[1]) == 12
    assert len(keys[0] & keys[2]) == 6
    seeds = [job.seed for job in EXPERIMENTS["baselines"].jobs("small") if job.arm == "torch_tract 0.1"]
    assert seeds == [0]
    short = [job.config["epochs"] for job in EXPERIMENTS["speed_up"].jobs("small", seeds=1)]
    assert short == [15, 10]


def small_enough(experiment: Experiment) -> Experiment:
    """Replaces ResNet-50, which takes longer than all other runs together, by ResNet-18."""
    if "ResNet-50; 30 epochs" in experiment.few:
        return dataclasses.replace(experiment, few=("ResNet-18; 30 epochs",))
    return experiment


SWEPT = [small_enough(experiment) for experiment in [*EXPERIMENTS.values(), BEYOND["beyond_vit"]]]
SWEPT += PLANNED.values()


def run_here(what, todo, at_once, done, devices, imported):
    """Does what `processes.run_all` does, without an interpreter for each run."""
    for work in todo:
        for _, _, module, *options in work.commands:
            assert module in imported
            assert module == "benchmarks.paper.train"
            with pytest.MonkeyPatch.context() as monkeypatch:
                monkeypatch.setattr(sys, "argv", [module, *options])
                train.main()
            reset_accelerate()
        done(work)
    return []


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Runs every experiment of the paper and each arm beyond it at the smoke scale."""
    folder = tmp_path_factory.mktemp("paper")
    jobs = [job for experiment in SWEPT for job in experiment.jobs("smoke")]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(runner, "run_all", run_here)
        runner.run(jobs, folder / "smoke.jsonl", Launch(folder / "smoke"))
    return folder


def keys(experiments: Iterable[Experiment]) -> set[str]:
    return {job.key for experiment in experiments for job in experiment.jobs("smoke")}


def assert_whole(folder: Path) -> dict[str, RunRecord]:
    """Returns the results of a folder, after a look at each."""
    have = read_records(folder / "smoke.jsonl")
    for result in have.values():
        lengths = {len(values) for values in (*result.curve.values(), result.seconds)}
        assert lengths == {result.settings["epochs"]}
        assert all(np.isfinite(result.curve["loss"]))
        assert len(result.data) == 12
        assert result.versions["torch"] == torch.__version__.split("+")[0]
    assert not [path for path in (folder / "smoke").iterdir() if path.is_dir()]
    return have


def test_every_arm_of_every_experiment_runs(smoke):
    assert assert_whole(smoke).keys() == keys(SWEPT)


def run_command(monkeypatch, folder: Path, *experiments: str) -> dict[str, RunRecord]:
    """Returns what the command leaves, which starts an interpreter for each run."""
    arguments = ["run", *experiments, "--scale", "smoke", "--jobs", "2", "--output_dir", str(folder)]
    monkeypatch.setattr(sys, "argv", [command.__file__, *arguments])
    command.main()
    have = assert_whole(folder)
    told = f"python -m benchmarks.paper run {' '.join(experiments)} --scale smoke"
    assert all(result.command.startswith(told) for result in have.values())
    return have


def test_the_command_runs_an_experiment_in_a_process_of_its_own(tmp_path, monkeypatch):
    have = run_command(monkeypatch, tmp_path, "learning_rate")
    assert have.keys() == keys([EXPERIMENTS["learning_rate"]])


@pytest.mark.slow
def test_the_command_runs_every_arm_of_every_experiment(tmp_path, monkeypatch):
    have = run_command(monkeypatch, tmp_path, "all", "beyond_vit")
    assert have.keys() == keys([*EXPERIMENTS.values(), BEYOND["beyond_vit"]])


def test_torch_tract_takes_the_same_steps(smoke):
    """Its arm and ours from one seed differ by rounding alone."""
    have = read_records(smoke / "smoke.jsonl")
    jobs = {job.arm: job.key for job in EXPERIMENTS["baselines"].jobs("smoke")}
    ours, theirs, vanilla = (
        np.array(have[jobs[arm]].curve["loss"]) for arm in ("TrAct 0.1", "torch_tract 0.1", "vanilla")
    )
    assert abs(ours - theirs).max() < abs(vanilla - theirs).max() / 20


def test_what_is_done_is_not_done_again(smoke, monkeypatch):
    asked = []
    monkeypatch.setattr(runner, "run_all", lambda what, todo, *rest: asked.extend(todo) or [])
    jobs = list(EXPERIMENTS["cifar10_vit"].jobs("smoke", seeds=2))
    assert runner.run(jobs, smoke / "smoke.jsonl", Launch(smoke / "again")) == []
    assert [work.name for work in asked] == [job.key for job in jobs if job.seed == 1]


def test_a_run_is_launched_with_its_data_its_processes_and_its_stages(tmp_path, monkeypatch):
    asked: list[Work] = []
    monkeypatch.setattr(runner, "run_all", lambda what, todo, *rest: asked.extend(todo) or [])
    job = next(iter(EXPERIMENTS["imagenet_deit3"].jobs("full")))
    places = {"ILSVRC/imagenet-1k": "/data/imagenet"}
    launch = Launch(tmp_path, places, processes=8, options=["--num_workers", "4"])
    runner.run([job], tmp_path / "x.jsonl", launch)
    first, second = asked[0].commands
    assert first[3:5] == ["--num_processes", "8"]
    assert first[-2:] == ["--num_workers", "4"]
    assert "--no_tract" in first
    recipes = [yaml.safe_load((tmp_path / job.key / stage / "recipe.yaml").read_text()) for stage in "01"]
    assert recipes[0]["dataset"] == recipes[1]["dataset"] == "/data/imagenet"
    assert recipes[1]["model"] == str(tmp_path / job.key / "0" / "model")
    assert "--save_model" in first
    assert "--save_model" not in second


def test_a_donor_is_trained_once_and_by_another_seed(tmp_path, monkeypatch):
    asked: list[Work] = []
    monkeypatch.setattr(runner, "run_all", lambda what, todo, *rest: asked.extend(todo) or [])
    jobs = [job for job in EVIDENCE["evidence_step_size"].jobs("small") if job.arm.startswith("first layer of")]
    assert {job.seed for job in jobs} == set(range(FRESH_SEED, FRESH_SEED + 10))
    runner.run(jobs, tmp_path / "x.jsonl", Launch(tmp_path, {"uoft-cs/cifar10": "/data"}, keep=True))
    vanilla, tract, first, second = asked[:4]
    assert len(asked) == 2 + len(jobs)
    assert "--no_tract" in vanilla.commands[0]
    assert "--no_tract" not in tract.commands[0]
    for donor, run in ((vanilla, first), (tract, second)):
        folder = tmp_path / "donors" / donor.name
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
        assert recipe["seed"] < FRESH_SEED
        assert recipe["dataset"] == "/data"
        assert recipe["whiten_init"] is (donor is tract) if "whiten_init" in recipe else donor is vanilla
        assert run.commands[0][-1] == str(folder / "model")


def made_up(job: Job, top1: list[float]) -> RunRecord:
    curve = {"top1": top1}
    record = RunRecord(job.key, job.arm, job.config, job.seed, curve, [60.0, 120.0, 180.0], command="x")
    return dataclasses.replace(record, versions={"torch": "2"}, hardware="a CPU")


def made_up_results(scale="small"):
    curves = {"vanilla": [0.3, 0.4, 0.5], "TrAct 0.1": [0.4, 0.5, 0.6]}
    made = {}
    for job in EXPERIMENTS["cifar10_vit"].jobs(scale):
        if job.arm in curves:
            extra = 0.01 * job.seed * (2 if job.arm == "TrAct 0.1" else 1)
            made[job.key] = made_up(job, [value + extra for value in curves[job.arm]])
    return made


def test_the_gain_is_paired_and_the_speed_up_is_of_the_mean_curves():
    found = collect(EXPERIMENTS["cifar10_vit"], "small", 3, made_up_results())[""]
    difference = gain(found["TrAct 0.1"], found["vanilla"])
    points = [10, 11, 12]  # by seed
    assert difference.mean == pytest.approx(11)
    assert difference.half_width == pytest.approx(stats.t.ppf(0.975, 2) * np.std(points, ddof=1) / np.sqrt(3))
    assert difference.p == pytest.approx(stats.ttest_rel([60, 62, 64], [50, 51, 52]).pvalue)
    assert speed_up(found["TrAct 0.1"], found["vanilla"]) == 3 / 2
    assert speed_up(found["vanilla"], found["TrAct 0.1"]) is None
    later = {seed: run for seed, run in found["TrAct 0.1"].runs.items() if seed == 2}  # better than the other seeds
    assert speed_up(Arm(later), found["vanilla"]) == speed_up(Arm(later), Arm({2: found["vanilla"].runs[2]})) == 3 / 2
    one = {seed: run for seed, run in found["vanilla"].runs.items() if seed == 0}
    assert gain(Arm(one), Arm(one)) == Interval(0.0, None, None)


def curves_of(top1: list[list[float]], seconds: list[float]) -> Arm:
    job = next(EXPERIMENTS["cifar10_vit"].jobs("small"))
    runs = {seed: dataclasses.replace(made_up(job, values), seconds=seconds) for seed, values in enumerate(top1)}
    return Arm(runs)


def test_a_speed_up_in_time_is_of_seconds_and_has_the_interval_of_resampled_seeds():
    base = curves_of([[0.3, 0.4, 0.5], [0.3, 0.4, 0.6]], [10.0, 20.0, 30.0])
    slower = curves_of([[0.3, 0.5, 0.6], [0.3, 0.6, 0.7]], [20.0, 40.0, 60.0])
    # The arm passes the baseline in epoch 2 in every sample: a third fewer epochs, and yet more seconds.
    assert speed_up_in_time(slower, base) == (30 / 40, 30 / 40, 30 / 40)
    mixed = curves_of([[0.3, 0.4, 0.4], [0.7, 0.8, 0.8]], [10.0, 20.0, 30.0])
    found = speed_up_in_time(mixed, base)
    assert found.value == 30 / 20
    # A sample of the first seed alone never gets there, one of the second seed alone in the first epoch.
    assert (found.low, found.high) == (0, 3)
    assert speed_up_in_time(curves_of([[0.1, 0.1, 0.1]] * 2, [1.0, 2.0, 3.0]), base) is None
    assert speed_up_in_time(Arm({0: base.runs[0]}), base) is None


def test_seeds_beyond_the_plan_decide_nothing():
    name = "evidence_step_size"
    have = {}
    for job in ALL[name].jobs("small", 12):
        have[job.key] = RunRecord(job.key, job.arm, {}, job.seed, {"top1": [0.5]}, [1.0])
    for arm in collect(ALL[name], "small", report.seeds_of(name), have)[""].values():
        assert list(arm.runs) == list(range(100, 110))


def test_holm_multiplies_the_smallest_p_by_the_number_of_tests():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_report_has_table_plot_and_provenance(tmp_path):
    for result in made_up_results().values():
        add_record(tmp_path / "small.jsonl", result)
    text = report.write("small", tmp_path / "small.jsonl", tmp_path).read_text()
    assert "| TrAct 0.1 | 3 | 3 | 62.0 ± 5.0 | +11.0 ± 2.5 | 0.003 | 1.50 | 1.50 | 3.0 |" in text
    assert "6 by `x` on a CPU, with torch 2" in text
    for image in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (tmp_path / image).stat().st_size > 10_000


def test_a_crowded_plot_has_six_lines_and_every_arm_beside_them(tmp_path, monkeypatch):
    made = next(iter(made_up_results().values()))
    arms = {name: Arm({0: made}) for name in (*"abcdefgh", "reference")}
    monkeypatch.setattr(plots.plots, "save", lambda figure, path: figure)
    left, right = plots.curves("title", {"": arms}, "reference", tmp_path).axes
    lines = [text.get_text().split(":")[0] for text in left.get_legend().get_texts()]
    assert lines[:2] == ["a", "reference"]
    assert len(lines) == 6
    assert [label.get_text() for label in right.get_yticklabels()] == list(arms)


@pytest.mark.parametrize("name", ["small", "evidence"])
def test_the_stored_results_are_what_the_stored_report_says(name, tmp_path, monkeypatch):
    """The report in docs/results is that of the lines beside it, and no experiment's definition has changed since."""
    monkeypatch.setattr(report.plots, "curves", lambda title, settings, reference, path, timed: path)
    monkeypatch.setattr(report.plots, "sweep", lambda title, arms, path: path)
    stored = ROOT / "docs" / "results"
    text = report.write("small", stored / f"{name}.jsonl", tmp_path).read_text()
    assert text == (stored / f"{name}.md").read_text()
    wanted = set()
    for planned, experiment in ALL.items():
        seeds = None if planned in PLANNED else 20
        wanted.update(job.key for job in experiment.jobs("small", seeds))
    assert read_records(stored / f"{name}.jsonl").keys() <= wanted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nothing"], "nothing: there are cifar10_resnet18_sgd"),
        (["run", "all", "--scale", "tiny"], "argument --scale: invalid choice: 'tiny'"),
        (["run", "all", "--dataset", "/data"], "--dataset /data: it is NAME=FOLDER"),
        (["report", "--results", "none.jsonl"], "--results none.jsonl: there is no such file"),
    ],
)
def test_bad_arguments_are_told(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks.paper", *arguments])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert message in f"{ended.value} {capsys.readouterr().err}"
