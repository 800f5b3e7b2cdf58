"""The benchmarks measure what they say: formulas count operations that run, a broken bound fails, turns are fair."""

import math
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import overhead, scaling
from benchmarks.common.records import RunRecord, read_records
from benchmarks.common.timing import interleaved, peak_bytes
from hf_tract.cli.cost import moment_cost
from hf_tract.core.moments import patch_moments
from hf_tract.core.patches import PatchSpec

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "shape, stem",
    [
        ((4, 3, 64, 64), (7, 2, 3)),
        ((4, 3, 32, 32), (3, 1, 1)),
        ((4, 3, 64, 64), (16, 16, 0)),
        ((4, 3, 32, 32), (4, 4, 0)),
        ((2, 6, 40, 40), (11, 5, 0)),
    ],
)
def test_the_formula_counts_the_operations(shape, stem):
    kernel, stride, padding = stem
    window = PatchSpec((kernel,) * 2, (stride,) * 2, (padding,) * 4, (1, 1))
    n = window.patch_size(shape)

    def products(_, left, right, **kwargs):
        return 2 * math.prod(left) * right[-1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: products}) as counter:
        patch_moments(torch.randn(shape), window, torch.zeros(1, n, n))
    assert counter.get_total_flops() == moment_cost(shape, window).operations


def test_every_arm_has_its_turns():
    calls = []
    times = interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, 7, CPU, seconds=0, warmup=1)
    assert [len(each) for each in times.values()] == [7, 7, 7]
    assert calls[3:] == list("abcbcacab" * 3)[:21]


def test_peak_memory_counts_what_is_alive_together():
    def run():
        a = torch.zeros(1000)
        del a
        return torch.zeros(2000) + 1

    assert 16000 <= peak_bytes(run, CPU) < 17000  # with the scalar's


@pytest.mark.parametrize(
    "scope, seconds, peak, broken",
    [
        ("step", {"vanilla": 1.0, "hf-tract": 1.005}, 0, False),
        ("step", {"vanilla": 1.0, "hf-tract": 1.02}, 0, True),
        ("step", {"vanilla": 1.0, "hf-tract": 1.005}, 2**30, True),
        ("layer", {"vanilla": 1.0, "hf-tract": 1.4, "torch_tract": 2.0}, 0, False),
        ("layer", {"vanilla": 1.0, "hf-tract": 1.6, "torch_tract": 2.0}, 0, True),
    ],
)
def test_a_broken_bound_is_told(scope, seconds, peak, broken):
    settings = {"model": "ViT-S/16", "scope": scope, "device": "cpu"}
    result = {}
    for arm, value in seconds.items():
        curve = {"peak_bytes": [peak if arm == "hf-tract" else 0]}
        result[arm] = RunRecord(arm, arm, settings, 0, curve, [value] * 7)
    assert bool(overhead.violations({"a measurement": result})) == broken


def test_overhead_measures_prints_and_keeps_its_results(tmp_path, monkeypatch, capsys):
    options = ["--models", "ViT @32", "--scopes", "layer", "--batch", "2", "--repeats", "7", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [overhead.__file__, *options, "--output_dir", str(tmp_path)])
    for _ in range(2):
        overhead.main()
    out = capsys.readouterr()
    assert out.err.count("ViT @32 | layer | cpu | float32 | eager | 2 ...") == 1  # the second time from the file
    records = read_records(tmp_path / "overhead.jsonl").values()
    assert {record.arm: len(record.seconds) for record in records} == dict.fromkeys(overhead.ARMS, 7)
    assert all(record.command.startswith("python -m benchmarks.overhead --models") for record in records)
    assert (tmp_path / "overhead.png").exists()
    assert "ms above vanilla" in out.out


def test_scaling_keeps_each_point_and_draws_all_of_them(tmp_path, monkeypatch):
    few = [point for point in scaling.points() if point.at in (3, 32) and point.shape[0] < 64]
    monkeypatch.setattr(scaling, "points", lambda: iter(few))
    monkeypatch.setattr(scaling, "measure_all_reduce", lambda: {str(n): [0.1] * 3 for n in scaling.REDUCED})
    monkeypatch.setattr(scaling, "SWEEPS", tuple(dict.fromkeys(point.sweep for point in few)))
    monkeypatch.setattr(scaling, "PRODUCT", 64)
    monkeypatch.setattr(scaling, "COPY", 64)
    monkeypatch.setattr(scaling, "interleaved", lambda arms, *rest, **more: {name: [0.1] * 3 for name in arms})
    file = tmp_path / "scaling.jsonl"
    scaling.measure(file, 7)
    found = read_records(file)
    assert len(found) == 2 + 2 * len(few) + len(scaling.REDUCED)
    scaling.measure(file, 7)
    assert len(file.read_text().splitlines()) == len(found)
    scaling.report(found)
