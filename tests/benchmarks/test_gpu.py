"""gpu_report.sh runs every part, names those that fail, and stays under 8 minutes; gpu_checks can fail."""

import itertools
import json
import os
import re
import subprocess
import sys

import pytest
import torch

import hf_tract.core.preconditioner
import hf_tract.core.solve
from benchmarks import ROOT, gpu_checks

REPORT = ROOT / "benchmarks" / "gpu_report.sh"
CPU = torch.device("cpu")


def report(python, *arguments, **more) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": str(python)}
    command = ["bash", str(REPORT), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, **more)


def fake_python(tmp_path, lines: str):
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)
    return path


def test_a_part_that_fails_does_not_stop_the_others(tmp_path):
    python = fake_python(tmp_path, 'echo "ran $*"; case "$*" in *gpu_checks*) exit 3;; esac')
    done = report(python, tmp_path / "out", cwd=tmp_path)
    parts = re.findall(r"ran -m (\S+)", done.stdout)
    assert parts == ["benchmarks.overhead", "benchmarks.gpu_checks", "benchmarks.overhead", "benchmarks.overhead"]
    assert done.returncode == 1
    assert done.stdout.endswith("Failed:\n  checks: exit code 3\n")
    assert (tmp_path / "out" / "report.txt").read_text() == done.stdout


def test_a_report_without_failures_says_so(tmp_path):
    done = report(fake_python(tmp_path, "exit 0"), "out", "--smoke", cwd=tmp_path)
    assert done.returncode == 0
    assert "Every part passed." in (tmp_path / "out" / "report.txt").read_text()


def test_a_wrong_option_of_the_report_is_told():
    done = report("python", "--smok")
    assert done.returncode == 2
    assert "the only option is --smoke" in done.stderr


def test_the_limits_of_all_parts_are_under_eight_minutes():
    on_gpu = REPORT.read_text().split("\nelse\n")[1]
    limits = re.findall(r'(?:part|overhead) (?:"[^"]+"|\w+) (\d+) ', on_gpu)
    assert len(limits) == 6
    assert sum(map(int, limits)) < 480


@pytest.mark.slow
def test_the_report_runs_on_a_cpu(tmp_path):
    done = report(sys.executable, tmp_path, "--smoke")
    assert "== float32 took" in done.stdout
    assert {"gpu_checks.json", "overhead.json", "overhead.png", "report.txt"} <= set(os.listdir(tmp_path))
    assert done.stdout.endswith("Every part passed.\n")


@pytest.fixture
def as_on_an_accelerator(monkeypatch):
    monkeypatch.setattr(hf_tract.core.solve, "on_host", lambda _: False)
    monkeypatch.setattr(hf_tract.core.preconditioner, "on_host", lambda _: False)


def test_the_check_of_a_later_failure_sees_a_factor_that_stays_in_float32(as_on_an_accelerator, monkeypatch):
    rows = {row["check"]: row["passed"] for row in gpu_checks.later_failure(CPU)}
    assert len(rows) == 6
    assert all(rows.values())
    monkeypatch.setattr(hf_tract.core.preconditioner, "widest_dtype", lambda _: torch.float32)
    rows = {row["check"]: row["passed"] for row in gpu_checks.later_failure(CPU)}
    assert not rows["Linear: the next step, in float64"]


def test_the_deterministic_mode_is_left_again(monkeypatch):
    rows = list(gpu_checks.deterministic(CPU))
    assert len(rows) == 2 * len(gpu_checks.stems())
    assert all(row["passed"] for row in rows)
    other_each_time = itertools.count()
    monkeypatch.setattr(gpu_checks, "gradient", lambda *_: torch.tensor(next(other_each_time)))
    assert not any(row["passed"] for row in gpu_checks.deterministic(CPU))
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_check_that_fails_gives_the_exit_code_and_the_file(tmp_path, monkeypatch, capsys):
    rows = [gpu_checks._row("good", True, error=0.1), gpu_checks._row("bad", False, problem="it waits")]
    monkeypatch.setattr(gpu_checks, "checks", lambda *_: iter(rows))
    monkeypatch.setattr(sys, "argv", [gpu_checks.__file__, "--device", "cpu", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit, match="1 of 2 checks failed: bad"):
        gpu_checks.main()
    assert json.loads((tmp_path / "gpu_checks.json").read_text())["checks"] == rows
    assert "FAIL  bad  problem it waits" in capsys.readouterr().out
