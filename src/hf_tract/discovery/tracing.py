"""Follows the pixels of a batch through a forward call, by marks on tensors, to the weights that they reach first."""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_tract.core.patches import PATCH_OPS, PatchOpMode, PatchSpec, is_supported

# Operations that place, copy or normalise numbers: like pointwise ones, they do not sum pixels times weights.
ELEMENTWISE = {
    *("cat", "stack", "copy", "copy_", "where", "lerp", "addcmul", "addcdiv", "constant_pad_nd"),
    *("index_put", "index_put_", "_unsafe_index_put", "masked_scatter"),
    *("slice_scatter", "select_scatter", "diagonal_scatter", "index_copy", "index_copy_", "index_add", "index_add_"),
    *("scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_"),
    *("native_layer_norm", "native_group_norm", "_fused_rms_norm", "native_batch_norm", "cudnn_batch_norm"),
    *("_native_batch_norm_legit", "_native_batch_norm_legit_no_training"),
}
# Products, with the positions of their two factors among the operands: an added bias is no factor.
PRODUCTS = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "vdot", "convolution"), slice(0, 2)),
    **dict.fromkeys(("addmm", "addmv", "baddbmm", "addbmm"), slice(1, 3)),
}


class Mark(enum.IntEnum):
    """Marks where the values of a tensor come from; the result of an operation has the highest mark of its inputs."""

    NOTHING = 0
    WEIGHTS = 1
    PIXELS = 2  # perhaps shifted or scaled by weights, or joined with them
    FEATURES = 3  # computed from pixels and a weight, where they met


class Meeting(NamedTuple):
    """Describes an operation in which pixels met a weight: it sums products of both, or looks the weight up."""

    operation: str
    module: str  # the name of the module that ran it
    layer: str | None  # the name of the layer whose convolution or linear operation it is
    is_learned: bool  # whether gradients were on, as they are not for the teacher of a student


class LayerInput(NamedTuple):
    """Describes what one operation of a layer read: the shape of its input, and how it cuts patches out of that."""

    layer: str
    module: str  # the name of the one that ran it: the layer itself, or a module that uses its weight directly
    shape: tuple[int, ...]
    spec: PatchSpec


class PixelTrace(TorchDispatchMode):
    """Carries marks through all operations in this context, scripted ones too, and records where pixels meet weights.

    Marks belong to storages, so views share them. A layer's weight counts even if it is frozen or quantised. Other
    frozen weights, and tensors that are no parameters, are fixed filters: their outputs still count as pixels.
    """

    def __init__(self, model: nn.Module) -> None:
        """Mark the weights of `model`."""
        super().__init__()
        # The names of the modules that run, the innermost last.
        self.running = [""]
        self.meetings: list[Meeting] = []
        self.inputs: list[LayerInput] = []
        self.layers = [name for name, module in model.named_modules() if is_supported(module)]
        # The key is the `id` of a weight; a tied one has several owners.
        self._owners: dict[int, list[str]] = {}
        # A weak reference prevents the address of a freed storage from being reused.
        self._marks: dict[StorageWeakRef, Mark] = {}
        parameters = [parameter for name, parameter in model.named_parameters() if _may_learn(name, parameter)]
        for name in self.layers:
            layer = model.get_submodule(name)
            parameters.extend(layer.parameters())
            weight = layer._parameters.get("weight")
            # A parametrized weight is no parameter, but a new tensor in every forward call.
            if weight is not None:
                self._owners.setdefault(id(weight), []).append(name)
        for parameter in parameters:
            self.mark(parameter, Mark.WEIGHTS)

    def mark(self, tensor: Tensor, mark: Mark) -> None:
        """Mark the storage of `tensor`, unless it has a higher mark."""
        if mark > self.mark_of(tensor):
            storage = _storage(tensor)
            if storage is not None:
                self._marks[storage] = mark

    def mark_of(self, tensor: Any) -> Mark:
        """Return the mark of a tensor; `Mark.NOTHING` for one without storage, and for other objects."""
        storage = _storage(tensor)
        if storage is None:
            return Mark.NOTHING
        return self._marks.get(storage, Mark.NOTHING)

    def layer_of(self, weight: Any) -> str | None:
        """Return the name of the layer that an operation with `weight` belongs to.

        That is the layer that runs, unless the weight is another layer's parameter.
        """
        running = self.running[-1]
        owners = self._owners.get(id(weight), [running])
        layer = running if running in owners else owners[0]
        if layer in self.layers:
            return layer
        return None

    def note_meeting(self, operation: str, layer: str | None) -> None:
        """Record that pixels met a weight in an operation."""
        meeting = Meeting(operation, self.running[-1], layer, torch.is_grad_enabled())
        self.meetings.append(meeting)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, mark its results, and record whether pixels meet a weight in it."""
        kwargs = kwargs or {}
        operands = list(filter(torch.is_tensor, tree_leaves((args, kwargs))))
        marks = list(map(self.mark_of, operands))
        mark = max(marks, default=Mark.NOTHING)
        if mark == Mark.PIXELS and _mixes(func, operands, marks):
            self.note_meeting(_name(func, args), None)
            mark = Mark.FEATURES
        out = func(*args, **kwargs)
        if mark > Mark.NOTHING:
            for result in filter(torch.is_tensor, tree_leaves((out, _written(func, args, kwargs)))):
                self.mark(result, mark)
        return out


def _may_learn(name: str, parameter: nn.Parameter) -> bool:
    """Return whether a parameter is no fixed filter; a quantised one stands for a weight, but not beside LoRA's."""
    if parameter.requires_grad:
        return True
    return not parameter.is_floating_point() and ".base_layer." not in name


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """Return the arguments that an operation changes in place: a user's own may return nothing."""
    written = []
    for place, name in _changed_arguments(func):
        written.append(args[place] if place < len(args) else kwargs.get(name))
    return written


@functools.cache
def _changed_arguments(func: Any) -> list[tuple[int, str]]:
    changed = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            changed.append((place, argument.name))
    return changed


def _storage(tensor: Any) -> StorageWeakRef | None:
    if not isinstance(tensor, Tensor):
        return None
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (RuntimeError, NotImplementedError):
        # Sparse tensors and some subclasses have none.
        return None


class LayerOps(PatchOpMode):
    """Records in a trace what the layers read, and where pixels meet a weight in a convolution or linear operation."""

    def __init__(self, trace: PixelTrace) -> None:
        super().__init__()
        self.trace = trace

    def run_op(self, op: Callable[..., Tensor], input: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        """Run `op`, and record a layer's only if it succeeds: a guessed batch that does not fit fails here."""
        trace = self.trace
        layer = trace.layer_of(weight)
        meets = trace.mark_of(input) == Mark.PIXELS and trace.mark_of(weight) == Mark.WEIGHTS
        if meets and layer is None:
            trace.note_meeting(op.__name__, None)
        before = len(trace.meetings)
        try:
            out = op(input, weight, *args, **kwargs)
        finally:
            if meets:  # the trace has recorded the parts of the operation
                del trace.meetings[before:]
        if meets:
            trace.mark(out, Mark.FEATURES)
        if layer is not None:
            spec = PATCH_OPS[op](input, weight, *args, **kwargs)
            trace.inputs.append(LayerInput(layer, trace.running[-1], tuple(input.shape), spec))
            if meets:
                trace.note_meeting(op.__name__, layer)
        return out


def _mixes(func: Any, operands: list[Tensor], marks: list[Mark]) -> bool:
    """Return whether `func` sums products of pixels with a weight, or looks a weight up by pixels."""
    if func.namespace == "quantized":  # its weights are packed into objects
        return True
    name = func.overloadpacket.__name__
    if name in PRODUCTS:
        return set(marks[PRODUCTS[name]]) == {Mark.PIXELS, Mark.WEIGHTS}
    pixels = 0
    has_matrix = False
    for operand, mark in zip(operands, marks, strict=True):
        if mark == Mark.PIXELS:
            pixels += operand.numel()
        elif mark == Mark.WEIGHTS and len(operand.shape) - operand.shape.count(1) >= 2:
            has_matrix = True
    if name == "mul":  # each pixel is repeated for several weights, and a sum is to follow
        shape = torch.broadcast_shapes(*[operand.shape for operand in operands])
        return has_matrix and math.prod(shape) > pixels
    if torch.Tag.pointwise in func.tags or func.is_view or name in ELEMENTWISE:
        return False
    return has_matrix


def _name(func: Any, args: Any) -> str:
    name = str(func.overloadpacket.__name__)
    if name == "convolution" and len(args) > 6 and args[6]:
        return "conv_transpose"
    return name
