"""Measures what TrAct costs: time of a training step and peak memory of vanilla, hf-tract and torch_tract.

    uv run --group bench python -m benchmarks.overhead --check

prints a table and writes overhead.jsonl (every turn), overhead.json (estimates and verdicts) and overhead.png to
--output_dir. Each result is written as it comes, and a measurement that is in the file already is not made again. With
--check the exit code is 0 where every bound is kept, 1 where one is broken, and 2 where --max_minutes were too few to
say.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import overhead_results
from benchmarks.cases import CASES, Case
from benchmarks.common.bootstrap import UNDECIDED
from benchmarks.common.options import new_parser
from benchmarks.common.records import RunRecord, add_record, command, environment, read_records
from benchmarks.common.timing import Arms, interleaved, peak_bytes
from benchmarks.overhead_results import AGAIN, ARMS, OURS, THEIRS, VANILLA, key_of, read_results
from hf_tract import apply_tract

LAM = 0.1
LEAST_REPEATS = 7
Settings = dict[str, Any]


def main() -> None:
    """Measure, print, write and, if asked to, check."""
    args = parse()
    deadline = time.monotonic() + 60 * args.max_minutes
    path = args.output_dir / "overhead.jsonl"
    if args.fresh:
        path.unlink(missing_ok=True)
    asked = measurements(args)
    keys = [key_of(settings) for settings in asked]
    if args.check or not read_results(path).keys() >= set(keys):
        refuse_other_origin(path)
    measure_missing(asked, path, args, deadline)
    if args.check:
        repeat_undecided(asked, path, args, deadline)
    results = read_results(path)
    if not results:
        raise SystemExit("Nothing was measured.")
    overhead_results.print_table(results)
    overhead_results.write_json(results, path.with_suffix(".json"))
    overhead_results.plot(results, path.with_suffix(".png"))
    if args.check:
        sys.exit(overhead_results.print_verdicts(results, keys))


def refuse_other_origin(path: Path) -> None:
    """Refuse a file with turns of other code or another machine, with which new ones may not be pooled or judged.

    Raises:
        SystemExit: for such a file.
    """
    now = environment()
    for record in read_records(path, latest=True).values():
        for name, value in now.items():
            other = getattr(record, name)
            if other != value:
                raise SystemExit(f"{path} holds measurements of {name} {other!r}: name another --output_dir.")


def measurements(args: Namespace) -> list[Settings]:
    """Return the settings of everything that the options ask for."""
    asked = []
    for model in args.models:
        for scope in args.scopes:
            for batch in _batches(CASES[model], scope, args):
                measurement = {"model": model, "scope": scope, "batch": batch}
                asked.append({**measurement, **_common_settings(args)})
    return asked


def _common_settings(args: Namespace) -> Settings:
    names = ("device", "precision", "optimizer", "channels_last")
    settings = {name: getattr(args, name) for name in names}
    settings["form"] = _form(args)
    return settings


def _batches(case: Case, scope: str, args: Namespace) -> list[int]:
    device = torch.device(args.device)
    if scope == "layer" and args.layer_batches:
        batches: list[int] = args.layer_batches
        return batches
    if args.batch:
        return [args.batch]
    if scope == "layer":
        return case.layer_batches(device)
    return [case.batch[device.type]]


def _form(args: Namespace) -> str:
    if not args.compile:
        return "eager"
    if args.compile_mode == "default":
        return "compiled"
    return str(args.compile_mode)


def measure_missing(asked: list[Settings], path: Path, args: Namespace, deadline: float) -> None:
    """Measure what the file does not have yet."""
    done = read_results(path)
    for settings in asked:
        if key_of(settings) in done:
            continue
        if time.monotonic() > deadline:
            _say(f"{key_of(settings)}: not measured, since {args.max_minutes:g} minutes are over")
            continue
        measure_more(settings, path, args)


def repeat_undecided(asked: list[Settings], path: Path, args: Namespace, deadline: float) -> None:
    """Measure more turns of what is undecided, until nothing is or the time is over."""
    keys = [key_of(settings) for settings in asked]
    while True:
        checks = overhead_results.checks_of(read_results(path), keys)
        unclear = {check.repeat for check in checks if check.verdict == UNDECIDED}
        todo = [settings for settings in asked if key_of(settings) in unclear]
        if not todo:
            return
        for settings in todo:
            if time.monotonic() > deadline:
                return
            measure_more(settings, path, args)


def measure_more(settings: Settings, path: Path, args: Namespace) -> None:
    """Measure --repeats turns, and add them to those that the file has."""
    key = key_of(settings)
    before = read_results(path).get(key, {})
    turns = len(before[VANILLA].seconds) if before else 0
    _say(f"{key}, turns {turns + 1} to {turns + args.repeats} ...")
    left_out: dict[str, str] = {}
    arms = make_arms(settings, args, left_out)
    if VANILLA not in arms:
        return
    device = torch.device(args.device)
    seconds = interleaved(arms, args.repeats, device, warmup=args.warmup, seed=args.seed + turns)
    told = {**settings, "left_out": left_out}
    origin = {"command": command(), **environment()}
    for name, arm in arms.items():
        curve: dict[str, list[float]] = {"peak_bytes": []}
        if args.memory:
            curve["peak_bytes"].append(peak_bytes(arm, device))
        if before:
            seconds[name] = before[name].seconds + seconds[name]
        record = RunRecord(f"{key} | {name}", name, told, args.seed, curve, seconds[name], **origin)
        add_record(path, record)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def make_arms(settings: Settings, args: Namespace, left_out: dict[str, str]) -> Arms:
    """Return the arms that run, and write into `left_out` why another one does not."""
    case, device = CASES[settings["model"]], torch.device(args.device)
    _forget_earlier_arms(device)
    torch.manual_seed(args.seed)
    x = torch.randn(settings["batch"], 3, case.size, case.size, device=device)
    if args.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    arms: Arms = {}
    for name in ARMS:
        try:
            arm = make_arm(name, x, settings, args)
            arm()
        except (ImportError, RuntimeError, TypeError) as error:
            left_out[name] = _why(name, error)
            _say(f"{name} is left out, {left_out[name]}")
        else:
            arms[name] = arm
    return arms


def _why(arm: str, error: Exception) -> str:
    if arm == THEIRS and importlib.util.find_spec("torch_tract") is None:
        return "missing: torch_tract is not installed"
    first_line, *_ = str(error).splitlines() or [""]
    return f"fails: {type(error).__name__}: {first_line}"


def _forget_earlier_arms(device: torch.device) -> None:
    """Free the memory of earlier measurements, and the compiled code, of which torch keeps a limited number."""
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def make_arm(name: str, x: Tensor, settings: Settings, args: Namespace) -> Callable[[], object]:
    """Return one step of an arm, of the whole model or of its first layer alone."""
    case = CASES[settings["model"]]
    torch.manual_seed(args.seed)
    model = case.make().to(x.device).train()
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if settings["scope"] == "layer":
        model = nn.Sequential(model.get_submodule(case.first))
        return _layer(with_tract(model, name, "0"), x, args)
    return _step(with_tract(model, name, case.first), x, case, args)


def with_tract(model: nn.Module, arm: str, first: str) -> nn.Module:
    """Return `model` as the arm trains it."""
    if arm == OURS:
        apply_tract(model, LAM, layers=first)
    elif arm == THEIRS:
        # Not every machine that measures has it.
        from torch_tract import TrAct

        parent, _, child = first.rpartition(".")
        layer = model.get_submodule(first)
        setattr(model.get_submodule(parent), child, TrAct(copy.deepcopy(layer), l=LAM))
    else:
        assert arm in (VANILLA, AGAIN)
    return model


def _step(model: nn.Module, x: Tensor, case: Case, args: Namespace) -> Callable[[], object]:
    optimizer = _optimizer(model, args)
    labels = torch.randint(case.classes, (len(x),), device=x.device)
    run = _compiled(model, args)

    def step() -> None:
        optimizer.zero_grad()
        with _precision(x, args):
            loss = F.cross_entropy(run(x), labels)
        loss.backward()
        optimizer.step()

    return step


def _optimizer(model: nn.Module, args: Namespace) -> torch.optim.Optimizer:
    if args.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=1e-3)
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def _layer(model: nn.Module, x: Tensor, args: Namespace) -> Callable[[], object]:
    run = _compiled(model, args)
    with torch.no_grad(), _precision(x, args):
        grad = torch.randn_like(model(x))

    def layer() -> None:
        model.zero_grad()
        with _precision(x, args):
            out = run(x)
        out.backward(grad)

    return layer


def _compiled(model: nn.Module, args: Namespace) -> Callable[[Tensor], Tensor]:
    if not args.compile:
        return model
    run: Callable[[Tensor], Tensor] = torch.compile(model, mode=args.compile_mode)
    if args.compile_mode != "reduce-overhead":
        return run

    def run_next_step(x: Tensor) -> Tensor:
        # What the graphs of the step before returned may be overwritten now.
        torch.compiler.cudagraph_mark_step_begin()
        return run(x)

    return run_next_step


def _precision(x: Tensor, args: Namespace) -> torch.autocast:
    return torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=args.precision == "bf16")


def parse() -> Namespace:
    """Return the options of the command line."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    models = list(CASES)
    add("--models", nargs="+", choices=models, default=models, metavar="MODEL", help=", ".join(models))
    scopes = ["step", "layer"]
    add("--scopes", nargs="+", choices=scopes, default=scopes, help="a whole step, or the first layer alone")
    device = "cpu"
    if torch.cuda.is_available():
        device = "cuda"
    add("--device", default=device, help="cpu, cuda, or cuda:1")
    usual = "by default the paper's 256 at 224 pixels (16 for a step on the CPU) and 128 at 32"
    add("--batch", type=int, help=f"images; {usual}")
    add("--layer_batches", nargs="+", type=int, help="images for the first layer alone; by default a step's and 256")
    add("--precision", choices=["float32", "bf16"], default="float32", help="bf16: autocast")
    add("--optimizer", choices=["sgd", "adamw"], default="sgd", help="of a whole step; sgd has a momentum of 0.9")
    add("--channels_last", action="store_true", help="images and weights in this memory format")
    add("--compile", action="store_true", help="torch.compile the model of each arm")
    modes = ["default", "reduce-overhead"]
    add("--compile_mode", choices=modes, default="default", help="with --compile")
    add("--repeats", type=int, default=9, help="turns")
    add("--warmup", type=float, default=1.0, help="seconds for which each arm runs before its first turn")
    add("--no_memory", dest="memory", action="store_false", help="leave peak memory out")
    add("--seed", type=int, default=0, help="of data, weights and the order of the arms")
    add("--output_dir", type=Path, default=Path("outputs/overhead"), help="for results, tables and plots")
    add("--fresh", action="store_true", help="forget earlier results in --output_dir")
    add("--check", action="store_true", help="say pass, fail or undecided; repeat what is undecided")
    add("--max_minutes", type=float, default=60.0, help="no measurement begins after these minutes")
    args = parser.parse_args()
    problem = _problem_with(args)
    if problem:
        raise SystemExit(problem)
    return args


def _problem_with(args: Namespace) -> str:
    """Return what is wrong with the options, in a sentence."""
    if args.repeats < LEAST_REPEATS:
        return f"--repeats {args.repeats}: it must be at least {LEAST_REPEATS}."
    for name in ("warmup", "max_minutes"):
        value = getattr(args, name)
        if not value >= 0:
            return f"--{name} {value:g}: it must not be negative."
    batches = [("--batch", args.batch)]
    batches.extend(("--layer_batches", batch) for batch in args.layer_batches or [])
    for option, batch in batches:
        if batch is not None and batch < 1:
            return f"{option} {batch}: it must be at least 1."
    if args.compile_mode != "default" and not args.compile:
        return f"--compile_mode {args.compile_mode}: nothing is compiled; add --compile."
    return _problem_with_device(args.device)


def _problem_with_device(name: str) -> str:
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        return f"--device {name}: it must be cpu, cuda, or one GPU such as cuda:1."
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        return f"--device {name}: torch sees {torch.cuda.device_count()} GPUs; choose another one, or cpu."
    return ""


if __name__ == "__main__":
    main()
