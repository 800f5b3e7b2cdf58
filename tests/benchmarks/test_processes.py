"""Scripts as processes: all run, what fails is named, nothing outlives the one that started them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.common.processes import Work, run_all

ROOT = Path(__file__).parents[2]
linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are copied on Linux alone")


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


def environment(folder):
    """Variables by which modules of a folder and of this project are found."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


@linux
def test_modules_are_imported_once_for_all_runs(tmp_path):
    (tmp_path / "slow.py").write_text(f"open({str(tmp_path / 'imports')!r}, 'a').write('once ')")
    (tmp_path / "job.py").write_text(
        "import os, sys, slow\n"
        "if __name__ == '__main__':\n"
        "    print(sys.argv[1:], os.environ['OMP_NUM_THREADS'], os.environ['CUDA_VISIBLE_DEVICES'], flush=True)\n"
        "    raise SystemExit(int(sys.argv[1]))\n"
    )
    code = f"""
import sys
from pathlib import Path
from benchmarks.common.processes import Work, run_all
works = []
for number in range(3):
    command = [sys.executable, "-m", "job", str(number)]
    works.append(Work([command], Path({str(tmp_path)!r}) / str(number), str(number)))
print(run_all("runs", works, 2, devices=["5"], imported=["job"]))
"""
    printed = subprocess.run(
        python(code), env=environment(tmp_path), capture_output=True, text=True, check=True
    ).stdout
    assert (tmp_path / "imports").read_text() == "once "
    share = max(1, os.cpu_count() // 2)
    for number in range(3):
        assert (tmp_path / str(number)).read_text() == f"['{number}'] {share} 5\n"
        assert (f"job {number} failed with {number};" in printed) == (number > 0)


@linux
def test_each_of_many_short_runs_has_its_own_exit_code(tmp_path):
    (tmp_path / "short.py").write_text("if __name__ == '__main__':\n    raise SystemExit(7)\n")
    code = f"""
import sys
from pathlib import Path
from benchmarks.common.processes import Work, run_all
works = [Work([[sys.executable, "-m", "short"]], Path({str(tmp_path)!r}) / str(n)) for n in range(300)]
print({{text.split(";")[0] for text in run_all("runs", works, 8, imported=["short"])}})
"""
    printed = subprocess.run(
        python(code), env=environment(tmp_path), capture_output=True, text=True, check=True
    ).stdout
    assert f"{{'{sys.executable} -m short failed with 7'}}" in printed


@pytest.mark.parametrize("imported", [False, pytest.param(True, marks=linux)])
def test_a_killed_runner_leaves_no_process_behind(tmp_path, imported):
    (tmp_path / "sleeper.py").write_text(
        "import os, time\nif __name__ == '__main__':\n    print(os.getpid(), flush=True)\n    time.sleep(60)\n"
    )
    code = f"""
import sys
from pathlib import Path
from benchmarks.common.processes import Work, run_all
works = [Work([[sys.executable, "-m", "sleeper"]] * 2, Path({str(tmp_path)!r}) / "log")]
run_all("runs", works, 1, imported={["sleeper"] if imported else []})
"""
    runner = subprocess.Popen(python(code), stdout=subprocess.DEVNULL, env=environment(tmp_path))
    log = tmp_path / "log"
    until = time.monotonic() + 30
    while not (log.exists() and log.read_text()) and time.monotonic() < until:
        time.sleep(0.1)
    child = int(log.read_text())
    runner.send_signal(signal.SIGTERM)
    assert runner.wait(30) == 128 + signal.SIGTERM
    assert not Path(f"/proc/{child}").exists()
    assert len(log.read_text().split()) == 1
