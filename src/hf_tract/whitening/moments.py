"""Second moments of what a few layers read, over a few batches, without a backward and without a trace left.

Shape letters as in `moments`: g groups, n columns of `weight.flatten(1)`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_tract.config import TrActError
from hf_tract.core.moments import patch_moments
from hf_tract.core.patches import PATCH_OPS, PatchOpMode, patch_size
from hf_tract.core.sharding import is_sharded
from hf_tract.core.weights import weight_like
from hf_tract.discovery.first_layer import FirstLayer
from hf_tract.discovery.probe import run_forward
from hf_tract.discovery.wrappers import unwrap
from hf_tract.whitening.batches import move_batch


def moments_over(
    model: nn.Module, batches: Iterable[Any], layers: Sequence[FirstLayer], group: Any = None
) -> list[Tensor]:
    """Returns what `input_moments` does, for a model that may be wrapped or sharded and batches that may lie elsewhere."""
    sharded = is_sharded(model)  # whose weights may wait on another device than the one they work on
    like = weight_like(layers[0].module)
    each = [move_batch(batch, None if sharded else like.device, like.dtype) for batch in batches]
    return input_moments(model if sharded else unwrap(model), each, layers, group, whole_forward=sharded)


def input_moments(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Sequence[FirstLayer],
    group: Any = None,
    whole_forward: bool = False,
) -> list[Tensor]:
    """C = (1/b) sum of p p^T of each layer, over all batches and ranks.

    The model runs in evaluation mode; its modes, its buffers and torch's random numbers stay as they are.

    Args:
        model: the model as it is to be called.
        batches: of what it takes: tensors, or mappings of keyword arguments.
        layers: of the model.
        group: the data-parallel ranks; the default group where None.
        whole_forward: run each forward to its end, as a sharded model needs it; else only until the layers have been met.

    Returns:
        (g, n, n) of each layer, float64, on the CPU.

    Raises:
        TrActError: if nothing reaches a layer, or what is not finite, or nothing but zeros.
    """
    collectors = [_Collector(layer.module) for layer in layers]
    with torch.no_grad(), _as_it_was(model), contextlib.ExitStack() as stack:
        for layer, collector in zip(layers, collectors, strict=True):
            stack.enter_context(collector.watching(layer.module))
        for batch in batches:
            for collector in collectors:
                collector.met = False
            with contextlib.nullcontext() if whole_forward else _until_met(layers, collectors):
                run_forward(model, batch)
    moments = []
    for layer, collector in zip(layers, collectors, strict=True):
        payload = torch.cat([collector.sums.flatten(), collector.sums.new_tensor([collector.count])])
        if dist.is_available() and dist.is_initialized():
            payload = _all_reduced(payload, group)
        if wrong := _problem_with(payload, layer.name):
            raise TrActError(
                f"`batches` has {wrong}: give it batches as training does, as tensors or keyword arguments."
            )
        moments.append((payload[:-1] / payload[-1]).view_as(collector.sums).cpu().double())
    return moments


def _problem_with(payload: Tensor, name: str) -> str:
    if not payload[-1] > 0:
        return f"nothing that reaches {name}"
    if not payload.isfinite().all():
        return "pixels that are not finite"
    return "" if payload[:-1].any() else f"nothing but zeros where it reaches {name}"


def _all_reduced(payload: Tensor, group: Any) -> Tensor:
    """The sum over ranks, also where the model is not on the device of their backend yet."""
    there = payload.cuda() if dist.get_backend(group) == "nccl" else payload
    dist.all_reduce(there, group=group)
    return there.to(payload.device)


class _EnoughError(Exception):
    """Every layer has read its input: the rest of the forward is not needed."""


@contextlib.contextmanager
def _until_met(layers: Sequence[FirstLayer], collectors: Sequence[_Collector]) -> Iterator[None]:
    """A forward inside ends where the last of the layers has been met."""

    def stop(*_: Any) -> None:
        if all(collector.met for collector in collectors):
            raise _EnoughError

    handles = [layer.module.register_forward_hook(stop) for layer in layers]
    try:
        with contextlib.suppress(_EnoughError):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Collector(PatchOpMode):
    """Sums the patches of one layer's operation."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        n, groups = patch_size(layer), getattr(layer, "groups", 1)
        weight = weight_like(layer)
        dtype = torch.float32 if weight.device.type == "mps" else torch.float64  # which mps does not have
        self.sums = torch.zeros(groups, n, n, dtype=dtype, device=weight.device)
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

    def run_op(self, op: Callable[..., Tensor], input: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs `op`, and takes in its patches."""
        new = torch.zeros_like(self.sums)
        spec = PATCH_OPS[op](input, weight, *args, **kwargs)
        with torch.autocast(input.device.type, enabled=False):
            self.count += patch_moments(input.detach().to(self.sums.dtype), spec, new)
        self.sums += new
        self.met = True
        return op(input, weight, *args, **kwargs)


@contextlib.contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """In evaluation mode inside, as before outside, with the buffers of before; batches draw no random numbers either."""
    training = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.eval()
    try:
        with torch.random.fork_rng([]):
            yield
    finally:
        model.train(training[0][1])  # by their own `train`, which may do more
        for module, was_training in training:
            module.training = was_training
        for buffer, before in buffers:
            buffer.copy_(before)
