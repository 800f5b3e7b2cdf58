"""Which weights the pixels of a batch meet first: marks on tensors, followed through one forward of a copy."""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_tract.core.patches import PatchOpMode, is_supported

# Operations that place, copy or normalise numbers, as the pointwise ones do: a weight beside the pixels does not mix them.
ELEMENTWISE = {
    *("cat", "stack", "copy", "copy_", "where", "lerp", "addcmul", "addcdiv", "constant_pad_nd"),
    *("index_put", "index_put_", "_unsafe_index_put", "masked_scatter"),
    *("slice_scatter", "select_scatter", "diagonal_scatter", "index_copy", "index_copy_", "index_add", "index_add_"),
    *("scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_"),
    *("native_layer_norm", "native_group_norm", "_fused_rms_norm", "native_batch_norm", "cudnn_batch_norm"),
    *("_native_batch_norm_legit", "_native_batch_norm_legit_no_training"),
}
# Products: their operands, without the one that is added.
PRODUCTS = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "vdot", "convolution"), slice(0, 2)),
    **dict.fromkeys(("addmm", "addmv", "baddbmm", "addbmm"), slice(1, 3)),
}


class Mark(enum.IntEnum):
    """What a tensor is made of; the highest of an operation's inputs is that of its output."""

    NOTHING = 0
    WEIGHTS = 1
    PIXELS = 2  # perhaps beside weights that do not mix them
    FEATURES = 3  # pixels that have met a weight


class Meeting(NamedTuple):
    """An operation in which pixels met a weight: its name, the module that ran it, and the layer whose operation it is."""

    operation: str
    module: str
    layer: str | None


class PixelTrace:
    """Follows the pixels of one forward, operation by operation, until they meet weights.

    Marks belong to storages, so views share them. Layers whose weight is a parameter count also where they are frozen;
    other weights that are frozen, and tensors that are no parameters, are fixed filters and leave pixels what they are.
    """

    def __init__(self, copied: nn.Module) -> None:
        """Marks the weights of `copied`."""
        self.running = list[str]()  # names of modules, the innermost last
        self.meetings = list[Meeting]()
        self.layers = {name: module for name, module in copied.named_modules() if is_supported(module)}
        self._owners = owners_of_weights(self.layers)
        self._marks: dict[
            int, tuple[StorageWeakRef, Mark]
        ] = {}  # a weak reference keeps the key from being used again
        for parameter in copied.parameters():
            if parameter.requires_grad:
                self.mark(parameter, Mark.WEIGHTS)
        for layer in self.layers.values():
            for parameter in layer.parameters():
                self.mark(parameter, Mark.WEIGHTS)

    def mark(self, tensor: Tensor, mark: Mark) -> None:
        """Marks the storage of `tensor`, unless it has a higher mark."""
        if mark > self.mark_of(tensor):
            storage = tensor.untyped_storage()
            self._marks[storage._cdata] = StorageWeakRef(storage), mark

    def mark_of(self, tensor: Any) -> Mark:
        """Returns the mark of a tensor; nothing for what has no storage or is no tensor."""
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or not self._marks:
            return Mark.NOTHING
        try:
            return self._marks.get(tensor.untyped_storage()._cdata, (None, Mark.NOTHING))[1]
        except (RuntimeError, NotImplementedError):  # a tensor subclass without one
            return Mark.NOTHING

    def owner_of(self, weight: Any) -> str | None:
        """Returns the layer that an operation with `weight` belongs to: the running one, or whose parameter it is."""
        if self.running and self.running[-1] in self.layers:
            return self.running[-1]
        return self._owners.get(id(weight))

    def note(self, operation: str, layer: str | None) -> None:
        """Notes a meeting, once."""
        meeting = Meeting(operation, self.running[-1] if self.running else "", layer)
        if meeting not in self.meetings:
            self.meetings.append(meeting)


def owners_of_weights(layers: Mapping[str, nn.Module]) -> dict[int, str]:
    """Returns the names of layers by the `id` of the parameter that is their weight; computed weights are left out."""
    return {id(layer._parameters["weight"]): name for name, layer in layers.items() if "weight" in layer._parameters}


class LayerOps(PatchOpMode):
    """Notes where pixels meet a layer's weight in a convolution or linear operation."""

    def __init__(self, trace: PixelTrace) -> None:
        super().__init__()
        self.trace = trace

    def run_op(self, op: Callable[..., Tensor], input: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs `op`; what is noted of it stands before what its parts would be noted as."""
        trace = self.trace
        meets = trace.mark_of(input) == Mark.PIXELS and trace.mark_of(weight) == Mark.WEIGHTS
        layer = trace.owner_of(weight) if meets else None
        if not meets:
            return op(input, weight, *args, **kwargs)
        if layer is None:
            trace.note(op.__name__, None)
        before = len(trace.meetings)
        try:
            out = op(input, weight, *args, **kwargs)
        finally:
            del trace.meetings[before:]
        trace.mark(out, Mark.FEATURES)
        if layer is not None:  # a guess of a batch that does not fit has failed by now
            trace.note(op.__name__, layer)
        return out


class EveryOp(TorchDispatchMode):
    """Carries marks through every operation, also those of scripted modules, and notes where pixels meet other weights."""

    def __init__(self, trace: PixelTrace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs `func` and marks what it gives."""
        kwargs = kwargs or {}
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        marks = [self.trace.mark_of(operand) for operand in operands]
        mark = max(marks, default=Mark.NOTHING)
        if mark == Mark.PIXELS and _mixes(func, operands, marks):
            self.trace.note(_name(func, args), None)
            mark = Mark.FEATURES
        out = func(*args, **kwargs)
        if mark:
            for result in (*tree_leaves(out), *_written(func, args, kwargs)):
                if isinstance(result, Tensor):
                    self.trace.mark(result, mark)
        return out


def _mixes(func: Any, operands: list[Tensor], marks: list[Mark]) -> bool:
    """Says whether `func` sums over the products of pixels with a weight, or looks a weight up by them."""
    name = func.overloadpacket.__name__
    if name in PRODUCTS:
        return set(marks[PRODUCTS[name]]) == {Mark.PIXELS, Mark.WEIGHTS}
    matrices = [
        operand
        for operand, mark in zip(operands, marks, strict=True)
        if mark == Mark.WEIGHTS and sum(size != 1 for size in operand.shape) >= 2
    ]
    if name == "mul":  # which repeats each pixel for several weights, for a sum to follow
        pixels = sum(operand.numel() for operand, mark in zip(operands, marks, strict=True) if mark == Mark.PIXELS)
        shape = torch.broadcast_shapes(*(operand.shape for operand in operands))
        return bool(matrices) and math.prod(shape) > pixels
    if torch.Tag.pointwise in func.tags or func.is_view or name in ELEMENTWISE:
        return False
    return bool(matrices)


def _name(func: Any, args: Any) -> str:
    name = str(func.overloadpacket.__name__)
    return "conv_transpose" if name == "convolution" and len(args) > 6 and args[6] else name


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """Returns the arguments that `func` changes in place."""
    return [args[place] if place < len(args) else kwargs.get(name) for place, name in _changed_arguments(func)]


@functools.cache
def _changed_arguments(func: Any) -> list[tuple[int, str]]:
    arguments = enumerate(func._schema.arguments)
    return [(place, a.name) for place, a in arguments if a.alias_info is not None and a.alias_info.is_write]
