"""Checks which layer TrAct takes and the gradient that this layer gets, by none of TrAct's own code."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CONVS: tuple[Any, ...] = (torch.conv1d, torch.conv2d, torch.conv3d)
WEIGHTED = (F.linear, *CONVS)
SCALES = (1.0, 1e12, 1e24)


def run(model: nn.Module, batch: Any) -> list[Tensor]:
    """Return the floating-point outputs of a model, in a fixed order."""
    torch.manual_seed(0)
    keywords = batch if isinstance(batch, Mapping) else {}
    arguments = batch if isinstance(batch, tuple) else () if keywords else (batch,)
    out = model(*arguments, **keywords)
    return [tensor for tensor in _tensors(out) if tensor.is_floating_point()]


def objective(outputs: Sequence[Tensor], scale: float = 1.0) -> Tensor:
    """Return a number that depends on every output.

    It is a random projection, since a mean square of normalised outputs is a constant.
    """
    generator = torch.Generator().manual_seed(0)
    terms = [t.float() * torch.randn(t.shape, generator=generator) for t in outputs if t.requires_grad]
    return scale * torch.stack([term.nan_to_num(0, 0, 0).mean() for term in terms]).sum()


def met_first(model: nn.Module, batch: Any, pixels: str | None) -> list[str]:
    """Name the layers that the pixels meet first: their input changes with the pixels and not with any weight."""
    plain = _inputs(model, batch)
    other: Any
    if pixels:
        other = {**batch, pixels: 1 - batch[pixels]}
    else:
        other = (1 - batch[0], *batch[1:]) if isinstance(batch, tuple) else 1 - batch
    moved = _inputs(model, other)
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() > 1}
    kept = {name: parameter.detach().clone() for name, parameter in weights.items()}
    with torch.no_grad():
        for parameter in weights.values():
            parameter.mul_(1.5).add_(0.01)
        changed = _inputs(model, batch)
        for name, parameter in weights.items():
            parameter.copy_(kept[name])
    return [name for name, x in plain.items() if changed.get(name) == x != moved.get(name)]


def _inputs(model: nn.Module, batch: Any) -> dict[str, int]:
    """Return the first input of each layer with a weight, as a hash, until the forward ends or fails."""
    seen: dict[str, int] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if name not in seen:
                seen[name] = hash(next(_tensors((args, kwargs))).detach().numpy().tobytes())

        return hook

    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    named = [(name, module) for name, module in model.named_modules() if isinstance(module, layers)]
    handles = [module.register_forward_pre_hook(note(name), with_kwargs=True) for name, module in named]
    try:
        # Weights of 1.5 times their size may lead anywhere.
        with torch.no_grad(), contextlib.suppress(Exception):
            run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


class Call(NamedTuple):
    """Holds one operation of a layer: which, its input, the weight that it read and its other arguments."""

    layer: str
    func: Any
    x: Tensor
    weight: Tensor
    rest: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Record(TorchFunctionMode):
    """Keeps every weighted operation that runs directly in one of the named layers."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.inside: list[str] = []
        self.handles = []
        for name in names:
            layer = model.get_submodule(name)
            self.handles.append(layer.register_forward_pre_hook(self._enter(name)))
            self.handles.append(layer.register_forward_hook(lambda *_: self.inside.pop() and None))

    def _enter(self, name: str) -> Callable[..., None]:
        return lambda *_: self.inside.append(name)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in WEIGHTED or not self.inside:
            return func(*args, **kwargs)
        x, weight, *rest = args
        weight = weight.view_as(weight)
        weight.retain_grad()
        self.calls.append(Call(self.inside[-1], func, x.detach(), weight, tuple(rest), kwargs))
        return func(x, weight, *rest, **kwargs)


def patches(call: Call) -> Tensor:
    """Return patches (g, b, n) in float64, which a convolution by one-hot kernels reads out entry by entry."""
    x, weight = call.x.double(), call.weight
    if call.func is F.linear:
        return x.reshape(1, -1, x.shape[-1])
    names = ("bias", "stride", "padding", "dilation", "groups")
    values = {**dict(zip(names, call.rest, strict=False)), **call.kwargs, "bias": None}
    groups, n = values.get("groups", 1), weight[0].numel()
    x = x if x.dim() == weight.dim() else x[None]
    one_hot = torch.eye(n, dtype=torch.float64).view(n, *weight.shape[1:]).repeat(groups, *[1] * (weight.dim() - 1))
    entries: Tensor = call.func(x, one_hot, **values).unflatten(1, (groups, n))
    return entries.movedim(2, -1).movedim(1, 0).reshape(groups, -1, n)


@dataclasses.dataclass(frozen=True)
class Reference:
    """Holds an ordinary forward and backward, and the gradients that TrAct must hand on instead."""

    outputs: list[Tensor]
    # The objective is scaled, since a fresh model may leave its first layer a gradient below float32's range.
    scale: float
    # The ordinary gradient of every parameter.
    gradients: dict[str, Tensor]
    # The preconditioned gradients of what the layers' weights are made of.
    expected: dict[str, Tensor]


def reference(model: nn.Module, batch: Any, names: Sequence[str], lam: float) -> Reference:
    """Compute the dense formula of the paper for the named layers, in float64, by one C for each layer and step."""
    record = _Record(model, names)
    try:
        with record:
            outputs = run(model, batch)
    finally:
        for handle in record.handles:
            handle.remove()
    for scale in SCALES:
        model.zero_grad()
        for call in record.calls:
            call.weight.grad = None
        objective(outputs, scale).backward(retain_graph=True)
        if any(
            call.weight.grad is not None and call.weight.grad.norm() > 1e-12 * math.sqrt(scale)
            for call in record.calls
        ):
            break
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    expected: dict[str, Tensor] = {}
    for layer in dict.fromkeys(call.layer for call in record.calls):
        calls = [call for call in record.calls if call.layer == layer and call.weight.grad is not None]
        if not calls:
            continue
        p = torch.cat([patches(call) for call in calls], 1)
        inverse = torch.linalg.inv(p.mT @ p / p.shape[1] + lam * torch.eye(p.shape[-1], dtype=torch.float64))
        # A weight may be made of the parameters, as standardised ones are: the chain rule goes on from the gradient.
        leaves = {n: q for n, q in model.named_parameters() if n.startswith(f"{layer}.") and q.requires_grad}
        weights = [call.weight for call in calls]
        handed = [_rows(call.weight.grad, len(inverse)) @ inverse for call in calls]
        grads = [grad.reshape(weight.shape).to(weight.dtype) for grad, weight in zip(handed, weights, strict=True)]
        parts = torch.autograd.grad(weights, list(leaves.values()), grads, retain_graph=True, allow_unused=True)
        expected |= {name: part for name, part in zip(leaves, parts, strict=True) if part is not None}
    return Reference([out.detach() for out in outputs], scale, gradients, expected)


def _rows(grad: Tensor | None, groups: int) -> Tensor:
    assert grad is not None
    return grad.double().reshape(groups, -1, math.prod(grad.shape[1:]))


def differences(model: nn.Module, batch: Any, want: Reference, tolerance: float = 1e-3) -> list[str]:
    """Say what is wrong in a forward and backward of the model with TrAct on."""
    outputs = run(model, batch)
    model.zero_grad()
    objective(outputs, want.scale).backward()
    wrong = [
        f"output {i} differs" for i, (a, b) in enumerate(zip(outputs, want.outputs, strict=True)) if not _equal(a, b)
    ]
    for name, parameter in model.named_parameters():
        got, ordinary = parameter.grad, want.gradients.get(name)
        if name in want.expected:
            target = want.expected[name].double()
            if not bool(target.any()):
                wrong.append(f"{name}: no gradient reaches it")
                continue
            error = (
                float(torch.linalg.norm(got.double() - target) / torch.linalg.norm(target))
                if got is not None
                else math.inf
            )
            wrong += [] if error <= tolerance else [f"{name}: relative error {error:.1e}"]
        elif (got is None) != (ordinary is None) or (got is not None and not _equal(got, ordinary)):
            wrong.append(f"{name}: another gradient")
    return wrong


def _equal(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
