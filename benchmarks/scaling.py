"""How the cost of a second moment grows with the work, beside what the machine could do at best.

    uv run --group bench python -m benchmarks.scaling

measures over image size, batch, kernel and channels, and the all-reduce of two gloo processes over n; prints tables
and writes scaling.json and scaling.png to --output. The least time stands beside each figure: operations over the
machine's rate of products or bytes over its rate of copying, both measured in the same run, whichever is more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.multiprocessing.spawn import spawn

from benchmarks.common.timing import environment, interleaved
from hf_tract.cli.cost import moment_cost
from hf_tract.core.moments import patch_moments
from hf_tract.core.patches import PatchSpec
from hf_tract.core.solve import DampedInverse

mpl.use("Agg")
import matplotlib.pyplot as plt

Point = dict[str, Any]
STEMS = {"3x3/1": (3, 1, 1), "7x7/2": (7, 2, 3), "16x16/16": (16, 16, 0)}  # kernel, stride, padding


def sweeps() -> list[Point]:
    """What is measured, by sweep and curve."""
    points: list[Point] = []

    def add(sweep: str, curve: str, at: int, shape: tuple[int, int, int], stem: tuple[int, int, int]) -> None:
        batch, channels, size = shape
        points.append({"sweep": sweep, "curve": curve, "at": at, "shape": (batch, channels, size, size), "stem": stem})

    for name, stem in STEMS.items():
        for size in (32, 64, 128, 224, 384, 512):
            add("image size (batch 16)", name, size, (16, 3, size), stem)
        for batch in (1, 4, 16, 64, 256, 512):
            add("batch (128 pixels)", name, batch, (batch, 3, 128), stem)
    for kernel in (3, 5, 7, 11, 16, 32):
        for name, stride in {"stride 1": 1, "stride k/2": max(1, kernel // 2), "stride k": kernel}.items():
            add("kernel k (batch 16, 128 pixels)", name, kernel, (16, 3, 128), (kernel, stride, 0))
    for channels in (3, 8, 16, 32, 64):
        for name, stem in {"3x3/1": (3, 1, 1), "4x4/4": (4, 4, 0)}.items():
            add("channels (batch 16, 64 pixels)", name, channels, (16, channels, 64), stem)
    return points


def measure(point: Point, repeats: int, rates: tuple[float, float]) -> Point:
    """Time of the moment and of the factorisation with its solve for 64 outputs, and the least time for the moment."""
    kernel, stride, padding = point["stem"]
    window = PatchSpec((kernel,) * 2, (stride,) * 2, (padding,) * 4, (1, 1))
    x = torch.randn(point["shape"])
    n = window.patch_size(x.shape)
    sums, grad = torch.zeros(1, n, n), torch.randn(64, n)
    moment = torch.eye(n)[None].clone()
    arms = {"moment": lambda: patch_moments(x, window, sums), "solve": lambda: DampedInverse(moment, 0.1)(grad)}
    times = interleaved(arms, repeats, x.device, seconds=0.02)
    operations, moved = moment_cost(x.shape, window)
    least = max(operations / rates[0], moved / rates[1])
    figures = {"operations": operations, "bytes": moved, "least_ms": 1000 * least, "n": n}
    return {**point, **figures, **{f"{name}_ms": 1000 * statistics.median(each) for name, each in times.items()}}


def machine(repeats: int) -> tuple[float, float]:
    """Operations a second of a large float32 product, and bytes a second read and written of a large copy."""
    a = torch.randn(2048, 2048)
    x, y = torch.randn(2, 16 * 2**20).unbind()
    times = interleaved({"product": lambda: a @ a, "copy": lambda: y.copy_(x)}, repeats, a.device)
    return 2 * 2048**3 / min(times["product"]), 2 * x.nbytes / min(times["copy"])


def payload(folder: str) -> list[Point]:
    """Numbers and milliseconds of the all-reduce of a step, on two processes of this machine."""
    spawn(_rank, (folder,), nprocs=2)
    return json.loads(Path(folder, "payload.json").read_text())  # type: ignore[no-any-return]


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = []
    for n in (27, 48, 147, 192, 588, 768, 1536):
        x, times = torch.zeros(n * n + 1), []
        for _ in range(12):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(x)
            times.append(time.perf_counter() - start)
        results.append({"n": n, "bytes": x.nbytes, "ms": 1000 * statistics.median(times[2:])})
    if rank == 0:
        Path(folder, "payload.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def report(points: list[Point], reduced: list[Point], rates: tuple[float, float]) -> None:
    """Prints the tables."""
    console = Console(width=140)
    console.print(
        f"The machine: {rates[0] / 1e9:.0f} GFLOP/s in float32 products, {rates[1] / 1e9:.1f} GB/s in copies."
    )
    for sweep in dict.fromkeys(point["sweep"] for point in points):
        table = Table(
            "curve",
            "at",
            "n",
            "GFLOP",
            "MB",
            "least, ms",
            "moment, ms",
            "times least",
            "factor and solve, ms",
            title=sweep,
        )
        for p in (point for point in points if point["sweep"] == sweep):
            figures = (
                p["operations"] / 1e9,
                p["bytes"] / 1e6,
                p["least_ms"],
                p["moment_ms"],
                p["moment_ms"] / p["least_ms"],
            )
            cells = [f"{figure:.3g}" for figure in (*figures, p["solve_ms"])]
            table.add_row(p["curve"], str(p["at"]), str(p["n"]), *cells)
        console.print(table)
    table = Table("n", "KiB", "ms", title="all-reduce of one step, 2 gloo processes")
    for p in reduced:
        table.add_row(str(p["n"]), f"{p['bytes'] / 1024:.0f}", f"{p['ms']:.2f}")
    console.print(table)


def plot(points: list[Point], path: Path) -> None:
    """Measured times, and the least time dotted, of each sweep."""
    names = list(dict.fromkeys(point["sweep"] for point in points))
    figure, grid = plt.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
    for axes, sweep in zip(grid.flat, names, strict=True):
        curves = list(dict.fromkeys(point["curve"] for point in points if point["sweep"] == sweep))
        for curve, color in zip(curves, ("#d62728", "#1f77b4", "#2ca02c"), strict=False):
            mine = [point for point in points if (point["sweep"], point["curve"]) == (sweep, curve)]
            at = [point["at"] for point in mine]
            axes.plot(at, [point["moment_ms"] for point in mine], "o-", color=color, label=curve, markersize=3)
            axes.plot(at, [point["least_ms"] for point in mine], ":", color=color)
        axes.set(xscale="log", yscale="log", xlabel=sweep, ylabel="second moment, ms")
        axes.set_xticks(at, [str(value) for value in at])
        axes.minorticks_off()
        axes.grid(alpha=0.2)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("outputs/scaling"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    rates = machine(args.repeats)
    points = [
        measure(point, args.repeats, rates) for point in track(sweeps(), "measuring", console=Console(stderr=True))
    ]
    with tempfile.TemporaryDirectory() as folder:
        reduced = payload(folder)
    everything = {
        "command": " ".join(sys.argv),
        "environment": environment(),
        "rates": rates,
        "points": points,
        "payload": reduced,
    }
    (args.output / "scaling.json").write_text(json.dumps(everything, indent=1) + "\n")
    report(points, reduced, rates)
    plot(points, args.output / "scaling.png")
    print(f"Plot: {args.output / 'scaling.png'}")


if __name__ == "__main__":
    main()
