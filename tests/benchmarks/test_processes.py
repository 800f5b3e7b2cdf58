"""Scripts as processes: all run, what fails is named, nothing outlives the one that started them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common.processes import Work, run_all

ROOT = Path(__file__).parents[2]


def python(code):
    return [sys.executable, "-c", code]


def test_what_fails_is_named_and_the_rest_goes_on(tmp_path, capsys):
    bad = Work(
        [python("print('why'); raise SystemExit(3)"), python("open('never', 'w')")], tmp_path / "bad.log", "bad"
    )
    good = Work([python("print(1)"), python("print(2)")], tmp_path / "logs" / "good.log", "good")
    done = []
    failed = run_all("runs", [bad, good], 2, lambda work: done.append(work.name))
    assert len(failed) == 1
    assert f"failed with 3; what it printed is in {tmp_path / 'bad.log'}." in failed[0]
    assert failed[0] in capsys.readouterr().err
    assert done == ["good"]
    assert (tmp_path / "bad.log").read_text() == "why\n"
    assert good.log.read_text() == "1\n2\n"


def test_the_runs_take_the_devices_and_share_the_cores(tmp_path):
    shown = "os.environ.get('CUDA_VISIBLE_DEVICES'), os.environ['OMP_NUM_THREADS']"
    code = f"import os, time; time.sleep(0.5); print({shown})"
    works = [Work([python(code)], tmp_path / str(index)) for index in range(4)]
    assert run_all("runs", works, 2, devices=("0", "1,2")) == []
    printed = [work.log.read_text().split() for work in works]
    assert {device for device, _ in printed} == {"0", "1,2"}
    assert {threads for _, threads in printed} == {str(max(1, os.cpu_count() // 2))}


def test_a_killed_runner_leaves_no_process_behind(tmp_path):
    code = f"""
import sys; sys.path.append({str(ROOT)!r})
from pathlib import Path
from benchmarks.common.processes import Work, run_all
sleep = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
run_all("runs", [Work([[sys.executable, "-c", sleep]] * 2, Path({str(tmp_path)!r}) / "log")], 1)
"""
    runner = subprocess.Popen(python(code), stdout=subprocess.DEVNULL)
    log = tmp_path / "log"
    until = time.monotonic() + 30
    while not (log.exists() and log.read_text()) and time.monotonic() < until:
        time.sleep(0.1)
    child = int(log.read_text())
    runner.send_signal(signal.SIGTERM)
    assert runner.wait(30) == 128 + signal.SIGTERM
    assert not Path(f"/proc/{child}").exists()
    assert len(log.read_text().split()) == 1
