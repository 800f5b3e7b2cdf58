"""Checks what only an accelerator tells: equality in each precision, waits for the device, NCCL, kernels, peak memory.

    uv run --group bench python -m benchmarks.gpu_checks --device cuda

prints a table, writes gpu_checks.json to --output_dir and exits with 1 if a check fails. Each error is that of the
first layer's gradient against the rule in float64 on the CPU, relative in the norm, beside the error of the ordinary
gradient. What is compiled comes last, since it takes longest.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.common.options import new_parser
from benchmarks.common.records import command, environment
from benchmarks.common.timing import peak_bytes
from hf_tract import apply_tract

LAM = 0.1
BATCH = 12
PRECISIONS = {"float32": 1e-4, "tf32": 2e-2, "bf16 autocast": 3e-2, "fp16 autocast": 1e-2, "bf16 weights": 5e-2}
FORMS = ("eager", "compiled", "reduce-overhead", "accumulated", "zeros kept", "ddp")
FORMS_ON_CPU = ("eager", "compiled", "accumulated", "zeros kept", "ddp")
COMPILED = ("compiled", "reduce-overhead")
COMPILED_STEMS = ("ViT 16x16/16", "ResNet 7x7/2")
COMPILED_PRECISIONS = ("float32", "bf16 autocast")
Row = dict[str, Any]


def stems() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Return first layers, and the shape of an example of theirs."""
    return {
        "ViT 16x16/16": (nn.Conv2d(3, 64, 16, 16), (3, 64, 64)),
        "ViT 4x4/4": (nn.Conv2d(3, 64, 4, 4), (3, 32, 32)),
        "ResNet 7x7/2": (nn.Conv2d(3, 32, 7, 2, 3, bias=False), (3, 64, 64)),
        "CIFAR 3x3/1": (nn.Conv2d(3, 32, 3, 1, 1, bias=False), (3, 32, 32)),
        "Linear": (nn.Linear(48, 64), (16, 48)),
        "groups": (nn.Conv2d(4, 8, 3, 2, 1, groups=2), (4, 32, 32)),
    }


class Net(nn.Module):
    """Runs a first layer and something behind it; its loss is a sum over examples."""

    def __init__(self, stem: nn.Module) -> None:
        super().__init__()
        self.stem = stem
        self.head = nn.Linear(next(iter(stem.parameters())).shape[0], 5)

    def forward(self, x: Tensor) -> Tensor:
        """Return one number for each example."""
        out = self.stem(x)
        out = out if isinstance(self.stem, nn.Linear) else out.flatten(2).mT
        losses: Tensor = self.head(F.gelu(out)).mean(1).square().sum(-1)
        return losses


def rule(model: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ordinary and the preconditioned gradient of the stem's weight, dense and in float64."""
    model = copy.deepcopy(model).cpu().double()
    x, stem = x.cpu().double(), model.stem
    assert isinstance(stem.weight, Tensor)
    grad = torch.autograd.grad(model(x).sum() / len(x), stem.weight)[0]
    if isinstance(stem, nn.Linear):
        patches = x.reshape(1, -1, x.shape[-1])
    else:
        assert isinstance(stem, nn.Conv2d)
        assert not isinstance(stem.padding, str)
        parts = []
        for part in x.chunk(stem.groups, 1):
            columns = F.unfold(part, stem.kernel_size, 1, stem.padding, stem.stride)
            parts.append(columns.transpose(1, 2).flatten(0, 1))
        patches = torch.stack(parts)
    moment = patches.mT @ patches / patches.shape[1]
    rows = grad.reshape(len(moment), -1, moment.shape[-1])
    damped = moment + LAM * torch.eye(moment.shape[-1], dtype=torch.float64)
    return grad, torch.linalg.solve(damped, rows, left=False).reshape(grad.shape)


@contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    """Compute products as `name` rounds them."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    kind = {"bf16 autocast": torch.bfloat16, "fp16 autocast": torch.float16}.get(name)
    try:
        with torch.autocast(device.type, dtype=kind) if kind else nullcontext():
            yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def gradient(model: Net, x: Tensor, name: str, form: str) -> Tensor:
    """Return the gradient of the stem's weight in the last of three steps of a training loop of this form."""
    run: Callable[[Tensor], Tensor] = model
    if form == "compiled":
        run = torch.compile(model)
    elif form == "reduce-overhead":
        run = torch.compile(model, mode="reduce-overhead")
    elif form == "ddp":
        run = nn.parallel.DistributedDataParallel(model)
    scaler = torch.amp.GradScaler(x.device.type, enabled=name == "fp16 autocast")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    parts = x.split(len(x) // 3) if form in ("accumulated", "zeros kept") else (x,)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=form != "zeros kept")
        for part in parts:
            if form == "reduce-overhead":
                torch.compiler.cudagraph_mark_step_begin()
            with precision(name, x.device):
                loss = run(part).float().sum() / len(x)
            with precision(name.replace(" autocast", ""), x.device):
                scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert isinstance(model.stem.weight.grad, Tensor)
    return model.stem.weight.grad.detach().double().cpu()


def error(got: Tensor, want: Tensor) -> float:
    """Return the error relative to what is wanted, in the norm."""
    return float((got - want).norm() / want.norm())


def equality(device: torch.device, forms: Sequence[str], stem_names: Sequence[str]) -> Iterator[Row]:
    """Check each first layer in each precision and form."""
    for form in forms:
        for stem_name in stem_names:
            for name in PRECISIONS:
                if device.type == "cpu" and name in ("tf32", "fp16 autocast"):
                    continue
                if form not in COMPILED or _is_compiled(stem_name, name):
                    yield _equality_row(device, stem_name, name, form)


def _is_compiled(stem_name: str, name: str) -> bool:
    """Return whether this is compiled too, which takes long."""
    return stem_name in COMPILED_STEMS and name in COMPILED_PRECISIONS


def _equality_row(device: torch.device, stem_name: str, name: str, form: str) -> Row:
    """Compare the gradients with and without TrAct with what they should be."""
    model, x = _example(device, stem_name, name)
    ordinary, want = rule(model, x)
    torch.compiler.reset()
    vanilla = error(gradient(copy.deepcopy(model), x, name, form), ordinary)
    with apply_tract(model, LAM):
        ours = error(gradient(model, x, name, form), want)
    limit = max(PRECISIONS[name], 4 * vanilla)
    return _row(f"{stem_name}, {name}, {form}", ours <= limit, error=ours, vanilla=vanilla, limit=limit)


def _example(device: torch.device, stem_name: str, name: str) -> tuple[Net, Tensor]:
    """Return a model with this first layer, and images for it."""
    torch.manual_seed(0)
    stem, shape = stems()[stem_name]
    x = torch.randn(BATCH, *shape, device=device)
    model = Net(copy.deepcopy(stem)).to(device)
    if name == "bf16 weights":
        return model.bfloat16(), x.bfloat16()
    return model, x


def ranges(device: torch.device) -> Iterator[Row]:
    """Check raw pixels, of which float32 cannot hold C beside lam."""
    for top in (1, 255, 10_000, 65_535):
        torch.manual_seed(0)
        x = torch.rand(64, 3, 64, 64, device=device) * top
        model = Net(nn.Conv2d(3, 16, 8, 8)).to(device)
        nn.init.normal_(model.stem.weight, std=0.1 / top)  # type: ignore[arg-type]
        _, want = rule(model, x)
        with apply_tract(model, LAM):
            ours = error(gradient(model, x, "float32", "eager"), want)
        yield _row(f"pixels of 0 to {top}", ours <= 5e-3, error=ours)


def waiting(device: torch.device) -> Iterator[Row]:
    """Check that no step after the first lets the host wait."""
    for stem_name, (stem, shape) in stems().items():
        for name in ("float32", "bf16 autocast"):
            for form in ("whole", "accumulated"):
                model = Net(copy.deepcopy(stem)).to(device)
                x = torch.randn(BATCH, *shape, device=device)
                with apply_tract(model, LAM):
                    problem = _steps_without_waiting(model, x, name, form)
                yield _row(f"no wait: {stem_name}, {name}, {form}", not problem, problem=problem)


def _steps_without_waiting(model: Net, x: Tensor, name: str, form: str) -> str:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    parts = x.chunk(3) if form == "accumulated" else (x,)
    try:
        for step in range(4):
            if step == 2:
                torch.cuda.set_sync_debug_mode("error")
            optimizer.zero_grad()
            for part in parts:
                with precision(name, x.device):
                    loss = model(part).float().mean()
                loss.backward()
            optimizer.step()
    except RuntimeError as problem:
        return str(problem).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def unsolved(device: torch.device) -> Iterator[Row]:
    """Check that a step that cannot be factorised keeps its ordinary gradient, and that a NaN stays one."""
    for value, name in ((1e18, "cannot be factorised"), (float("nan"), "a NaN pixel")):
        model = Net(nn.Conv2d(3, 8, 8, 8, bias=False)).to(device)
        x = torch.full((4, 3, 16, 16), value if value == value else 0.5, device=device)
        if value != value:
            x[0, 0, 0, 0] = value
        plain = copy.deepcopy(model)
        (plain.stem(x).float().mean() * 1e-9).backward()
        with apply_tract(model, LAM) as handle:
            (model.stem(x).float().mean() * 1e-9).backward()
            figures = handle.stats()
        got, want = model.stem.weight.grad, plain.stem.weight.grad
        assert isinstance(got, Tensor)
        assert isinstance(want, Tensor)
        good = torch.allclose(got, want) if value == value else bool(got.isnan().any())
        yield _row(name, good, stats=str(figures))


def later_failure(device: torch.device) -> Iterator[Row]:
    """Check what follows when float32 cannot factorise in a later step: its ordinary gradient, then float64.

    The first step chooses the precision by small pixels. C of the huge ones is 2^24 in every place, beside which
    float32 has no room for lam, and their sums are exact.
    """
    layers = {
        "Linear": (nn.Linear(2, 3, bias=False), (4, 2)),
        "Conv": (nn.Conv2d(3, 8, 4, 4, bias=False), (4, 3, 8, 8)),
    }
    for name, (layer, shape) in layers.items():
        layer = layer.to(device)
        plain = copy.deepcopy(layer)
        small = torch.randn(shape, device=device)
        huge = torch.full(shape, 2.0**12, device=device)
        with apply_tract(layer, LAM):
            grads = [_gradient_of_sum(layer, x) for x in (small, huge, huge, small)]
        ordinary = _gradient_of_sum(plain, huge)
        kept = bool(torch.equal(grads[1], ordinary))
        yield _row(f"{name}: float32 fails in a later step, which keeps its ordinary gradient", kept)
        later = {"the next step": (grads[2], huge), "the one after it": (grads[3], small)}
        for step, (grad, x) in later.items():
            wrong = error(grad, _preconditioned(_gradient_of_sum(plain, x), x))
            yield _row(f"{name}: {step}, in float64", wrong <= 1e-3, error=wrong)


def _gradient_of_sum(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the weight's gradient of the output's sum, after the host has heard of everything."""
    layer.zero_grad()
    with precision("float32", x.device):
        layer(x).sum().backward()
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    assert isinstance(layer.weight.grad, Tensor)
    return layer.weight.grad.detach().double().cpu()


def _preconditioned(grad: Tensor, x: Tensor) -> Tensor:
    """Return grad times inv(C + lam I) in float64, for a linear layer or patches as large as their stride."""
    x = x.double().cpu()
    if x.dim() == 4:
        side = grad.shape[-1]
        x = F.unfold(x, side, stride=side).mT.flatten(0, 1)
    moment = x.mT @ x / len(x)
    damped = moment + LAM * torch.eye(len(moment), dtype=torch.float64)
    solved: Tensor = torch.linalg.solve(damped, grad.flatten(1), left=False)
    return solved.reshape(grad.shape)


def deterministic(device: torch.device) -> Iterator[Row]:
    """Check that torch's deterministic mode allows TrAct, and that two runs then give the same bits."""
    torch.use_deterministic_algorithms(True)
    try:
        for stem_name in stems():
            for name in ("float32", "bf16 autocast"):
                yield _deterministic_row(device, stem_name, name)
    finally:
        torch.use_deterministic_algorithms(False)


def _deterministic_row(device: torch.device, stem_name: str, name: str) -> Row:
    grads, problem = [], ""
    try:
        for _ in range(2):
            model, x = _example(device, stem_name, name)
            with apply_tract(model, LAM):
                grads.append(gradient(model, x, name, "eager"))
    except RuntimeError as refused:
        problem = str(refused).splitlines()[0]
    equal = len(grads) == 2 and torch.equal(*grads)
    return _row(f"deterministic: {stem_name}, {name}", equal, problem=problem)


def fp16_accumulation(device: torch.device) -> Iterator[Row]:
    """Check that sums in float16, which torch allows on request, spoil the first layer no more than the others."""
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "allow_fp16_accumulation"):
        yield _row("allow_fp16_accumulation: this torch does not have it", True)
        return
    matmul.allow_fp16_accumulation = True
    try:
        for stem_name in stems():
            row = _equality_row(device, stem_name, "fp16 autocast", "eager")
            yield {**row, "check": f"allow_fp16_accumulation: {stem_name}"}
    finally:
        matmul.allow_fp16_accumulation = False


def cost(device: torch.device) -> Iterator[Row]:
    """Count kernels and peak memory that TrAct adds to a step of the first layer, at a real size."""
    sizes = {
        "ViT-S/16, 256 x 224": (nn.Conv2d(3, 384, 16, 16), (256, 3, 224, 224)),
        "ViT-B/32, 256 x 224": (nn.Conv2d(3, 768, 32, 32), (256, 3, 224, 224)),
        "ResNet-50, 256 x 224": (nn.Conv2d(3, 64, 7, 2, 3, bias=False), (256, 3, 224, 224)),
        "CIFAR ViT, 128 x 32": (nn.Conv2d(3, 384, 4, 4), (128, 3, 32, 32)),
        "CIFAR ResNet-18, 128 x 32": (nn.Conv2d(3, 64, 3, 1, 1, bias=False), (128, 3, 32, 32)),
    }
    for size_name, (layer, shape) in sizes.items():
        for name in ("float32", "bf16 autocast"):
            x = torch.randn(shape, device=device)
            layer = layer.to(device)
            counts = {}
            for arm in ("vanilla", "hf-tract"):
                with apply_tract(layer, LAM) if arm == "hf-tract" else nullcontext():
                    counts[arm] = _kernels_and_bytes(layer, x, name)
            kernels = counts["hf-tract"][0] - counts["vanilla"][0]
            peak = counts["hf-tract"][1] - counts["vanilla"][1]
            yield _row(f"added: {size_name}, {name}", True, kernels=kernels, peak_mib=round(peak / 2**20, 1))


def _kernels_and_bytes(layer: nn.Module, x: Tensor, name: str) -> tuple[int, int]:
    def step() -> None:
        layer.zero_grad()
        with precision(name, x.device):
            out = layer(x)
        out.sum().backward()

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profiler.events()), peak_bytes(step, x.device)


def _row(name: str, passed: bool, **figures: Any) -> Row:
    return {"check": name, "passed": passed, **figures}


def checks(device: torch.device, forms: Sequence[str], stem_names: Sequence[str]) -> Iterator[Row]:
    """Run every check of a device; those that need CUDA only there."""
    yield from ranges(device)
    yield from unsolved(device)
    if device.type == "cuda":
        yield from later_failure(device)
        yield from waiting(device)
        yield from cost(device)
        yield from deterministic(device)
        yield from fp16_accumulation(device)
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield from equality(device, forms, stem_names)
        finally:
            torch.distributed.destroy_process_group()


def describe(device: torch.device) -> dict[str, str]:
    """Return what a reader needs to know about the device and its libraries."""
    found = {"torch": str(torch.__version__)}
    if device.type != "cuda":
        return found
    properties = torch.cuda.get_device_properties(device)
    found["device"] = properties.name
    found["memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
    found["capability"] = f"{properties.major}.{properties.minor}"
    found["cuda"] = str(torch.version.cuda)
    found["cudnn"] = str(torch.backends.cudnn.version())
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(query[0]):
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        found["driver"] = answer.stdout.partition("\n")[0].strip()
    return found


def _line(row: Row) -> str:
    """Return a row in words."""
    words = []
    for key, value in row.items():
        if isinstance(value, float):
            words.append(f"{key} {value:.1e}")
        elif key not in ("check", "passed") and value != "":
            words.append(f"{key} {value}")
    verdict = "FAIL"
    if row["passed"]:
        verdict = "ok  "
    return f"{verdict}  {row['check']}  {', '.join(words)}"


def main() -> None:
    """Check, print and write."""
    args = parse()
    device = torch.device(args.device)
    # Without it cuBLAS refuses the deterministic mode; it is read when CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    forms = args.forms or (FORMS if device.type == "cuda" else FORMS_ON_CPU)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "gpu_checks.json"
    about: dict[str, Any] = {"command": command(), **environment()}
    about["device"] = describe(device)
    print(json.dumps(about), flush=True)
    rows = []
    for row in checks(device, forms, args.stems):
        rows.append(row)
        print(_line(row), flush=True)
        about["checks"] = rows
        path.write_text(json.dumps(about, indent=1) + "\n")
    failed = [row["check"] for row in rows if not row["passed"]]
    if failed:
        sys.exit(f"{len(failed)} of {len(rows)} checks failed: {'; '.join(failed)}")


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    device = "cpu"
    if torch.cuda.is_available():
        device = "cuda"
    add("--device", default=device, help="cpu, cuda, or cuda:1")
    add("--forms", nargs="+", choices=FORMS, help="by default all that the device can run")
    names = list(stems())
    add("--stems", nargs="+", choices=names, default=names, metavar="STEM", help=", ".join(names))
    add("--output_dir", type=Path, default=Path("outputs/gpu_checks"), help="for results, tables and plots")
    return parser.parse_args()


if __name__ == "__main__":
    main()
