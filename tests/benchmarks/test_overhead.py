"""overhead.py measures each arm, keeps its results, and says pass, fail or undecided by the intervals."""

import builtins
import json
import sys

import pytest

from benchmarks import overhead, overhead_results
from benchmarks.common.records import RunRecord, read_records
from benchmarks.overhead_results import ARMS, checks_of, print_table, print_verdicts, read_results

LAYER = "ViT @32 | layer | cpu | float32 | eager | 2"


def settings_of(**changes) -> dict:
    settings = {"model": "ViT-S/16", "scope": "step", "device": "cpu", "batch": 16, "precision": "float32"}
    settings.update(form="eager", channels_last=False, optimizer="sgd", left_out={})
    return {**settings, **changes}


def results_of(settings: dict, seconds: dict, peaks: dict | None = None) -> dict:
    """Return the results of one measurement from the seconds of each arm's turns."""
    result = {}
    for arm, turns in seconds.items():
        peak = [] if peaks is None else [peaks.get(arm, 0)]
        result[arm] = RunRecord(arm, arm, settings, 0, {"peak_bytes": peak}, turns)
    return {overhead_results.key_of(settings): result}


def verdicts(results: dict) -> list[str]:
    return [check.verdict for check in checks_of(results, list(results))]


def turns(middle: float, spread: float = 0.0) -> list[float]:
    return [middle - spread, middle + spread, middle] * 5


@pytest.mark.parametrize(
    "ours, spread, verdict",
    [(1.4, 0.0, "pass"), (1.44, 0.2, "undecided"), (1.6, 0.02, "fail")],
)
def test_a_layer_is_judged_by_what_torch_tract_adds(ours, spread, verdict):
    seconds = {"vanilla": turns(1.0), "hf-tract": turns(ours, spread), "torch_tract": turns(2.0)}
    for batch in (16, 256):
        assert verdicts(results_of(settings_of(scope="layer", batch=batch), seconds)) == [verdict]


@pytest.mark.parametrize(
    "changes", [{"model": "ResNet-50"}, {"model": "ViT-B/32", "batch": 256}, {"batch": 8}, {"device": "cuda"}]
)
def test_a_layer_without_a_bound_is_not_judged(changes):
    seconds = {"vanilla": turns(1.0), "hf-tract": turns(9.0), "torch_tract": turns(2.0)}
    assert verdicts(results_of(settings_of(**{"scope": "layer", **changes}), seconds)) == []


@pytest.mark.parametrize("layer_adds, verdict", [(0.01, "pass"), (0.05, "fail")])
def test_a_step_on_a_cpu_is_judged_by_its_layer_and_not_by_its_own_noise(layer_adds, verdict):
    step = results_of(settings_of(), {"vanilla": turns(2.0, 0.1), "hf-tract": turns(2.0, 0.2)})
    layer = results_of(settings_of(scope="layer"), {"vanilla": turns(0.1), "hf-tract": turns(0.1 + layer_adds)})
    (check,) = checks_of({**step, **layer}, list(step))
    assert check.verdict == verdict
    assert check.repeat == "ViT-S/16 | layer | cpu | float32 | eager | 16"
    (own,) = checks_of(step, list(step))
    assert own.verdict == "undecided"
    assert "by its own ratio" in own.text()


def test_a_step_on_a_gpu_is_judged_by_its_own_ratio():
    step = results_of(settings_of(device="cuda:0"), {"vanilla": turns(1.0), "hf-tract": turns(1.005)})
    layer = results_of(settings_of(device="cuda:0", scope="layer"), {"vanilla": turns(0.1), "hf-tract": turns(0.2)})
    (check,) = checks_of({**step, **layer}, list(step))
    assert check.verdict == "pass"


def test_too_much_memory_fails():
    seconds = {"vanilla": turns(1.0), "hf-tract": turns(1.005)}
    results = results_of(settings_of(), seconds, {"hf-tract": 2**30})
    assert verdicts(results) == ["pass", "fail"]


@pytest.mark.parametrize("ours, code", [(1.005, 0), (1.02, 1)])
def test_the_exit_code_says_the_verdict(ours, code, capsys):
    results = results_of(settings_of(), {"vanilla": turns(1.0), "hf-tract": turns(ours)})
    assert print_verdicts(results, list(results)) == code
    unmeasured = "Swin-T | step | cpu | float32 | eager | 16"
    assert print_verdicts(results, [*results, unmeasured]) == (code or 2)
    assert f"undecided: {unmeasured}: not measured" in capsys.readouterr().out


def test_an_arm_that_is_missing_is_no_failure_but_hf_tract_that_fails_is(capsys):
    left_out = {"torch_tract": "missing: torch_tract is not installed"}
    settings = settings_of(scope="layer", left_out=left_out)
    results = results_of(settings, {"vanilla": turns(1.0), "hf-tract": turns(1.1)})
    assert print_verdicts(results, list(results)) == 0
    print_table(results)
    out = capsys.readouterr().out
    assert "torch_tract missing: torch_tract is not installed" in out
    assert "| 1.100 (1.100-1.100) | missing |" in out
    failing = settings_of(left_out={"hf-tract": "fails: RuntimeError: no"})
    results = results_of(failing, {"vanilla": turns(1.0)})
    assert print_verdicts(results, list(results)) == 1


def run(monkeypatch, folder, *options: str) -> None:
    few = ["--models", "ViT @32", "--batch", "2", "--repeats", "7", "--warmup", "0", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [overhead.__file__, *few, *options, "--output_dir", str(folder)])
    overhead.main()


@pytest.fixture
def without_timing(monkeypatch):
    monkeypatch.setattr(overhead, "interleaved", lambda arms, *rest, **more: {name: [1.0] * 7 for name in arms})


def test_overhead_measures_prints_and_keeps_its_results(tmp_path, monkeypatch, capsys):
    for _ in range(2):
        run(monkeypatch, tmp_path, "--scopes", "layer")
    out = capsys.readouterr()
    assert out.err.count(f"{LAYER}, turns 1 to 7 ...") == 1  # the second time from the file
    records = read_records(tmp_path / "overhead.jsonl").values()
    assert {record.arm: len(record.seconds) for record in records} == dict.fromkeys(ARMS, 7)
    assert all(record.command.startswith("python -m benchmarks.overhead --models") for record in records)
    assert (tmp_path / "overhead.png").exists()
    assert "| ViT @32, layer, cpu, float32, eager, 2 |" in out.out
    (row,) = json.loads((tmp_path / "overhead.json").read_text())
    low, high = row["times_vanilla"]["vanilla again"][1:]
    assert 0 < low <= high
    assert row["added_over_torch_tract"] is not None
    assert row["turns"] == 7


def test_turns_of_other_code_are_neither_judged_nor_pooled(tmp_path, monkeypatch, without_timing):
    options = ["--scopes", "layer", "--no_memory"]
    run(monkeypatch, tmp_path, *options)
    monkeypatch.setattr(overhead, "environment", lambda: {"commit": "another"})
    with pytest.raises(
        SystemExit, match=r"overhead.jsonl holds measurements of commit '.*': name another --output_dir"
    ):
        run(monkeypatch, tmp_path, *options, "--check")
    with pytest.raises(SystemExit, match="holds measurements of commit"):
        run(monkeypatch, tmp_path, "--scopes", "layer", "step", "--no_memory")
    run(monkeypatch, tmp_path, *options)
    run(monkeypatch, tmp_path, *options, "--fresh")
    assert {record.commit for record in read_records(tmp_path / "overhead.jsonl").values()} == {"another"}


def test_what_is_undecided_gets_more_turns_until_the_time_is_over(tmp_path, monkeypatch, capsys, without_timing):
    said = iter(["undecided", "undecided", "pass", "pass"])

    class Check:
        repeat = LAYER

        def __init__(self):
            self.verdict = next(said)

        def text(self):
            return self.verdict

    monkeypatch.setattr(overhead_results, "checks_of", lambda results, keys: [Check()])
    monkeypatch.setattr(overhead_results, "write_json", lambda results, path: None)
    monkeypatch.setattr(overhead_results, "plot", lambda results, path: None)
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, tmp_path, "--scopes", "layer", "--no_memory", "--check")
    assert stopped.value.code == 0
    result = read_results(tmp_path / "overhead.jsonl")[LAYER]
    assert {len(record.seconds) for record in result.values()} == {21}
    assert "turns 15 to 21" in capsys.readouterr().err
    said = iter(["undecided"] * 9)
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, tmp_path, "--scopes", "layer", "--no_memory", "--check", "--max_minutes", "0")
    assert stopped.value.code == 2


def test_overhead_measures_without_torch_tract_and_matplotlib(tmp_path, monkeypatch, capsys, without_timing):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] in ("torch_tract", "matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    find_spec = overhead.importlib.util.find_spec
    missing = lambda name, *rest: None if name == "torch_tract" else find_spec(name, *rest)  # noqa: E731
    monkeypatch.setattr(overhead.importlib.util, "find_spec", missing)
    monkeypatch.delitem(sys.modules, "benchmarks.common.plots", raising=False)
    monkeypatch.delattr("benchmarks.common.plots", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    run(monkeypatch, tmp_path, "--scopes", "layer", "--no_memory")
    out = capsys.readouterr()
    assert "torch_tract is left out, missing: torch_tract is not installed" in out.err
    assert "No plot, since matplotlib is not installed." in out.out
    assert not (tmp_path / "overhead.png").exists()


@pytest.mark.parametrize("options", [("--optimizer", "adamw", "--channels_last"), ("--precision", "bf16")])
def test_a_step_runs_in_every_form(options, monkeypatch, tmp_path, without_timing):
    monkeypatch.setattr(overhead, "ARMS", ("vanilla", "hf-tract"))
    monkeypatch.setattr(overhead_results, "plot", lambda results, path: None)
    run(monkeypatch, tmp_path, "--scopes", "step", "--no_memory", *options)
    (result,) = read_results(tmp_path / "overhead.jsonl").values()
    assert set(result) == {"vanilla", "hf-tract"}


@pytest.mark.parametrize(
    "options, message",
    [
        (["--repeats", "3"], "--repeats 3: it must be at least 7."),
        (["--batch", "0"], "--batch 0: it must be at least 1."),
        (["--layer_batches", "16", "-1"], "--layer_batches -1: it must be at least 1."),
        (["--warmup", "-1"], "--warmup -1: it must not be negative."),
        (["--max_minutes", "nan"], "--max_minutes nan: it must not be negative."),
        (["--compile_mode", "reduce-overhead"], "nothing is compiled; add --compile."),
        (["--device", "tpu"], "--device tpu: it must be cpu, cuda, or one GPU such as cuda:1."),
        (["--device", "cuda:99"], "choose another one, or cpu."),
    ],
)
def test_a_wrong_option_is_told_in_a_sentence(options, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["overhead.py", *options])
    with pytest.raises(SystemExit) as stopped:
        overhead.parse()
    assert message in str(stopped.value.code)


def test_layers_are_measured_at_a_steps_batch_and_at_the_papers(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["overhead.py", "--models", "ViT-S/16", "ViT @32", "--device", "cpu"])
    found = [(each["model"], each["scope"], each["batch"]) for each in overhead.measurements(overhead.parse())]
    assert found == [
        ("ViT-S/16", "step", 16),
        ("ViT-S/16", "layer", 16),
        ("ViT-S/16", "layer", 256),
        ("ViT @32", "step", 128),
        ("ViT @32", "layer", 128),
    ]
