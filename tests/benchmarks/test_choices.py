"""Cells are chosen by the validation rows, and final runs are made with them from fresh seeds."""

import sys

import pytest

from benchmarks import ROOT
from benchmarks.common.records import RunRecord, add_record, read_records
from benchmarks.paper import __main__ as command
from benchmarks.paper import catalogue, choices, evidence_layers, evidence_time, report
from benchmarks.paper.catalogue import ALL, PLANNED, refuse_stale_choice
from benchmarks.paper.choices import (
    arm_of,
    choose,
    count_planned,
    final_runs,
    name_at,
    planned,
    read,
    remember,
    split_name,
)
from benchmarks.paper.experiments import VIT_SMALL
from benchmarks.paper.summary import Arm
from benchmarks.verify.stored import RESULTS

NAME = "evidence_tuning_cifar10"
TUNING = ALL[NAME]
BEST = {
    "vanilla": "vanilla, lr 0.002",
    "DualPatchNorm": "DualPatchNorm, lr 0.0226",
    "TrAct": "TrAct 0.8, lr 0.004",
    "matched start, TrAct": "matched start, TrAct 0.1, lr 0.001",
}


def runs(without=(), seeds=(50, 51)):
    """Runs of each cell, all alike but for the best of each arm, and another that is better by one seed alone."""
    found = {}
    for job in TUNING.jobs("small"):
        if job.arm not in without and job.seed in seeds:
            top1 = 0.6 if job.arm in BEST.values() else 0.5
            if job.arm == "vanilla, lr 0.004":
                top1 = 0.65 if job.seed == 50 else 0.5
            found[job.key] = RunRecord(job.key, job.arm, {}, job.seed, {"top1": [0.9, top1]}, [1.0, 2.0], command="x")
    return found


@pytest.mark.parametrize(
    ("cell", "arm"),
    [
        ("vanilla, lr 0.00141", "vanilla"),
        ("TrAct 0.8, lr 0.001", "TrAct"),
        ("matched start, TrAct 0.1, lr 0.016", "matched start, TrAct"),
        ("whitened coordinates, lr 0.002", "whitened coordinates"),
        ("all layers, 1, lr 0.04", "all layers"),
        ("and first block, 0.1, lr 0.004", "and first block"),
    ],
)
def test_a_cell_is_named_after_its_arm(cell, arm):
    assert arm_of(cell) == arm


@pytest.mark.parametrize("name", [name for name in PLANNED if name.startswith("evidence_tuning_")])
def test_every_arm_of_a_tuning_has_as_many_cells(name):
    counts = {}
    for cell in PLANNED[name].arms:
        counts[arm_of(cell)] = counts.get(arm_of(cell), 0) + 1
    assert len(set(counts.values())) == 1
    assert len(counts) >= 3


def test_the_best_cell_of_each_arm_is_chosen_by_its_last_epoch():
    found = {choice.arm: choice for choice in choose(TUNING, "small", runs())}
    assert {arm: choice.cell for arm, choice in found.items()} == BEST
    assert {arm: choice.at_edge for arm, choice in found.items()} == {
        "vanilla": False,
        "DualPatchNorm": True,
        "TrAct": False,
        "matched start, TrAct": True,
    }


def test_nothing_is_chosen_before_the_last_cell():
    with pytest.raises(SystemExit, match=r"seed 50 of TrAct 0\.1, lr 0\.016 is missing"):
        choose(TUNING, "small", runs(without=["TrAct 0.1, lr 0.016"]))
    with pytest.raises(SystemExit, match=r"seed 51 of DualPatchNorm, lr 0\.001 is missing"):
        choose(TUNING, "small", runs(seeds=[50]))


def test_the_first_seed_tries_every_cell_and_the_second_the_best_two_of_each_arm():
    first = planned(TUNING, "small", {})
    assert {job.seed for job in first} == {50}
    assert len(first) == len(TUNING.arms) == 40
    assert planned(TUNING, "small", runs(without=["vanilla, lr 0.001"])) == first
    second = planned(TUNING, "small", runs(seeds=[50]))[40:]
    assert {job.seed for job in second} == {51}
    assert {job.arm for job in second} == {
        *BEST.values(),
        "vanilla, lr 0.004",
        "DualPatchNorm, lr 0.001",
        "TrAct 0.1, lr 0.001",
        "matched start, TrAct 0.8, lr 0.001",
    }
    assert count_planned(TUNING, "small") == 48


def test_a_cell_that_one_seed_alone_tried_is_not_chosen():
    """Its one score may be luck, even where it is above the mean of a finalist."""
    have = runs()
    for job in TUNING.jobs("small"):
        if job.seed == 51:
            have[job.key].curve["top1"][-1] = 0.3
    found = {choice.arm: choice.cell for choice in choose(TUNING, "small", have)}
    assert found["vanilla"] == "vanilla, lr 0.004"
    assert {**found, "vanilla": BEST["vanilla"]} == BEST


def test_the_command_runs_the_finalists_behind_the_first_seed(tmp_path, monkeypatch):
    rounds = []

    def finish(jobs, file, launch):
        rounds.append({job.seed for job in jobs if job.key not in read_records(file)})
        for record in runs(seeds=rounds[-1]).values():
            add_record(file, record)
        return []

    monkeypatch.setattr(command.runner, "run", finish)
    results = str(tmp_path / "x.jsonl")
    monkeypatch.setattr(sys, "argv", ["benchmarks.paper", "run", NAME, "--results", results])
    command.main()
    assert rounds == [{50}, {51}]


def test_final_runs_have_the_chosen_cells_and_whole_lengths(tmp_path, monkeypatch):
    file = tmp_path / "chosen.yaml"
    file.write_text("{}\n")
    remember("another", [choices.Choice("a", "a, lr 1", 0.5, False)], file)
    remember(NAME, choose(TUNING, "small", runs()), file)
    assert read(file) == {"another": {"a": "a, lr 1"}, NAME: BEST}
    monkeypatch.setattr(choices, "read", lambda: {NAME: BEST})
    assert final_runs("title", "not chosen", TUNING, VIT_SMALL, range(200, 208)) is None
    made = final_runs("title", NAME, TUNING, VIT_SMALL, range(200, 208), (33, 47, 67, 100))
    assert next(iter(made.arms)) == "vanilla, 100 % of the epochs"
    jobs = list(made.jobs("small"))
    assert len(jobs) == 4 * 4 * 8
    assert {job.seed for job in jobs} == set(range(200, 208))
    lengths = {job.config["epochs"] for job in jobs if job.arm.startswith("TrAct")}
    assert lengths == {5, 7, 10, 15}
    for job in jobs:
        arm = job.arm.rpartition(", ")[0]
        wanted = TUNING.arms[BEST[arm]]
        assert {name: job.config[name] for name in wanted if name != "epochs"} == {
            name: value for name, value in wanted.items() if name != "epochs"
        }
        assert "validation_samples" not in job.config
    plain = final_runs("title", NAME, TUNING, VIT_SMALL, range(200, 208))
    assert list(plain.arms) == list(BEST)


def test_arms_of_one_length_are_neighbours_and_take_turns_to_be_the_first(monkeypatch):
    monkeypatch.setattr(choices, "read", lambda: {NAME: BEST})
    made = final_runs("title", NAME, TUNING, VIT_SMALL, range(200, 208), (33, 100))
    jobs = [job for job in made.jobs("small") if job.seed == 201]
    lengths = [split_name(job.arm)[1] for job in jobs]
    assert lengths == ["100 % of the epochs"] * 4 + ["33 % of the epochs"] * 4
    turned = [*list(BEST)[1:], "vanilla"]
    assert [split_name(job.arm)[0] for job in jobs] == turned * 2


def test_final_runs_are_refused_where_the_tuning_chooses_otherwise_by_now(monkeypatch):
    monkeypatch.setattr(catalogue, "read", lambda: {NAME: BEST})
    refuse_stale_choice("evidence_cifar10", "small", runs())
    refuse_stale_choice("evidence_step_size", "small", {})
    have = runs()
    for job in TUNING.jobs("small"):
        if job.arm == "vanilla, lr 0.004":
            have[job.key].curve["top1"][-1] = 0.7
    with pytest.raises(SystemExit, match="evidence_cifar10: evidence_tuning_cifar10 chooses other cells by now"):
        refuse_stale_choice("evidence_cifar10", "small", have)
    with pytest.raises(SystemExit, match="is missing; `run` makes it"):
        refuse_stale_choice("evidence_cifar10", "small", {})


def test_vanillas_longest_runs_set_the_goal_with_a_rate_of_their_own(monkeypatch):
    """It is chosen among the neighbours of the rate that is the best for shorter runs; all else stays as it is."""
    monkeypatch.setattr(evidence_time, "read", lambda: {NAME: BEST})
    asked = evidence_time.goal("CIFAR-10", NAME, VIT_SMALL)
    rate = TUNING.arms[BEST["vanilla"]]["learning_rate"]
    tried = [arm["learning_rate"] for arm in asked.arms.values()]
    assert tried == pytest.approx([rate * 2 ** (step / 2) for step in range(-2, 3)])
    assert {job.config["epochs"] for job in asked.jobs("small")} == {15}
    monkeypatch.setattr(evidence_time, "read", lambda: {})
    assert evidence_time.goal("CIFAR-10", NAME, VIT_SMALL) is None
    assert evidence_time.final("CIFAR-10", NAME, "evidence_goal_cifar10", VIT_SMALL) is None
    lowest = next(iter(asked.arms))
    chosen = {NAME: BEST, "evidence_goal_cifar10": {"vanilla": lowest}}
    for module in (choices, evidence_time, catalogue):
        monkeypatch.setattr(module, "read", lambda: chosen)
    monkeypatch.setitem(evidence_time.GOALS, "evidence_goal_cifar10", asked)
    made = evidence_time.final("CIFAR-10", NAME, "evidence_goal_cifar10", VIT_SMALL)
    plain = final_runs("title", NAME, TUNING, VIT_SMALL, evidence_time.SEEDS, evidence_time.SHARES)
    longest = name_at("vanilla", 100)
    assert made.arms[longest] == plain.arms[longest] | {"learning_rate": tried[0]}
    # Its shorter runs have that rate too, beside their own.
    beside = []
    for share in reversed(evidence_time.SHARES[:-1]):
        beside.append(name_at(evidence_time.AT_GOALS_RATE, share))
        assert made.arms[beside[-1]] == plain.arms[name_at("vanilla", share)] | {"learning_rate": tried[0]}
    assert list(made.arms) == [*plain.arms, *beside]
    assert made.arms | plain.arms == made.arms | {longest: plain.arms[longest]}
    chosen["evidence_goal_cifar10"] = {"vanilla": BEST["vanilla"]}
    assert evidence_time.final("CIFAR-10", NAME, "evidence_goal_cifar10", VIT_SMALL).arms == plain.arms
    chosen["evidence_goal_cifar10"] = {"vanilla": lowest}
    monkeypatch.setitem(catalogue.ALL, "evidence_goal_cifar10", asked)
    have = runs()
    for job in asked.jobs("small"):
        have[job.key] = RunRecord(job.key, job.arm, {}, job.seed, {"top1": [job.arm == lowest]}, [1.0])
    refuse_stale_choice("evidence_cifar10", "small", have)
    chosen["evidence_goal_cifar10"] = {"vanilla": "another"}
    with pytest.raises(SystemExit, match="evidence_goal_cifar10 chooses other cells by now"):
        refuse_stale_choice("evidence_cifar10", "small", have)


def test_a_choice_that_names_a_cell_of_before_makes_no_final_runs(monkeypatch):
    monkeypatch.setattr(choices, "read", lambda: {NAME: {**BEST, "vanilla": "vanilla, lr 7"}})
    assert final_runs("title", NAME, TUNING, VIT_SMALL, range(200, 208)) is None


def test_the_report_of_a_choice_shows_every_cell_and_what_is_chosen(tmp_path):
    for record in runs().values():
        add_record(tmp_path / "evidence.jsonl", record)
    text = report.write("small", tmp_path / "evidence.jsonl", tmp_path).read_text()
    assert "| vanilla, lr 0.002 | 2 | 60.0 | yes |" in text
    assert "| DualPatchNorm, lr 0.0226 | 2 | 60.0 | yes, at the edge of the grid |" in text
    assert "| vanilla, lr 0.001 | 2 | 50.0 |  |" in text


def test_whole_runs_are_compared_at_equal_lengths_without_a_speed_up_along_a_run(monkeypatch):
    monkeypatch.setitem(report.OF_WHOLE_RUNS, "evidence_cifar10", TUNING)
    settings = {"epochs": 2, "train_samples": 20_000, "batch_size": 128}
    arms = {}
    for share in (100, 33):
        for name, top1 in (("vanilla", 0.5), ("TrAct", 0.51)):
            arm = arms[name_at(name, share)] = Arm()
            for seed in range(2):
                curve = {"top1": [0.1, top1 + share / 1000 + seed / 100]}
                arm.runs[seed] = RunRecord("key", name, settings, seed, curve, [78.0, 156.0], command="x")
    lines = report._tables("evidence_cifar10", arms, "")
    heads = [line for line in lines if line.startswith("| arm")]
    assert heads == ["| arm | epochs | seeds | top-1 | gain | p | ms a step | minutes |"] * 2
    gained = [line for line in lines if line.startswith("| TrAct")]
    assert len(gained) == 2
    for line in gained:
        assert "| +1.0 ± 0.0 |" in line
        assert line.endswith("| 500 | 2.6 |")


def test_runs_that_shared_devices_tell_no_times(tmp_path, monkeypatch):
    """Neither as a table nor as a plot."""
    drawn = []
    axis_of_time = report.plots._lines

    def lines(axis, arms, chosen, over_time):
        drawn.append(over_time)
        axis_of_time(axis, arms, chosen, over_time)

    monkeypatch.setattr(report.plots, "_lines", lines)
    settings = {"epochs": 2, "train_samples": 20_000, "batch_size": 128}
    arms = {}
    for name, top1 in (("vanilla", 0.5), ("TrAct", 0.51)):
        arms[name] = Arm({1: RunRecord("key", name, settings, 1, {"top1": [0.1, top1]}, [1.0, 2.0])})
    text = "\n".join(report._section("evidence_adamw", PLANNED["evidence_adamw"], {"": arms}, tmp_path / "page"))
    assert "| arm | epochs | seeds | top-1 | gain | p | from TrAct | p |" in text
    assert "Times are not compared" in text
    assert "by epochs, on the right the final accuracy](page.png)" in text
    assert drawn == [False]
    long = "\n".join(report._section("evidence_long", PLANNED["evidence_long"], {"": arms}, tmp_path / "page"))
    assert drawn == [False, False, True]
    assert "| arm | epochs | seeds | top-1 | gain | p |\n" in long


def test_runs_that_measure_time_are_shared_with_no_other_experiment(monkeypatch):
    """Those of another day would be no measure, so their seeds are their own."""
    tunings = {name: made for name, made in PLANNED.items() if name.startswith("evidence_tuning_")}
    first = {name: {arm_of(cell): cell for cell in made.arms} for name, made in tunings.items()}
    monkeypatch.setattr(choices, "read", lambda: first)
    seeds = {"cifar10": evidence_time, "flowers": evidence_time}
    seeds |= {"vit_layers": evidence_layers, "resnet_layers": evidence_layers}
    timed = {}
    for name, module in seeds.items():
        tuned = f"evidence_tuning_{name}"
        made = final_runs("title", tuned, tunings[tuned], VIT_SMALL, module.SEEDS, module.SHARES)
        timed[name] = {(job.seed, job.setting, job.arm) for job in made.jobs("small")}
        assert not {seed for seed, *_ in timed[name]} & set(range(200))
    assert not {seed for seed, *_ in timed["cifar10"]} & {seed for seed, *_ in timed["vit_layers"]}
    for name, made in PLANNED.items():
        if name.removeprefix("evidence_") not in seeds:
            assert made.first_seed + made.small_seeds <= 200


def test_arms_at_the_edge_of_their_grid_are_told(monkeypatch):
    monkeypatch.setattr(catalogue, "read", lambda: {NAME: BEST})
    assert catalogue.edges("evidence_cifar10") == ["DualPatchNorm", "matched start, TrAct"]
    assert catalogue.edges("evidence_step_size") == []
    goal = {"evidence_goal_cifar10": {"vanilla": next(iter(catalogue.ALL["evidence_goal_cifar10"].arms))}}
    monkeypatch.setattr(catalogue, "read", lambda: goal)
    assert catalogue.edges("evidence_cifar10") == ["vanilla in its longest runs"]


def test_the_command_writes_the_choices(tmp_path, monkeypatch, capsys):
    results = tmp_path / "x.jsonl"
    for record in runs().values():
        add_record(results, record)
    told = []
    monkeypatch.setattr(command, "remember", lambda name, chosen: told.append((name, len(chosen))))
    monkeypatch.setattr(sys, "argv", ["benchmarks.paper", "choose", NAME, "--results", str(results)])
    command.main()
    printed = capsys.readouterr().out
    assert told == [(NAME, 4)]
    assert "is at the edge" in printed
    assert "Written to benchmarks/paper/chosen.yaml: commit it" in printed


def test_what_was_chosen_is_a_cell_of_its_tuning():
    """And is chosen before its final runs are stored."""
    stored = {record.seed for record in read_records(RESULTS / "evidence.jsonl").values()}
    assert read() or not stored & {*evidence_time.SEEDS, *evidence_layers.SEEDS}
    for name, arms in read().items():
        for arm, cell in arms.items():
            assert arm_of(cell) == arm
            assert cell in ALL[name].arms
    assert (ROOT / "benchmarks" / "paper" / "chosen.yaml").read_text().startswith(choices.HEAD)
