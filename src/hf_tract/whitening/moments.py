"""Measures the second moment C of a few layers over a few batches, by forward calls alone.

Shape letters: g groups, n columns of `weight.flatten(1)`, b patches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_tract.config import TrActError
from hf_tract.core.accumulation import ranks_of, sum_over_ranks
from hf_tract.core.moments import PatchSums, patch_moments
from hf_tract.core.ops import without_autocast
from hf_tract.core.patches import PATCH_OPS, PatchOpMode, groups_of, patch_size, torchs_linear
from hf_tract.core.sharding import is_sharded
from hf_tract.core.solve import widest_dtype
from hf_tract.core.weights import is_weight_of, weight_like
from hf_tract.discovery.calling import run_forward
from hf_tract.discovery.first_layer import FirstLayer
from hf_tract.discovery.wrappers import unwrap
from hf_tract.whitening.batches import move_batch


def second_moments(
    model: nn.Module, batches: Iterable[Any], layers: Sequence[FirstLayer], process_group: Any = None
) -> list[Tensor]:
    """Return C = (1/b) sum of p p^T of each layer, over the patches p of all batches and ranks.

    The model runs in evaluation mode, but for batch norms; its modes, its buffers and the random numbers stay as they
    are.

    Args:
        model: wrapped, sharded or neither.
        batches: as `to_model_inputs` returns them, on any device.
        layers: layers of `model`.
        process_group: the data-parallel ranks; None for the default group.

    Returns:
        For each layer a tensor (g, n, n), float64, on the CPU.

    Raises:
        TrActError: if no patches reach a layer, or only zeros, or numbers that are not finite.
    """
    collectors = [_MomentCollector(layer.module) for layer in layers]
    with torch.no_grad():
        _collect(model, batches, collectors)
    moments = []
    for layer, collector in zip(layers, collectors, strict=True):
        total = _all_reduced(PatchSums(collector.sums, collector.patch_count), process_group)
        problem = _problem_with(total, layer.name)
        if problem:
            raise TrActError(
                f"`batches` has {problem}: give it batches as training does, as tensors or keyword arguments."
            )
        moment = total.sums / total.patch_count
        moments.append(moment.cpu().double())
    return moments


def _problem_with(total: PatchSums, name: str) -> str:
    """Return what is wrong with the sums and the patch count of the layer `name`, or ""."""
    if not total.patch_count > 0:
        return f"nothing that reaches {name}"
    if not total.sums.isfinite().all():
        return "pixels that are not finite"
    if not total.sums.any():
        return f"nothing but zeros where it reaches {name}"
    return ""


def _all_reduced(mine: PatchSums, group: Any) -> PatchSums:
    """Return the sums over all ranks."""
    # NCCL takes no CPU tensors, and the model may not have been moved to its device yet.
    if ranks_of(group) > 1 and dist.get_backend(group) == "nccl":
        mine = mine._replace(sums=mine.sums.cuda())
    return sum_over_ranks(mine, group)


class _MomentCollector(PatchOpMode):
    """Sums p p^T over the patches that one layer's weight reads, by the layer's first call or before it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        g = groups_of(layer)
        n = patch_size(layer)
        device = weight_like(layer).device
        dtype = widest_dtype(device)
        self.sums = torch.zeros(g, n, n, dtype=dtype, device=device)
        self.patch_count = 0
        self.has_read = False
        # Whether the layer's first call in a forward is running.
        self._is_inside = False

    def run_op(self, op: Callable[..., Tensor], input: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        """Run `op` and add the patches of its input, if the layer's weight reads them."""
        if self._is_first_read(weight):
            spec = PATCH_OPS[op](input, weight, *args, **kwargs)
            # A sharded model may compute on another device than the one where it keeps its weights.
            new = torch.zeros_like(self.sums, device=input.device)
            with without_autocast(input):
                self.patch_count += patch_moments(input.detach(), spec, new)
            self.sums = self.sums.to(input.device) + new
            self.has_read = True
        return op(input, weight, *args, **kwargs)

    def _is_first_read(self, weight: Any) -> bool:
        """Return whether an operation with `weight` counts: one of the layer's first call, or its parent's first."""
        if self._is_inside:
            return is_weight_of(self.layer, weight)
        return not self.has_read and weight is self.layer._parameters.get("weight")

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch where the layer's first call begins and ends."""

        def enter(*_: Any) -> None:
            self._is_inside = not self.has_read

        def leave(*_: Any) -> None:
            self._is_inside = False

        before = self.layer.register_forward_pre_hook(enter, prepend=True)
        after = self.layer.register_forward_hook(leave, always_call=True, prepend=True)
        with before, after:
            yield


class _AllReadError(Exception):
    """Ends a forward call: all layers have read their inputs, so the rest of it is not needed."""


def _collect(model: nn.Module, batches: Iterable[Any], collectors: Sequence[_MomentCollector]) -> None:
    """Run the model on the batches, with all collectors watching."""
    weight = weight_like(collectors[0].layer)
    device: torch.device | None = weight.device
    sharded = is_sharded(model)
    if sharded:
        # Its weights may be kept on another device than the one where they compute.
        device = None
    else:
        model = unwrap(model)

    def stop(*_: Any) -> None:
        if all(collector.has_read for collector in collectors):
            raise _AllReadError

    with contextlib.ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        stack.enter_context(torchs_linear())
        for collector in collectors:
            stack.enter_context(collector.watching())
            # All ranks gather the weights of a sharded model together, so each runs all of its forward.
            if not sharded:
                stack.enter_context(collector.layer.register_forward_hook(stop))
        for batch in batches:
            with _reading(collectors), contextlib.suppress(_AllReadError):
                run_forward(model, move_batch(batch, device, weight.dtype))


@contextlib.contextmanager
def _reading(collectors: Sequence[_MomentCollector]) -> Iterator[None]:
    """Collect what the layers read in one forward call."""
    with contextlib.ExitStack() as stack:
        for collector in collectors:
            collector.has_read = False
            stack.enter_context(collector)
        yield


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode but for batch norms, and restore its modes and buffers at the end.

    A batch norm of a fresh model has no statistics yet, and in training the layers behind it read what it makes of
    each batch. `SyncBatchNorm` would wait for other processes, and is left in evaluation mode.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = []
    for module in modes:
        for name, buffer in module._buffers.items():
            if buffer is not None:
                buffers.append((module, name, buffer, buffer.clone()))
    model.eval()
    for module in modes:
        if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
            module.train()
    try:
        yield
    finally:
        # A model's own `train` may do more than set the modes, so it is called too.
        model.train(modes[model])
        for module, mode in modes.items():
            module.training = mode
        for module, name, buffer, before in buffers:
            buffer.copy_(before)
            module._buffers[name] = buffer
