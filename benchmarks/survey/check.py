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
    terms = []
    for output in outputs:
        if output.requires_grad:
            term = output.float() * torch.randn(output.shape, generator=generator)
            terms.append(term.nan_to_num(0, 0, 0).mean())
    return scale * torch.stack(terms).sum()


def met_first(model: nn.Module, batch: Any, pixels: str | None) -> list[str]:
    """Name the layers that the pixels meet first: their input changes with the pixels and not with any weight."""
    plain = _inputs(model, batch)
    moved = _inputs(model, _with_other_pixels(batch, pixels))
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    before = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            weight.mul_(1.5).add_(0.01)
        changed = _inputs(model, batch)
        for weight, values in zip(weights, before, strict=True):
            weight.copy_(values)
    first = []
    for name, x in plain.items():
        if changed.get(name) == x != moved.get(name):
            first.append(name)
    return first


def _with_other_pixels(batch: Any, pixels: str | None) -> Any:
    if pixels:
        return {**batch, pixels: 1 - batch[pixels]}
    if isinstance(batch, tuple):
        return (1 - batch[0], *batch[1:])
    return 1 - batch


def _inputs(model: nn.Module, batch: Any) -> dict[str, int]:
    """Return the first input of each layer with a weight, as a hash, until the forward ends or fails."""
    seen: dict[str, int] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if name not in seen:
                seen[name] = hash(next(_tensors((args, kwargs))).detach().numpy().tobytes())

        return hook

    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, layers):
            handles.append(module.register_forward_pre_hook(note(name), with_kwargs=True))
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
    scale = _backward(model, record.calls, outputs)
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad.clone()
    expected: dict[str, Tensor] = {}
    for layer in names:
        calls = [call for call in record.calls if call.layer == layer and call.weight.grad is not None]
        if calls:
            expected |= _expected(model, layer, calls, lam)
    detached = [output.detach() for output in outputs]
    return Reference(detached, scale, gradients, expected)


def _backward(model: nn.Module, calls: Sequence[Call], outputs: Sequence[Tensor]) -> float:
    """Run a backward whose gradients are in float32's range; return the scale of the objective."""
    for scale in SCALES:
        model.zero_grad()
        for call in calls:
            call.weight.grad = None
        objective(outputs, scale).backward(retain_graph=True)
        if any(_is_large(call.weight.grad, scale) for call in calls):
            break
    return scale


def _is_large(grad: Tensor | None, scale: float) -> bool:
    return grad is not None and bool(grad.norm() > 1e-12 * math.sqrt(scale))


def _expected(model: nn.Module, layer: str, calls: Sequence[Call], lam: float) -> dict[str, Tensor]:
    """Return the preconditioned gradients of what the weight of one layer is made of."""
    p = torch.cat([patches(call) for call in calls], 1)
    damped = p.mT @ p / p.shape[1] + lam * torch.eye(p.shape[-1], dtype=torch.float64)
    inverse = torch.linalg.inv(damped)
    weights, grads = [], []
    for call in calls:
        new = _rows(call.weight.grad, len(inverse)) @ inverse
        weights.append(call.weight)
        grads.append(new.reshape(call.weight.shape).to(call.weight.dtype))
    # A weight may be made of the parameters, as standardised ones are: the chain rule goes on from the gradient.
    leaves = {}
    for name, parameter in model.named_parameters():
        if name.startswith(f"{layer}.") and parameter.requires_grad:
            leaves[name] = parameter
    parts = torch.autograd.grad(weights, list(leaves.values()), grads, retain_graph=True, allow_unused=True)
    return {name: part for name, part in zip(leaves, parts, strict=True) if part is not None}


def _rows(grad: Tensor | None, groups: int) -> Tensor:
    assert grad is not None
    return grad.double().reshape(groups, -1, math.prod(grad.shape[1:]))


def differences(model: nn.Module, batch: Any, want: Reference, tolerance: float = 1e-3) -> list[str]:
    """Say what is wrong in a forward and backward of the model with TrAct on."""
    outputs = run(model, batch)
    model.zero_grad()
    objective(outputs, want.scale).backward()
    wrong = []
    for index, (output, wanted) in enumerate(zip(outputs, want.outputs, strict=True)):
        if not _equal(output, wanted):
            wrong.append(f"output {index} differs")
    for name, parameter in model.named_parameters():
        problem = ""
        if name in want.expected:
            problem = _gradient_problem(parameter.grad, want.expected[name].double(), tolerance)
        elif not _same(parameter.grad, want.gradients.get(name)):
            problem = "another gradient"
        if problem:
            wrong.append(f"{name}: {problem}")
    return wrong


def _gradient_problem(got: Tensor | None, target: Tensor, tolerance: float) -> str:
    """Return how a gradient differs from what it must be, in words."""
    if not bool(target.any()):
        return "no gradient reaches it"
    error = math.inf
    if got is not None:
        error = float((got.double() - target).norm() / target.norm())
    if error <= tolerance:
        return ""
    return f"relative error {error:.1e}"


def _same(got: Tensor | None, ordinary: Tensor | None) -> bool:
    if got is None:
        return ordinary is None
    return _equal(got, ordinary)


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
