"""Measures what TrAct costs: time of a training step and peak memory of vanilla, hf-tract and torch_tract.

    uv run --group bench python -m benchmarks.overhead --check

prints a table and writes overhead.jsonl and overhead.png to --output_dir; each result is written as it comes, and a
measurement that is in the file already is not made again.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch_tract import TrAct

from benchmarks.cases import CASES, Case
from benchmarks.common import plots
from benchmarks.common.options import new_parser
from benchmarks.common.records import RunRecord, add_record, command, environment, read_records
from benchmarks.common.timing import Arms, interleaved, peak_bytes
from hf_tract import apply_tract

LAM = 0.1
ARMS = ("vanilla", "hf-tract", "torch_tract")
TICKS = (0.6, 0.8, 1, 1.25, 1.5, 2, 3, 4)
LEAST_REPEATS = 7
# The seconds of each turn, and the peak bytes.
Measured = tuple[list[float], list[float]]
# The record of each arm that does not fail.
Result = dict[str, RunRecord]
HEADS = ("measurement", "vanilla, ms", *ARMS[1:], "ms above vanilla", "theirs", "MiB above", "theirs")
NOTE = "Times: median (quartiles); ratios and differences: medians over the turns of one run."


def main() -> None:
    """Measure, print, write and, if asked to, check."""
    args = parse()
    path = args.output_dir / "overhead.jsonl"
    if args.fresh:
        path.unlink(missing_ok=True)
    for name in args.models:
        for scope in args.scopes:
            measure_once(name, scope, path, args)
    results = by_measurement(path)
    report(results)
    print(f"Plot: {plot(results, path.with_suffix('.png'))}")
    broken = violations(results)
    if args.check and broken:
        sys.exit("\n".join(["Broken bounds:", *broken]))


def measure_once(name: str, scope: str, path: Path, args: argparse.Namespace) -> None:
    """Measure a model, unless the file has it."""
    device = torch.device(args.device)
    case = CASES[name]
    batch = args.batch or case.batch_of(scope, device)
    form = "compiled" if args.compile else "eager"
    key = " | ".join([name, scope, str(device), args.precision, form, str(batch)])
    if f"{key} | vanilla" in read_records(path):
        return
    print(f"{key} ...", file=sys.stderr, flush=True)
    settings = {"measurement": key, "model": name, "scope": scope, "device": device.type, "batch": batch}
    torch.manual_seed(args.seed)
    for arm, (seconds, peak) in measure(case, scope, batch, args).items():
        curve = {"peak_bytes": peak}
        origin = {"command": command(), **environment()}
        add_record(path, RunRecord(f"{key} | {arm}", arm, settings, args.seed, curve, seconds, **origin))


def by_measurement(path: Path) -> dict[str, Result]:
    """Return the records of a file by measurement and arm."""
    results: dict[str, Result] = {}
    for record in read_records(path).values():
        results.setdefault(record.settings["measurement"], {})[record.arm] = record
    return results


def measure(
    case: Case, scope: str, batch: int, args: argparse.Namespace
) -> dict[str, tuple[list[float], list[float]]]:
    """Return times and peak memory of each arm, for a whole training step or for the first layer alone."""
    device = torch.device(args.device)
    x = torch.randn(batch, 3, case.size, case.size, device=device)
    make_arm = _layer if scope == "layer" else _step
    arms: Arms = {}
    for name in ARMS:
        torch.manual_seed(args.seed)
        model = case.make().to(device).train()
        if scope == "layer":
            model = nn.Sequential(model.get_submodule(case.first))
        arm = make_arm(with_tract(model, name, case, scope), x, case, args)
        try:
            arm()
        except (RuntimeError, TypeError) as error:
            print(f"{name} fails: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
        else:
            arms[name] = arm
    times = interleaved(arms, args.repeats, device)
    measured = {}
    for name, arm in arms.items():
        peak = [float(peak_bytes(arm, device))] if args.memory else []
        measured[name] = times[name], peak
    return measured


def with_tract(model: nn.Module, arm: str, case: Case, scope: str) -> nn.Module:
    """Return `model` as the arm trains it."""
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


def ratios(result: Result, arm: str) -> list[float]:
    """Return the time of an arm over vanilla's, of each turn; nothing where the arm fails."""
    if arm not in result:
        return []
    turns = zip(result[arm].seconds, result["vanilla"].seconds, strict=True)
    return [mine / vanilla for mine, vanilla in turns]


def seconds_above(result: Result, arm: str) -> float | None:
    """Return the seconds of an arm above vanilla's: the median over the turns of one run."""
    if arm not in result:
        return None
    turns = zip(result[arm].seconds, result["vanilla"].seconds, strict=True)
    return statistics.median(mine - vanilla for mine, vanilla in turns)


def bytes_above(result: Result, arm: str) -> float | None:
    """Return the peak memory of an arm above vanilla's."""
    if arm not in result or not result[arm].curve["peak_bytes"]:
        return None
    return result[arm].curve["peak_bytes"][0] - result["vanilla"].curve["peak_bytes"][0]


def violations(results: dict[str, Result]) -> list[str]:
    """Return the measurements that break a bound, in words."""
    broken = []
    for key, result in results.items():
        settings = result["vanilla"].settings
        case = CASES[settings["model"]]
        if settings["scope"] == "step":
            problem = _step_violation(result, case.step_bound[settings["device"]])
        else:
            problem = _layer_violation(result, case.layer_bound)
        for each in (problem, _memory_violation(result, case)):
            if each:
                broken.append(f"{key}: {each}")
    return broken


def _step_violation(result: Result, bound: float) -> str:
    turns = ratios(result, "hf-tract")
    if turns and statistics.median(turns) <= bound:
        return ""
    return f"{statistics.median(turns) if turns else 'no'} times vanilla's step, allowed {bound}"


def _layer_violation(result: Result, bound: float) -> str:
    theirs = seconds_above(result, "torch_tract")
    ours = seconds_above(result, "hf-tract")
    if theirs is None or (ours is not None and ours <= bound * theirs):
        return ""
    return f"{ours} s above vanilla, allowed {bound} of torch_tract's {theirs} s"


def _memory_violation(result: Result, case: Case) -> str:
    above = bytes_above(result, "hf-tract")
    bound = case.memory_bound()
    if above is None or above <= bound:
        return ""
    return f"{above:.0f} bytes above vanilla, allowed {bound}"


def report(results: dict[str, Result]) -> None:
    """Print the table."""
    table = Table(*HEADS)
    for key, result in results.items():
        low, middle, high = statistics.quantiles(result["vanilla"].seconds, n=4)
        cells = [f"{1000 * middle:.1f} ({1000 * low:.1f}-{1000 * high:.1f})"]
        for arm in ARMS[1:]:
            turns = ratios(result, arm)
            cells.append(f"x {statistics.median(turns):.3f}" if turns else "fails")
        for arm in ARMS[1:]:
            cells.append(_cell(seconds_above(result, arm), 1000, 2))
        for arm in ARMS[1:]:
            cells.append(_cell(bytes_above(result, arm), 2**-20, 1))
        table.add_row(key, *cells)
    Console(width=180).print(table, NOTE, sep="\n")


def _cell(value: float | None, factor: float, digits: int) -> str:
    if value is None:
        return ""
    return f"{factor * value:.{digits}f}"


def plot(results: dict[str, Result], path: Path) -> Path:
    """Draw each measurement's time over vanilla's, turn by turn."""
    figure, [[axis]] = plots.new_figure(1, 1, 9, 1.4 + 0.42 * len(results))
    for row, result in enumerate(results.values()):
        for arm, color, shift in zip(ARMS[1:], plots.COLORS[1:], (-0.14, 0.14), strict=False):
            turns = ratios(result, arm)
            if not turns:
                continue
            label = arm if row == 0 else None
            axis.plot(turns, [row + shift] * len(turns), ".", color=color, alpha=0.5, label=label)
            middle = statistics.median(turns)
            axis.plot(middle, row + shift, "|", color=color, markersize=13, markeredgewidth=2)
    axis.axvline(1, color=plots.BASE, linewidth=0.8)
    axis.set(title="Time of each turn over vanilla's, and its median", xlabel="times vanilla", xscale="log")
    axis.set_yticks(range(len(results)), [key.replace(" | ", ", ") for key in results])
    axis.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axis.minorticks_off()
    axis.invert_yaxis()
    plots.legend_beside(axis)
    return plots.save(figure, path)


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--models", nargs="+", choices=list(CASES), default=list(CASES), metavar="MODEL", help=", ".join(CASES))
    add(
        "--scopes",
        nargs="+",
        choices=["step", "layer"],
        default=["step", "layer"],
        help="a whole step, or the first layer alone",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, or cuda:1")
    add(
        "--batch",
        type=int,
        help="images; by default the paper's 256 at 224 pixels (16 for a step on the CPU) and 128 at 32",
    )
    add("--precision", choices=["float32", "bf16"], default="float32", help="bf16: autocast")
    add("--compile", action="store_true", help="torch.compile the model of each arm")
    add("--repeats", type=int, default=9, help="turns")
    add("--no_memory", dest="memory", action="store_false", help="leave peak memory out")
    add("--seed", type=int, default=0, help="of data and weights")
    add("--output_dir", type=Path, default=Path("outputs/overhead"), help="for results, tables and plots")
    add("--fresh", action="store_true", help="forget earlier results in --output_dir")
    add("--check", action="store_true", help="exit with 1 when a bound is broken")
    args = parser.parse_args()
    if args.repeats < LEAST_REPEATS:
        raise SystemExit(f"--repeats {args.repeats}: it must be at least {LEAST_REPEATS}.")
    return args


if __name__ == "__main__":
    main()
