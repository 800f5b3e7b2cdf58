"""Measures how the cost of a second moment grows with the work, beside what the machine could do at best.

    uv run --group bench python -m benchmarks.scaling

measures over image size, batch, kernel and channels, and the all-reduce of two gloo processes over n; prints tables
and writes scaling.jsonl and scaling.png to --output_dir; what is in the file already is not measured again. The least
time stands beside each figure: operations over the machine's rate of products or bytes over its rate of copying, both
measured too, whichever is more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from matplotlib.axes import Axes
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.multiprocessing.spawn import spawn

from benchmarks.common import plots
from benchmarks.common.records import RunRecord, add_record, command, environment, read_records
from benchmarks.common.timing import Arms, interleaved
from hf_tract.cli.cost import moment_cost
from hf_tract.core.moments import patch_moments
from hf_tract.core.patches import PatchSpec
from hf_tract.core.solve import DampedInverse

CPU = torch.device("cpu")
# Kernel, stride, padding.
Stem = tuple[int, int, int]
STEMS: dict[str, Stem] = {"3x3/1": (3, 1, 1), "7x7/2": (7, 2, 3), "16x16/16": (16, 16, 0)}
SIZE, BATCH, KERNEL, CHANNELS = (
    "image size (batch 16)",
    "batch (128 pixels)",
    "kernel k (batch 16, 128 pixels)",
    "channels (batch 16, 64 pixels)",
)
SWEEPS = (SIZE, BATCH, KERNEL, CHANNELS)
HEADS = ("curve", "at", "n", "GFLOP", "MB", "least, ms", "moment, ms", "times least", "factor and solve, ms")
# The sizes n of the all-reduces.
REDUCED = (27, 48, 147, 192, 588, 768, 1536)
# The name of the measurement of products and copies.
MACHINE = "machine"
# Side of the matrices that are multiplied.
PRODUCT = 2048
# Numbers that are copied.
COPY = 16 * 2**20


class Point(NamedTuple):
    """Describes one measurement: the sweep, the curve in it, the place on its axis, and what is measured."""

    sweep: str
    curve: str
    at: int
    shape: tuple[int, int, int, int]
    stem: Stem

    @property
    def key(self) -> str:
        """Return its name."""
        return f"{self.sweep} | {self.curve} | {self.at}"

    def spec(self) -> PatchSpec:
        """Return which patches the layer reads."""
        kernel, stride, padding = self.stem
        return PatchSpec((kernel,) * 2, (stride,) * 2, (padding,) * 4, (1, 1))

    def patch_size(self) -> int:
        """Return n."""
        return self.spec().patch_size(self.shape)


class Rates(NamedTuple):
    """Holds what the machine can do at best, per second."""

    # The operations of a large float32 product.
    operations: float
    # The bytes that a large copy reads and writes.
    moved: float

    def least_seconds(self, point: Point) -> float:
        """Return the time that a second moment takes at least."""
        operations, moved = moment_cost(point.shape, point.spec())
        return max(operations / self.operations, moved / self.moved)


def points() -> Iterator[Point]:
    """List what is measured."""
    for name, stem in STEMS.items():
        for size in (32, 64, 128, 224, 384, 512):
            yield Point(SIZE, name, size, (16, 3, size, size), stem)
        for batch in (1, 4, 16, 64, 256, 512):
            yield Point(BATCH, name, batch, (batch, 3, 128, 128), stem)
    for kernel in (3, 5, 7, 11, 16, 32):
        strides = {"stride 1": 1, "stride k/2": max(1, kernel // 2), "stride k": kernel}
        for name, stride in strides.items():
            yield Point(KERNEL, name, kernel, (16, 3, 128, 128), (kernel, stride, 0))
    for channels in (3, 8, 16, 32, 64):
        for name, stem in {"3x3/1": (3, 1, 1), "4x4/4": (4, 4, 0)}.items():
            yield Point(CHANNELS, name, channels, (16, channels, 64, 64), stem)


def measure_point(point: Point, repeats: int) -> dict[str, list[float]]:
    """Return the times of the moment, and of the factorisation with its solve for 64 outputs."""
    n = point.patch_size()
    spec = point.spec()
    x = torch.randn(point.shape)
    grad = torch.randn(64, n)
    sums = torch.zeros(1, n, n)
    moment = torch.eye(n)[None].clone()
    arms: Arms = {
        "moment": lambda: patch_moments(x, spec, sums),
        "solve": lambda: DampedInverse(moment, 1, 0.1)(grad),
    }
    return interleaved(arms, repeats, CPU, seconds=0.02)


def measure_machine(repeats: int) -> dict[str, list[float]]:
    """Return the times of a large float32 product and of a large copy."""
    a = torch.randn(PRODUCT, PRODUCT)
    x, y = torch.randn(2, COPY).unbind()
    return interleaved({"product": lambda: a @ a, "copy": lambda: y.copy_(x)}, repeats, CPU)


def rates(found: dict[str, RunRecord]) -> Rates:
    """Return the machine's rates from what was measured."""
    product = min(found[f"{MACHINE} | product"].seconds)
    copy = min(found[f"{MACHINE} | copy"].seconds)
    return Rates(2 * PRODUCT**3 / product, 2 * 4 * COPY / copy)


def measure_all_reduce() -> dict[str, list[float]]:
    """Return the times of the all-reduce of a step, on two processes of this machine, by n."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (folder,), nprocs=2)
        times: dict[str, list[float]] = json.loads(Path(folder, "times.json").read_text())
    return times


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    times = {str(n): _time_all_reduce(n) for n in REDUCED}
    if rank == 0:
        Path(folder, "times.json").write_text(json.dumps(times))
    dist.barrier()
    dist.destroy_process_group()


def _time_all_reduce(n: int) -> list[float]:
    x = torch.zeros(n * n + 1)
    times = []
    for _ in range(12):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(x)
        times.append(time.perf_counter() - start)
    return times[2:]


def measure(path: Path, repeats: int) -> None:
    """Measure what the file does not have yet, and add it."""
    found = read_records(path)

    def add(measurement: str, times: dict[str, list[float]]) -> None:
        origin = {"command": command(), **environment()}
        for arm, seconds in times.items():
            settings = {"measurement": measurement, "repeats": repeats}
            add_record(path, RunRecord(f"{measurement} | {arm}", arm, settings, 0, {}, seconds, **origin))

    if f"{MACHINE} | copy" not in found:
        add(MACHINE, measure_machine(repeats))
    todo = [point for point in points() if f"{point.key} | solve" not in found]
    for point in track(todo, "measuring", console=Console(stderr=True)):
        add(point.key, measure_point(point, repeats))
    if f"all-reduce | {REDUCED[-1]}" not in found:
        add("all-reduce", measure_all_reduce())


def milliseconds(found: dict[str, RunRecord], key: str) -> float:
    """Return the median time of a measurement."""
    return 1000 * statistics.median(found[key].seconds)


def report(found: dict[str, RunRecord]) -> None:
    """Print the tables."""
    console = Console(width=140)
    best = rates(found)
    products, copies = best.operations / 1e9, best.moved / 1e9
    console.print(f"The machine: {products:.0f} GFLOP/s in float32 products, {copies:.1f} GB/s in copies.")
    for sweep in SWEEPS:
        table = Table(*HEADS, title=sweep)
        for point in points():
            if point.sweep == sweep:
                table.add_row(point.curve, str(point.at), *_cells(point, best, found))
        console.print(table)
    table = Table("n", "KiB", "ms", title="all-reduce of one step, 2 gloo processes")
    for n in REDUCED:
        kib = 4 * (n * n + 1) / 1024
        table.add_row(str(n), f"{kib:.0f}", f"{milliseconds(found, f'all-reduce | {n}'):.2f}")
    console.print(table)


def _cells(point: Point, best: Rates, found: dict[str, RunRecord]) -> list[str]:
    operations, moved = moment_cost(point.shape, point.spec())
    least = 1000 * best.least_seconds(point)
    moment = milliseconds(found, f"{point.key} | moment")
    solve = milliseconds(found, f"{point.key} | solve")
    cells = [str(point.patch_size())]
    for figure in (operations / 1e9, moved / 1e6, least, moment, moment / least, solve):
        cells.append(f"{figure:.3g}")
    return cells


def plot(found: dict[str, RunRecord], path: Path) -> Path:
    """Draw measured times, and the least time dotted, of each sweep."""
    figure, rows = plots.new_figure(2, 2, 11, 7)
    for axis, sweep in zip([*rows[0], *rows[1]], SWEEPS, strict=True):
        _plot_sweep(axis, sweep, found)
        axis.set_xlabel(sweep)
    figure.suptitle("Time of a second moment; dotted: the least that this machine could take")
    return plots.save(figure, path)


def _plot_sweep(axis: Axes, sweep: str, found: dict[str, RunRecord]) -> None:
    best = rates(found)
    curves: dict[str, list[tuple[int, float, float]]] = {}
    for point in points():
        if point.sweep == sweep:
            measured = milliseconds(found, f"{point.key} | moment")
            least = 1000 * best.least_seconds(point)
            curves.setdefault(point.curve, []).append((point.at, measured, least))
    places: tuple[int, ...] = ()
    for name, color, marker in zip(curves, plots.COLORS[1:], plots.MARKERS, strict=False):
        places, times, least_times = zip(*curves[name], strict=True)
        axis.plot(places, times, color=color, marker=marker, markersize=4, label=name)
        axis.plot(places, least_times, ":", color=color)
    axis.set(xscale="log", yscale="log", ylabel="milliseconds")
    axis.set_xticks(places, [str(place) for place in places])
    axis.minorticks_off()
    plots.legend_beside(axis)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="turns (default: 7)")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/scaling"), help="(default: outputs/scaling)")
    args = parser.parse_args()
    torch.manual_seed(0)
    path = args.output_dir / "scaling.jsonl"
    measure(path, args.repeats)
    found = read_records(path)
    report(found)
    print(f"Plot: {plot(found, path.with_suffix('.png'))}")


if __name__ == "__main__":
    main()
