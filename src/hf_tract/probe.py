"""What do the pixels of a batch meet first: one forward of a twin in which they alone require a gradient."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_tract.batches import each_tensor, pixel_argument
from hf_tract.moments import Window
from hf_tract.patches import PATCH_OPS, PatchOpMode, is_supported


class Reading(NamedTuple):
    """What one layer reads of a batch: the shape of its operation's input, and the patches that it cuts out of it."""

    name: str
    shape: tuple[int, ...]
    window: Window


def twin(model: nn.Module, device: str | None = "meta") -> nn.Module:
    """A copy of `model` without a copy of its weights: they are on the meta device, or where None the model's own."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        alike = tensor.detach() if device is None else torch.empty_like(tensor, device=device, requires_grad=False)
        memo[id(tensor)] = nn.Parameter(alike, requires_grad=False) if isinstance(tensor, nn.Parameter) else alike
    copied = copy.deepcopy(model, memo).eval()
    for module in copied.modules():
        module.__dict__.pop("forward", None)  # accelerate's wrappers would call the original
    return copied


def probe(copied: nn.Module, batch: Any) -> list[Reading]:
    """The layers of a `twin` that the pixels of `batch` reach first, once for each time.

    `batch` is on the twin's device, but for integers: forwards that cut and loop by them want to see them. Its pixels are what
    the forward calls so, or every floating-point tensor. A layer that reads pixels beside what other layers made of them, as at
    the end of a skip connection, is not first.
    """
    reached = _reached(copied, batch, pixels=True)
    if len({reading.name for reading in reached}) > 1:
        mixed = {reading.name for reading in _reached(copied, batch, pixels=False)}
        reached = [reading for reading in reached if reading.name not in mixed]
    modules = dict(copied.named_modules())
    return [reading for reading in reached if is_supported(modules[reading.name])]


def _reached(copied: nn.Module, batch: Any, pixels: bool) -> list[Reading]:
    """What the pixels reach with no weight between, or else what the outputs of layers reach."""
    recorder = Recorder(copied, taint=not pixels)
    if pixels and isinstance(batch, Mapping):
        argument = pixel_argument(copied)
        batch = {k: _tainted(v) if k == argument or argument not in batch else v for k, v in batch.items()}
    elif pixels:
        batch = _tainted(batch)
    with warnings.catch_warnings(), torch.enable_grad(), watched(copied, recorder):
        warnings.simplefilter("ignore")
        with contextlib.suppress(Exception):  # many a model fails on the meta device, but after its first layer
            call(copied, batch)
    return recorder.readings


def call(model: nn.Module, batch: Any) -> Any:
    """A forward; the random numbers of the CPU stay as they are."""
    with torch.random.fork_rng([]):
        return model(**batch) if isinstance(batch, Mapping) else model(batch)


@contextlib.contextmanager
def watched(copied: nn.Module, recorder: Watcher) -> Iterator[None]:
    """Tells `recorder` of every operation, and of the module that is running."""
    handles = []
    for name, module in copied.named_modules():
        handles.append(module.register_forward_pre_hook(_enter(recorder.running, name)))
        handles.append(module.register_forward_hook(lambda *_: recorder.running.pop() and None, always_call=True))
    try:
        with recorder:
            yield
    finally:
        for handle in handles:
            handle.remove()


def _enter(running: list[str], name: str) -> Callable[..., None]:
    return lambda *_: running.append(name)


def _tainted(value: Any) -> Any:
    return each_tensor(value, lambda t: t.detach().requires_grad_() if t.is_floating_point() else t)


class Watcher(PatchOpMode):
    """Knows which module is running; `watched` tells it."""

    def __init__(self) -> None:
        super().__init__()
        self.running = list[str]()


class Recorder(Watcher):
    """Notes what the layers called `names` read; where None, what is tainted: what requires a gradient.

    The output of a weighted operation is tainted or not, whatever its input was; a fixed filter, in a buffer, is no weight.
    """

    def __init__(self, copied: nn.Module, names: Container[str] | None = None, taint: bool = False) -> None:
        super().__init__()
        self.names, self.taint = names, taint
        self.readings = list[Reading]()
        self.fixed = {id(buffer) for buffer in copied.buffers()}

    def run_op(self, op: Callable[..., Any], input: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs `op`."""
        out = op(input, weight, *args, **kwargs)
        if not self.running or id(weight) in self.fixed:
            return out
        if input.requires_grad if self.names is None else self.running[-1] in self.names:
            window = PATCH_OPS[op](input, weight, *args, **kwargs)
            self.readings.append(Reading(self.running[-1], tuple(input.shape), window))
        return out.detach().requires_grad_(self.taint)


class WeightUses(Watcher):
    """Notes which modules run an operation with the weight of another module's layer."""

    def __init__(self, copied: nn.Module) -> None:
        super().__init__()
        self.owners = {id(m.weight): name for name, m in copied.named_modules() if is_supported(m)}
        self.callers: dict[str, dict[str, None]] = {}  # and whose weights they read

    def run_op(self, op: Callable[..., Any], input: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs `op`."""
        owner = self.owners.get(id(weight))
        if owner is not None and self.running and owner != self.running[-1]:
            self.callers.setdefault(self.running[-1], {})[owner] = None
        return op(input, weight, *args, **kwargs)


def functional_callers(copied: nn.Module, batch: Any) -> dict[str, list[str]]:
    """Returns the names of modules that read the weight of another module's layer, and of these layers.

    Raises:
        Exception: the forward's own, if it does not take `batch`.
    """
    uses = WeightUses(copied)
    with warnings.catch_warnings(), torch.no_grad(), watched(copied, uses):
        warnings.simplefilter("ignore")
        call(copied, batch)
    return {caller: list(owners) for caller, owners in uses.callers.items()}
