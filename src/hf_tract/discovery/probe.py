"""Runs one forward call of a copied model, and records what the pixels reach first and what the layers read."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hf_tract.core.attach import detach
from hf_tract.core.patches import torchs_linear
from hf_tract.discovery.calling import run_forward, tensors_in
from hf_tract.discovery.inputs import pixel_argument_name
from hf_tract.discovery.tracing import LayerInput, LayerOps, Mark, Meeting, PixelTrace

# If the pixel argument has one of these names, other arguments may hold pixels too.
COMMON_NAMES = ("image", "x")


class Probe(NamedTuple):
    """Records one forward call on `batch`: where its pixels met weights, and what the layers read, both in order."""

    batch: Any
    meetings: list[Meeting]
    inputs: list[LayerInput]
    # Many forwards fail on the meta device, but only after their first layer.
    error: Exception | None

    @property
    def layers(self) -> list[str]:
        """Return the names of the layers that the pixels reached first."""
        layers = []
        for meeting in self.meetings:
            if meeting.layer is not None and meeting.layer not in layers:
                layers.append(meeting.layer)
        return layers


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a copy of `model` for trial runs, with its weights on the meta device, where they take no memory.

    Raises:
        Exception: for a model that cannot be copied, such as FSDP2's.
    """
    return _trial_copy(model, lambda tensor: torch.empty_like(tensor, device="meta"))


def copy_with_values(model: nn.Module) -> nn.Module:
    """Return a copy of `model` for trial runs, with the values of its weights; raises as `meta_copy` does."""
    return _trial_copy(model, lambda tensor: tensor.detach().clone())


def _trial_copy(model: nn.Module, copy_tensor: Callable[[Tensor], Tensor]) -> nn.Module:
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(copy_tensor(parameter), parameter.requires_grad)
    for tensor in (*model.buffers(), *_cached_tensors(model)):
        memo[id(tensor)] = copy_tensor(tensor)
    copied = copy.deepcopy(model, memo)
    copied.eval()  # A model's own `train` may return nothing.
    for module in copied.modules():
        # With TrAct an operation would read something other than the weight, by which its layer is known.
        detach(module)
        if not isinstance(module, torch.jit.ScriptModule):
            _forget_hooks(module)
        attributes = vars(module)
        if "_old_forward" in attributes or "_original_forward" in attributes:
            attributes.pop("forward", None)  # accelerate's, which calls the original module
        elif isinstance(attributes.get("forward"), FunctionType) and "_orig_mod" not in module._modules:
            raise TypeError("a plain function as the forward of an instance calls the original module")
    return copied


def _forget_hooks(module: nn.Module) -> None:
    """Take the user's forward hooks off a copy; hooks that compute weights are pre-hooks, and stay.

    The first forward of a transformers model leaves hooks that collect hidden states, which some forwards need.
    """
    for key, hook in list(module._forward_hooks.items()):
        if not str(getattr(hook, "__module__", "")).startswith("transformers."):
            del module._forward_hooks[key]


def _cached_tensors(model: nn.Module) -> list[Tensor]:
    """Return the tensors that forward calls have left on modules, and that have a graph: `deepcopy` refuses these."""
    cached = []
    for module in model.modules():
        for value in tree_leaves(list(vars(module).values())):
            if isinstance(value, Tensor) and not value.is_leaf:
                cached.append(value)
    return cached


def layers_reached_first(copied: nn.Module, batch: Any) -> Probe:
    """Run one forward call, and record which layers the pixels of `batch` reach first.

    A layer that reads both pixels and the outputs of other layers, as after a skip connection, is not one of them.

    Args:
        copied: the model, or a copy of it; the forward call may change its buffers.
        batch: the inputs, on the device of `copied`. For the meta device, integers are best on the CPU, since forwards
            slice and loop by their values.

    Returns:
        The record of the forward call, also of one that failed.
    """
    trace = PixelTrace(copied)
    for tensor in _pixels(copied, batch):
        trace.mark(tensor, Mark.PIXELS)
    error: Exception | None = None
    # Some forwards compute gradients themselves.
    with warnings.catch_warnings(), torch.enable_grad(), _running_names(copied, trace.running):
        warnings.simplefilter("ignore")
        try:
            with torchs_linear(), trace, LayerOps(trace):
                run_forward(copied, batch)
        except Exception as problem:  # whatever a model's forward raises
            error = problem
    # Without gradients, the layer is a teacher's; what is no layer's own is told as an error.
    learned = [meeting for meeting in trace.meetings if meeting.is_learned or meeting.layer is None]
    return Probe(batch, learned or trace.meetings, trace.inputs, error)


def _pixels(copied: nn.Module, batch: Any) -> list[Tensor]:
    """Return the tensors that hold pixels: the argument named for them, or else all that may hold some."""
    if isinstance(batch, Mapping):
        argument = pixel_argument_name(copied)
        if argument in batch and argument not in (*COMMON_NAMES, "input_ids"):
            batch = batch[argument]
    tensors = tensors_in(batch)
    if len(tensors) == 1:
        return tensors
    return list(filter(_may_be_pixels, tensors))


def _may_be_pixels(tensor: Tensor) -> bool:
    """Return whether one of several tensors may hold pixels, rather than time steps, labels or tokens."""
    if tensor.is_floating_point():
        return tensor.dim() >= 2
    return tensor.dim() >= 3


@contextlib.contextmanager
def _running_names(model: nn.Module, running: list[str]) -> Iterator[None]:
    """Keep in `running` the names of the modules that run, the innermost last."""
    handles = []
    for name, module in model.named_modules():
        # A scripted module takes no hooks: what runs inside counts as its parent's.
        if not isinstance(module, torch.jit.ScriptModule):
            handles.append(module.register_forward_pre_hook(_append_to(running, name)))
            handles.append(module.register_forward_hook(_pop_from(running), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _append_to(running: list[str], name: str) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        running.append(name)

    return hook


def _pop_from(running: list[str]) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        running.pop()

    return hook
