"""The benchmarks measure what they say: formulas count operations that run, turns are fair."""

import math
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import scaling
from benchmarks.common.records import add_row, read_records, read_rows
from benchmarks.common.timing import interleaved, least_calls, peak_bytes
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
        # Its shared products would not fit in the CPU's cache.
        ((2, 3, 96, 96), (32, 16, 0)),
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


def test_every_arm_has_its_turns_in_an_order_drawn_anew():
    calls = []
    arms = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = interleaved(arms, 7, CPU, seconds=0, warmup=0)
    assert [len(each) for each in times.values()] == [7, 7, 7]
    assert calls[:6] == list("aabbcc")  # the warm-up
    turns = ["".join(calls[start : start + 3]) for start in range(6, len(calls), 3)]
    assert all(sorted(turn) == list("abc") for turn in turns)
    assert len(set(turns)) > 2
    calls.clear()
    interleaved(arms, 7, CPU, seconds=0, warmup=0)
    assert turns == ["".join(calls[start : start + 3]) for start in range(6, len(calls), 3)]  # the seed decides


def test_the_warm_up_lasts_as_long_as_it_should():
    calls = []
    interleaved({"a": lambda: calls.append(time.sleep(0.002))}, 1, CPU, seconds=0, warmup=0.05)
    assert 3 < len(calls) <= 26


def test_a_sample_on_a_gpu_has_ten_calls():
    assert [least_calls(torch.device(name)) for name in ("cpu", "cuda")] == [1, 10]


def test_peak_memory_counts_what_is_alive_together():
    def run():
        a = torch.zeros(1000)
        del a
        return torch.zeros(2000) + 1

    assert 16000 <= peak_bytes(run, CPU) < 17000  # with the scalar's


def test_two_rows_of_one_run_are_refused(tmp_path):
    for key in ("a", "b", "a"):
        add_row(tmp_path / "x.jsonl", {"key": key})
    with pytest.raises(ValueError, match=r"x\.jsonl has two rows of the key a: delete one of them"):
        read_rows(tmp_path / "x.jsonl")


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
