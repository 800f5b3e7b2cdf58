"""A forward of a weightless copy, and what is seen in it: which layers the pixels meet first, what a layer reads."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Container, Iterator, Mapping
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hf_tract.core.patches import PATCH_OPS, PatchOpMode, PatchSpec, is_supported
from hf_tract.discovery.inputs import forward_parameters, has_open_keywords, map_tensors, pixel_argument_name
from hf_tract.discovery.random_state import random_state_kept
from hf_tract.discovery.tracing import EveryOp, LayerOps, Mark, Meeting, PixelTrace, owners_of_weights

ANY_PIXELS = ("image", "x")  # names of arguments beside which others may be pixels too


class LayerInput(NamedTuple):
    """What one layer reads of a batch: the shape of its operation's input, and the patches that it cuts out of it."""

    name: str
    shape: tuple[int, ...]
    spec: PatchSpec


class Probe(NamedTuple):
    """What pixels met in one forward, in order, and how the forward ended."""

    meetings: list[Meeting]
    error: Exception | None

    @property
    def layers(self) -> list[str]:
        """The layers that they met first; once each."""
        return list(dict.fromkeys(meeting.layer for meeting in self.meetings if meeting.layer is not None))

    @property
    def others(self) -> list[Meeting]:
        """What else they met."""
        return [meeting for meeting in self.meetings if meeting.layer is None]


def meta_copy(model: nn.Module, device: str | None = "meta") -> nn.Module:
    """Returns a copy of `model` whose weights are on the meta device, or where None copies: forwards may write into them.

    Raises:
        Exception: for a model that cannot be copied.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        alike = (
            torch.empty_like(parameter, device=device, requires_grad=False) if device else parameter.detach().clone()
        )
        memo[id(parameter)] = nn.Parameter(alike, requires_grad=parameter.requires_grad)
    for tensor in (*model.buffers(), *_cached_tensors(model)):
        memo[id(tensor)] = tensor.detach().clone() if device is None else torch.empty_like(tensor, device=device)
    copied = copy.deepcopy(model, memo).eval()
    for module in copied.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            module._forward_hooks.clear()  # the user's; those that make weights run before a forward
        if "_old_forward" in vars(module) or "_original_forward" in vars(module):  # accelerate's
            module.__dict__.pop("forward", None)
        elif isinstance(vars(module).get("forward"), FunctionType) and "_orig_mod" not in module._modules:
            raise TypeError("a forward that is a plain function of the instance calls the original")
    return copied


def _cached_tensors(model: nn.Module) -> list[Tensor]:
    """Returns what forwards have left on modules and cannot be copied, since it has a graph."""
    attributes = (tree_leaves(list(vars(module).values())) for module in model.modules())
    return [value for values in attributes for value in values if isinstance(value, Tensor) and not value.is_leaf]


def layers_reached_first(copied: nn.Module, batch: Any, grad: bool = False) -> Probe:
    """Finds what the pixels of `batch` meet first in one forward of a `twin`.

    Args:
        copied: the twin.
        batch: on the twin's device, but for integers: forwards that cut and loop by them want to see them. Its pixels are
            what the forward calls so; else its images, rows and series (see `_may_be_pixels`). A layer that reads pixels
            beside what other layers made of them, as at the end of a skip connection, is not first.
        grad: run it as in training, for forwards that differentiate inside.

    Returns:
        The meetings, and the error by which the forward ended, if it did.
    """
    trace = PixelTrace(copied)
    for tensor in _pixels(copied, batch):
        trace.mark(tensor, Mark.PIXELS)
    error: Exception | None = None
    with (
        warnings.catch_warnings(),
        torch.set_grad_enabled(grad),
        recording(copied, trace.running),
        EveryOp(trace),
        LayerOps(trace),
    ):
        warnings.simplefilter("ignore")
        try:
            run_forward(copied, batch)
        except Exception as problem:  # many a model fails on the meta device, but after its first layer
            error = problem
    return Probe(trace.meetings, error)


def _pixels(copied: nn.Module, batch: Any) -> list[Tensor]:
    """Returns the tensors of a batch that may be pixels."""
    if (
        isinstance(batch, Mapping)
        and (argument := pixel_argument_name(copied)) in batch
        and argument not in ANY_PIXELS
    ):
        batch = batch[argument]
    found = list[Tensor]()
    map_tensors(batch, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found if len(found) == 1 else [tensor for tensor in found if _may_be_pixels(tensor)]


def _may_be_pixels(tensor: Tensor) -> bool:
    """Says whether a tensor of several may be pixels, and no time steps, labels or tokens."""
    return tensor.dim() >= (2 if tensor.is_floating_point() else 3)


def run_forward(model: nn.Module, batch: Any) -> Any:
    """Runs a forward: a tuple holds positional arguments, a mapping keywords, unless it is the one argument itself.

    Random numbers stay as they are.
    """
    with random_state_kept(), torch.compiler.set_stance("force_eager"):
        if isinstance(batch, tuple):
            return model(*batch)
        if isinstance(batch, Mapping) and _are_keywords(model, batch):
            return model(**batch)
        return model(batch)


def _are_keywords(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Says whether a mapping holds keyword arguments, and is not what a forward with one argument takes whole."""
    parameters = forward_parameters(model)
    return any(name in parameters for name in batch) or len(parameters) != 1 or has_open_keywords(parameters)


@contextlib.contextmanager
def recording(copied: nn.Module, running: list[str]) -> Iterator[None]:
    """Keeps in `running` the names of the modules that run, the innermost last."""
    handles = []
    for name, module in copied.named_modules():
        if isinstance(module, torch.jit.ScriptModule):  # takes no hooks: what runs inside counts as its parent's
            continue
        handles.append(module.register_forward_pre_hook(_enter(running, name)))
        handles.append(module.register_forward_hook(lambda *_: running.pop() and None, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _enter(running: list[str], name: str) -> Callable[..., None]:
    return lambda *_: running.append(name)


class Recorder(PatchOpMode):
    """Notes what the layers called `names` read."""

    def __init__(self, names: Container[str]) -> None:
        super().__init__()
        self.names, self.running = names, list[str]()
        self.readings = list[LayerInput]()

    def run_op(self, op: Callable[..., Any], input: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs `op`."""
        out = op(input, weight, *args, **kwargs)
        if self.running and self.running[-1] in self.names:
            spec = PATCH_OPS[op](input, weight, *args, **kwargs)
            self.readings.append(LayerInput(self.running[-1], tuple(input.shape), spec))
        return out


class WeightUses(PatchOpMode):
    """Notes which modules run an operation with the weight of another module's layer."""

    def __init__(self, copied: nn.Module) -> None:
        super().__init__()
        self.running = list[str]()
        self.owners = owners_of_weights(
            {name: module for name, module in copied.named_modules() if is_supported(module)}
        )
        self.callers: dict[str, dict[str, None]] = {}  # and whose weights they read
        self.ran = False

    def run_op(self, op: Callable[..., Any], input: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs `op`."""
        out = op(input, weight, *args, **kwargs)
        owner = self.owners.get(id(weight))
        self.ran = self.ran or owner is not None
        if owner is not None and self.running and owner != self.running[-1]:
            self.callers.setdefault(self.running[-1], {})[owner] = None
        return out


def functional_callers(copied: nn.Module, batch: Any) -> dict[str, list[str]] | None:
    """Returns the names of modules that read the weight of another module's layer, and of these layers.

    None where `batch` fits no layer. A forward that fails later has told enough.
    """
    uses = WeightUses(copied)
    with (
        warnings.catch_warnings(),
        torch.no_grad(),
        recording(copied, uses.running),
        uses,
        contextlib.suppress(Exception),
    ):
        warnings.simplefilter("ignore")
        run_forward(copied, batch)
    return {caller: list(owners) for caller, owners in uses.callers.items()} if uses.ran else None
