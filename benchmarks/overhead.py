"""What TrAct costs: time of a training step and peak memory of vanilla, hf-tract and torch_tract, in one run.

    uv run --group bench python -m benchmarks.overhead --check

prints a table and writes overhead.json and overhead.png to --output; each result is written as it comes, and a
measurement that is in the file already is not made again (--fresh forgets them).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch_tract import TrAct

from benchmarks.cases import CASES, Case
from benchmarks.common.timing import Arms, environment, interleaved, peak_bytes
from hf_tract import apply_tract

mpl.use("Agg")
import matplotlib.pyplot as plt

LAM = 0.1
ARMS = ("vanilla", "hf-tract", "torch_tract")
TICKS = (0.6, 0.8, 1, 1.25, 1.5, 2, 3, 4)
Result = dict[str, Any]


def main() -> None:
    """Measures, prints, writes and, if asked to, checks."""
    args = parse()
    device = torch.device(args.device)
    path = args.output / "overhead.json"
    args.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Result] = json.loads(path.read_text()) if path.exists() and not args.fresh else {}
    for name in args.models:
        case = CASES[name]
        for scope in args.scopes:
            batch = args.batch or (case.layer_batch if scope == "layer" else case.batch[device.type])
            key = " | ".join(
                [name, scope, str(device), args.precision, "compiled" if args.compile else "eager", str(batch)]
            )
            if key in results:
                continue
            print(f"{key} ...", file=sys.stderr, flush=True)
            torch.manual_seed(args.seed)
            result = measure(case, scope, batch, device, args)
            results[key] = {**result, "command": " ".join(sys.argv), "environment": environment()}
            path.write_text(json.dumps(results, indent=1) + "\n")
    report(results, plot(results, path.with_suffix(".png")))
    if args.check and (broken := violations(results)):
        sys.exit("\n".join(["Broken bounds:", *broken]))


def measure(case: Case, scope: str, batch: int, device: torch.device, args: argparse.Namespace) -> Result:
    """Times and peak memory of each arm, for a whole training step or for the first layer alone."""
    x = torch.randn(batch, 3, case.size, case.size, device=device)
    arms: Arms = {}
    failed: dict[str, str] = {}
    for name in ARMS:
        torch.manual_seed(args.seed)
        model = case.make().to(device).train()
        if scope == "layer":
            model = nn.Sequential(model.get_submodule(case.first))
        arm = (_layer if scope == "layer" else _step)(with_tract(model, name, case, scope), x, case, args)
        try:
            arm()
        except (RuntimeError, TypeError) as error:
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        arms[name] = arm
    times = interleaved(arms, args.repeats, device)
    memory = {name: peak_bytes(arm, device) for name, arm in arms.items()} if args.memory else {}
    first = case.make().get_submodule(case.first)
    assert isinstance(first.weight, Tensor)
    return {"seconds": times, "peak_bytes": memory, "failed": failed, "n": first.weight[0].numel()}


def with_tract(model: nn.Module, arm: str, case: Case, scope: str) -> nn.Module:
    """`model` as the arm trains it."""
    first = "0" if scope == "layer" else case.first
    if arm == "hf-tract":
        apply_tract(model, LAM, layers=first)
    elif arm == "torch_tract":
        parent, _, child = first.rpartition(".")
        layer = model.get_submodule(first)
        setattr(model.get_submodule(parent), child, TrAct(copy.deepcopy(layer), l=LAM))
    return model


def _step(model: nn.Module, x: Tensor, case: Case, args: argparse.Namespace) -> Callable[[], object]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    labels = torch.randint(case.classes, (len(x),), device=x.device)
    run = torch.compile(model) if args.compile else model

    def step() -> None:
        optimizer.zero_grad()
        with _precision(x, args):
            loss = F.cross_entropy(run(x), labels)
        loss.backward()
        optimizer.step()

    return step


def _layer(model: nn.Module, x: Tensor, case: Case, args: argparse.Namespace) -> Callable[[], object]:
    run = torch.compile(model) if args.compile else model
    with torch.no_grad(), _precision(x, args):
        grad = torch.randn_like(model(x))

    def layer() -> None:
        model.zero_grad()
        with _precision(x, args):
            out = run(x)
        out.backward(grad)

    return layer


def _precision(x: Tensor, args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=args.precision == "bf16")


def ratio(result: Result, arm: str) -> float | None:
    """Time of an arm over vanilla's: the median over the turns of one run."""
    if arm not in result["seconds"]:
        return None
    turns: list[tuple[float, float]] = list(zip(result["seconds"][arm], result["seconds"]["vanilla"], strict=True))
    return statistics.median(mine / vanilla for mine, vanilla in turns)


def above(result: Result, arm: str) -> float | None:
    """Seconds of an arm above vanilla's: the median over the turns of one run."""
    if arm not in result["seconds"]:
        return None
    turns: list[tuple[float, float]] = list(zip(result["seconds"][arm], result["seconds"]["vanilla"], strict=True))
    return statistics.median(mine - vanilla for mine, vanilla in turns)


def violations(results: dict[str, Result]) -> list[str]:
    """The measurements that break a bound, in words."""
    broken = []
    for key, result in results.items():
        name, scope, device, *_ = key.split(" | ")
        case = CASES[name]
        if scope == "step":
            measured, bound = ratio(result, "hf-tract"), case.step_bound[device.split(":")[0]]
            if measured is None or measured > bound:
                broken.append(f"{key}: {measured} times vanilla's step, allowed {bound}")
        elif (theirs := above(result, "torch_tract")) is not None:
            ours = above(result, "hf-tract")
            if ours is None or ours > case.layer_bound * theirs:
                broken.append(f"{key}: {ours} s above vanilla, allowed {case.layer_bound} of torch_tract's {theirs} s")
        if memory := result["peak_bytes"]:
            bound = 128 * 2**20 + 4 * 4 * result["n"] ** 2
            if memory["hf-tract"] - memory["vanilla"] > bound:
                broken.append(f"{key}: {memory['hf-tract'] - memory['vanilla']} bytes above vanilla, allowed {bound}")
    return broken


def report(results: dict[str, Result], plot_path: Path) -> None:
    """Prints the table."""
    table = Table(
        "measurement", "vanilla, ms", "hf-tract", "torch_tract", "ms above vanilla", "theirs", "MiB above", "theirs"
    )
    for key, result in results.items():
        vanilla = [1000 * seconds for seconds in result["seconds"]["vanilla"]]
        low, _, high = statistics.quantiles(vanilla, n=4)
        cells = [f"{statistics.median(vanilla):.1f} ({low:.1f}-{high:.1f})"]
        cells += [f"x {value:.3f}" if (value := ratio(result, arm)) else "fails" for arm in ARMS[1:]]
        cells += [f"{1000 * value:.2f}" if (value := above(result, arm)) is not None else "" for arm in ARMS[1:]]
        memory = result["peak_bytes"]
        cells += [f"{(memory[arm] - memory['vanilla']) / 2**20:.1f}" if arm in memory else "" for arm in ARMS[1:]]
        table.add_row(key, *cells)
    console = Console(width=180)
    console.print(
        table, "Times: median (quartiles); ratios and differences: medians over the turns of one run.", sep="\n"
    )
    for key, result in results.items():
        for arm, reason in result["failed"].items():
            console.print(f"{key}: {arm} fails: {reason}")
    console.print(f"Plot: {plot_path}")


def plot(results: dict[str, Result], path: Path) -> Path:
    """Each measurement's time over vanilla's, turn by turn."""
    figure, axes = plt.subplots(figsize=(7, 1 + 0.5 * len(results)), layout="constrained")
    for row, result in enumerate(results.values()):
        for arm, color, shift in zip(ARMS[1:], ("#d62728", "#1f77b4"), (-0.12, 0.12), strict=True):
            if arm in result["seconds"]:
                turns = zip(result["seconds"][arm], result["seconds"]["vanilla"], strict=True)
                values = [mine / vanilla for mine, vanilla in turns]
                axes.plot(
                    values, [row + shift] * len(values), ".", color=color, alpha=0.5, label=arm if row == 0 else None
                )
                axes.plot(statistics.median(values), row + shift, "|", color=color, markersize=14, markeredgewidth=2)
    axes.axvline(1, color="#7f7f7f", linewidth=0.8)
    axes.set(yticks=range(len(results)), yticklabels=list(results), xlabel="time over vanilla's", xscale="log")
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.minorticks_off()
    axes.invert_yaxis()
    axes.grid(alpha=0.2)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", choices=list(CASES), default=list(CASES), metavar="MODEL", help=", ".join(CASES)
    )
    parser.add_argument("--scopes", nargs="+", choices=["step", "layer"], default=["step", "layer"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--batch",
        type=int,
        help="images; by default the paper's 256 at 224 pixels (16 for a step on the CPU) and 128 at 32",
    )
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32", help="bf16: autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model of each arm")
    parser.add_argument("--repeats", type=int, default=9, help="turns (default: 9)")
    parser.add_argument("--no_memory", dest="memory", action="store_false", help="leave peak memory out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/overhead"))
    parser.add_argument("--fresh", action="store_true", help="forget earlier results in --output")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a bound is broken")
    args = parser.parse_args()
    if args.repeats < 7:
        parser.error(f"--repeats (={args.repeats}) must be at least 7")
    return args


if __name__ == "__main__":
    main()
