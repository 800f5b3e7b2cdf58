"""A whitened start: the first layer begins as W0 (C + lam I)^-1/2, for training from scratch.

Shape letters as in `moments`: g groups, m rows of the weight, n columns of `weight.flatten(1)`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode

from hf_tract.config import TrActError
from hf_tract.layers import FirstLayer, Layers, find_first_layers, unwrap
from hf_tract.moments import patch_moments
from hf_tract.tap import WINDOWS, columns, rows

ROUND = 2.0  # how far the spectrum of fresh weights may be from that of independent entries
_done: WeakSet[nn.Module] = WeakSet()


def whiten_first_layer(
    model: nn.Module,
    batches: Any,
    lam: float = 0.1,
    layers: Layers = "auto",
    *,
    match_scale: bool = False,
    force: bool = False,
    process_group: Any = None,
) -> list[FirstLayer]:
    """Multiplies the first layer's fresh weight W0 by (C + lam I)^-1/2, so that its outputs start uncorrelated.

    C = (1/b) sum of p p^T is taken over all b patches of the batches, on every data-parallel rank, so that each rank comes to
    the same weight. The model's mode, its buffers and the random numbers stay as they are. Call it before the model is
    sharded or given to an optimizer that keeps copies of the weights.

    Args:
        model: any model whose first layer has not been trained.
        batches: what training feeds it, augmented and normalised: one batch (a tensor or a mapping of keyword arguments)
            or a few.
        lam: damping, in the units of C's eigenvalues; TrAct's own is a good one.
        layers: as in `apply_tract`.
        match_scale: also scale the weight so that its outputs have the mean square that W0's would have on white input;
            without it directions in which C is small come out smaller than that.
        force: whiten weights that look trained too.
        process_group: the data-parallel ranks, the default group where None.

    Returns:
        The layers whose weights were changed.

    Raises:
        TrActError: for a layer that was whitened before, a model from `from_pretrained`, or weights that look trained (their
            rows prefer some directions); for a sharded weight, for batches in which nothing reaches the layer, and for a
            `lam` that is not positive. The model is left as it was.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 4, 4), nn.Flatten(), nn.Linear(1024, 10))
        >>> whiten_first_layer(model, torch.randn(8, 3, 16, 16).cumsum(-1))[0].name
        '0'
    """
    if not lam > 0:
        raise TrActError(f"`lam` (={lam!r}) must be a positive number, such as TrAct's 0.1.")
    found = find_first_layers(model, layers)
    for layer in found:
        _check(model, layer, force)
    moments = _moments(unwrap(model), _each(batches), found, process_group)
    roots = [_inverse_root(moment, lam, match_scale) for moment in moments]
    for layer, root in zip(found, roots, strict=True):
        _multiply(layer.module, root)
        _done.add(layer.module)
    return found


def _check(model: nn.Module, layer: FirstLayer, force: bool) -> None:
    m, n, weight = rows(layer.module), columns(layer.module), layer.module.weight
    assert isinstance(weight, Tensor)
    if type(weight.data) is not Tensor or weight.numel() != m * n:
        raise TrActError(
            f"`model` has a sharded first layer ({layer.name}, of shape {tuple(weight.shape)} here): whiten it before it is "
            f"wrapped or prepared."
        )
    source = getattr(unwrap(model), "name_or_path", "")
    why = "was whitened before" if layer.module in _done else f"comes from {source}" if source else _trained(layer.module)
    if why and not force:
        raise TrActError(
            f"`model` has a first layer ({layer.name}) that {why}: a whitened start is for training from scratch. "
            f"`force=True` does it all the same."
        )


def _trained(layer: nn.Module) -> str:
    """What speaks against fresh weights: the spread of the eigenvalues of W^T W is not that of independent entries."""
    m, n, groups = rows(layer), columns(layer), getattr(layer, "groups", 1)
    flat = torch.as_tensor(layer.weight).detach().double().reshape(groups, m // groups, n)
    gram = flat.mT @ flat
    # 1 for equal eigenvalues; for independent entries 1 + n / m, by Marchenko and Pastur.
    spread = float((n * gram.square().sum((1, 2)) / gram.diagonal(dim1=1, dim2=2).sum(1).square()).max())
    fresh = 1 + n * groups / m
    return (
        ""
        if spread < ROUND * fresh
        else f"looks trained (the spread of its spectrum is {spread:.1f}, of a fresh one {fresh:.1f})"
    )


def _each(batches: Any) -> Iterable[Any]:
    return [batches] if isinstance(batches, (Tensor, Mapping)) else batches


def _moments(model: nn.Module, batches: Iterable[Any], found: Sequence[FirstLayer], group: Any) -> list[Tensor]:
    """C of each layer, (g, n, n), float64, over all batches and ranks."""
    collectors = [_Collector(layer.module) for layer in found]
    with torch.no_grad(), _as_it_was(model), contextlib.ExitStack() as stack:
        for layer, collector in zip(found, collectors, strict=True):
            stack.enter_context(collector.watching(layer.module))
        for batch in batches:
            for collector in collectors:
                collector.met = False
            with contextlib.suppress(_EnoughError):
                _forward(model, batch, found, collectors)
    moments = []
    for layer, collector in zip(found, collectors, strict=True):
        payload = torch.cat([collector.sums.flatten(), collector.sums.new_tensor([collector.count])])
        if dist.is_available() and dist.is_initialized():
            payload = _all_reduced(payload, group)
        if not payload[-1] > 0 or not payload.isfinite().all():
            what = "pixels that are not finite" if payload[-1] > 0 else f"nothing that reaches {layer.name}"
            raise TrActError(f"`batches` has {what}: give it batches as training does, as tensors or keyword arguments.")
        moments.append((payload[:-1] / payload[-1]).view_as(collector.sums))
    return moments


def _all_reduced(payload: Tensor, group: Any) -> Tensor:
    """The sum over ranks, also where the model is not on the device of their backend yet."""
    there = payload.cuda() if dist.get_backend(group) == "nccl" else payload
    dist.all_reduce(there, group=group)
    return there.to(payload.device)


class _EnoughError(Exception):
    """Every layer has read its input: the rest of the forward is not needed."""


def _forward(model: nn.Module, batch: Any, found: Sequence[FirstLayer], collectors: Sequence[_Collector]) -> None:
    def stop(*_: Any) -> None:
        if all(collector.met for collector in collectors):
            raise _EnoughError

    handles = [module.register_forward_hook(stop) for _, module, _ in found]
    try:
        model(**batch) if isinstance(batch, Mapping) else model(batch)
    finally:
        for handle in handles:
            handle.remove()


class _Collector(TorchFunctionMode):
    """Sums the patches of one layer's operation."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        n, groups = columns(layer), getattr(layer, "groups", 1)
        self.sums = torch.zeros(groups, n, n, dtype=torch.float64, device=next(layer.parameters()).device)
        self.count, self.met = 0, False

    @contextlib.contextmanager
    def watching(self, layer: nn.Module) -> Iterator[None]:
        """Looks on while `layer` runs."""
        enter = layer.register_forward_pre_hook(lambda *_: self.__enter__() and None, prepend=True)
        leave = layer.register_forward_hook(lambda *_: self.__exit__(None, None, None), always_call=True, prepend=True)
        try:
            yield
        finally:
            enter.remove()
            leave.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs `func`, and takes in its patches if it is a convolution or linear operation."""
        kwargs = kwargs or {}
        if func in WINDOWS:
            read = args[0] if args else kwargs["input"]
            new = torch.zeros_like(self.sums)
            with torch.autocast(read.device.type, enabled=False):
                self.count += patch_moments(read.detach().double(), WINDOWS[func](*args, **kwargs), new)
            self.sums += new
            self.met = True
        return func(*args, **kwargs)


@contextlib.contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """In evaluation mode inside, as before outside."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.random.fork_rng([]):
            yield
    finally:
        for module in training:
            module.training = True


def _inverse_root(moment: Tensor, lam: float, match_scale: bool) -> Tensor:
    """(C + lam I)^-1/2, (g, n, n), float64; scaled so that the trace of root C root is n, if asked for."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp(min=0)
    root: Tensor = (vectors * (values + lam).rsqrt().unsqueeze(-2)) @ vectors.mT
    if match_scale:
        share = (values / (values + lam)).mean(-1)
        root = root / share.sqrt().view(-1, 1, 1)
    return root


def _multiply(layer: nn.Module, root: Tensor) -> None:
    weight: Any = layer.weight
    flat = weight.detach().to(root.dtype).reshape(len(root), -1, root.shape[-1])
    new = (flat @ root.to(flat.device)).reshape(weight.shape).to(weight.dtype)
    with torch.no_grad():
        if is_parametrized(layer, "weight"):
            layer.weight = new
        else:
            weight.copy_(new)
