"""Checks what only an accelerator tells: equality in each precision, waits for the device, NCCL, kernels, peak memory.

    uv run --group bench python -m benchmarks.gpu_checks --device cuda

prints a table, writes gpu_checks.json to --output_dir and exits with 1 if a check fails. Each error is that of the
first layer's gradient against the rule in float64 on the CPU, relative in the norm, beside the error of the ordinary
gradient.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
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
COMPILED_STEMS, COMPILED_PRECISIONS = (
    ("ViT 16x16/16", "ResNet 7x7/2"),
    ("float32", "bf16 autocast"),
)  # compiling takes long
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


def equality(device: torch.device, forms: tuple[str, ...]) -> Iterator[Row]:
    """Check each first layer in each precision and form."""
    for stem_name, (stem, shape) in stems().items():
        for name, bound in PRECISIONS.items():
            if device.type == "cpu" and name in ("tf32", "fp16 autocast"):
                continue
            torch.manual_seed(0)
            x = torch.randn(BATCH, *shape, device=device)
            model = Net(copy.deepcopy(stem)).to(device)
            if name == "bf16 weights":
                model, x = model.bfloat16(), x.bfloat16()
            ordinary, want = rule(model, x)
            for form in forms:
                if form in COMPILED and not (stem_name in COMPILED_STEMS and name in COMPILED_PRECISIONS):
                    continue
                torch.compiler.reset()
                vanilla = error(gradient(copy.deepcopy(model), x, name, form), ordinary)
                with apply_tract(model, LAM):
                    ours = error(gradient(model, x, name, form), want)
                limit = max(bound, 4 * vanilla)
                yield _row(f"{stem_name}, {name}, {form}", ours <= limit, error=ours, vanilla=vanilla, limit=limit)


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


def checks(device: torch.device) -> Iterator[Row]:
    """Run every check of a device; those that need CUDA only there."""
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield from equality(device, FORMS if device.type == "cuda" else FORMS_ON_CPU)
        finally:
            torch.distributed.destroy_process_group()
    yield from ranges(device)
    yield from unsolved(device)
    if device.type == "cuda":
        yield from waiting(device)
        yield from cost(device)


def _figures(row: Row) -> str:
    """Return the figures of a row in words."""
    words = []
    for key, value in row.items():
        if isinstance(value, float):
            words.append(f"{key} {value:.1e}")
        elif key not in ("check", "passed"):
            words.append(f"{key} {value}")
    return ", ".join(words)


def main() -> None:
    """Check, print and write."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, or cuda:1")
    add("--output_dir", type=Path, default=Path("outputs/gpu_checks"), help="for results, tables and plots")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in checks(torch.device(args.device)):
        rows.append(row)
        print("ok  " if row["passed"] else "FAIL", row["check"], _figures(row), sep="  ", flush=True)
        result = {"command": command(), **environment(), "checks": rows}
        (args.output_dir / "gpu_checks.json").write_text(json.dumps(result, indent=1) + "\n")
    failed = [row["check"] for row in rows if not row["passed"]]
    sys.exit(f"{len(failed)} of {len(rows)} checks failed: {'; '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
