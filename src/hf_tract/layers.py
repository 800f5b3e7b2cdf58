"""Which layer of a model do the pixels meet first: by the user's word, timm's, a probe, or the order of the modules."""

from __future__ import annotations

import copy
import difflib
import fnmatch
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_tract.config import TrActError
from hf_tract.tap import WINDOWS, can_tap

Layers = str | nn.Module | Sequence[str | nn.Module]

# What grows with the ecosystem is data: names that wrappers add, that configs use, that models give their vision part.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
TOWERS = ("vision_model", "vision_tower", "vision_encoder", "image_encoder", "visual")
CHANNELS = ("num_channels", "in_channels", "in_chans")
SIZES = ("image_size", "img_size", "input_size")
FRAMES = ("num_frames", "frames_per_clip")
COMMON_SIZES = (224, 32, 28, 96)


class FirstLayer(NamedTuple):
    """A layer that TrAct takes: its name in the unwrapped model, the layer, and how it was found."""

    name: str
    module: nn.Module
    source: str


def find_first_layers(model: nn.Module, layers: Layers = "auto", inputs: Any = None) -> list[FirstLayer]:
    """The layers that pixels meet first, in that order; nearly always one.

    Args:
        model: any model, wrapped or not (DDP, FSDP, `torch.compile`).
        layers: "auto" to find them; or what to take: names, glob patterns, the modules themselves, or several of these.
        inputs: for "auto" with a model that nothing is known about: a batch, as a tensor or as a mapping of keyword
            arguments. Only its shapes and dtypes are used.

    Returns:
        Name, module and source of each.

    Raises:
        TrActError: if nothing is found, or something that is no convolution or linear layer was asked for.

    Example:
        >>> find_first_layers(nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(), nn.Linear(32, 10)))[0].name
        '0'
    """
    model = unwrap(model)
    if not (isinstance(layers, str) and layers == "auto"):
        return _asked_for(model, [layers] if isinstance(layers, (str, nn.Module)) else list(layers))
    for find in (_by_timm, lambda m: _by_probe(m, inputs), _by_order):
        if found := find(model):
            return found
    looked_at = _some(type(module).__name__ for _, module in model.named_modules() if module is not model)
    raise TrActError(
        f"`model` (={type(model).__name__}) has no convolution or linear layer that TrAct could take; it has {looked_at}."
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside of DDP, FSDP1, DataParallel, `torch.compile` and what looks like them."""
    children = dict(model.named_children())
    while len(children) == 1 and next(iter(children)) in WRAPPERS:
        (model,) = children.values()
        children = dict(model.named_children())
    return model


def _plain(name: str) -> str:
    """`name` without what wrappers added to it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    return {_plain(name): module for name, module in model.named_modules() if can_tap(module)}


def _some(names: Iterable[str], most: int = 6) -> str:
    unique = list(dict.fromkeys(names))
    return (", ".join(unique[:most]) or "no module") + (", ..." if len(unique) > most else "")


def _asked_for(model: nn.Module, asked: Sequence[str | nn.Module]) -> list[FirstLayer]:
    candidates = _candidates(model)
    everything = {_plain(name): module for name, module in model.named_modules()}
    found: dict[str, FirstLayer] = {}
    for wish in asked:
        if isinstance(wish, nn.Module):
            names = [name for name, module in everything.items() if module is wish]
            if not names:
                raise TrActError(f"`layers` (={type(wish).__name__}) is no module of `model` (={type(model).__name__}).")
        else:
            pattern = _plain(wish)
            names = [pattern] if pattern in everything else fnmatch.filter(candidates, pattern)
            if not names:
                near = difflib.get_close_matches(pattern, candidates, n=3, cutoff=0.3) or list(candidates)
                raise TrActError(f"`layers` (={wish!r}) matches no convolution or linear layer; the nearest are {_some(near)}.")
        for name in names:
            if name not in candidates:
                inside = [other for other in candidates if other.startswith(f"{name}.")]
                hint = f"did you mean {_some(inside, 3)}?" if inside else "name one that is."
                raise TrActError(
                    f"`layers` (={name!r}) is {_described(everything[name])}, no convolution or linear layer with a weight "
                    f"that can be trained; {hint}"
                )
            found[name] = FirstLayer(name, candidates[name], "named by the user")
    return list(found.values())


def _described(module: nn.Module) -> str:
    weight = getattr(module, "weight", None)
    dtype = f" of {weight.dtype}" if isinstance(weight, Tensor) and not weight.is_floating_point() else ""
    return f"a {type(module).__name__}{dtype}"


def _by_timm(model: nn.Module) -> list[FirstLayer]:
    """What timm says of a model or of a part of it, when all of it resolves."""
    candidates = _candidates(model)
    for prefix, module in model.named_modules():
        cfg = getattr(module, "pretrained_cfg", None)
        first = cfg.get("first_conv") if isinstance(cfg, Mapping) else None
        names = [first] if isinstance(first, str) else list(first or ())
        names = [_plain(f"{prefix}.{name}" if prefix else name) for name in names]
        if names and all(name in candidates for name in names):
            return [FirstLayer(name, candidates[name], "timm's first_conv") for name in names]
    return []


def _by_order(model: nn.Module) -> list[FirstLayer]:
    """The first convolution of the vision part, else its first linear layer, in the order of the modules."""
    prefix = next((name for name, _ in model.named_modules() if name.split(".")[-1] in TOWERS), "")
    candidates = {name: m for name, m in _candidates(model).items() if name.startswith(_plain(prefix))}
    ordered = sorted(candidates.items(), key=lambda item: isinstance(item[1], nn.Linear))  # stable
    return [FirstLayer(*item, "first in module order") for item in ordered[:1]]


def _by_probe(model: nn.Module, inputs: Any = None) -> list[FirstLayer]:
    """Every layer whose input still depends on the pixels alone, seen in one forward on the meta device."""
    try:
        twin = _meta_twin(model)
    except Exception:  # a model that cannot be copied, such as FSDP2's, is no error: the module order is left
        return []
    for batch in _batches(twin, inputs):
        if hits := _probe(twin, batch):
            modules = dict(model.named_modules())
            return [FirstLayer(_plain(name), modules[name], "reached first by the pixels") for name in hits]
    return []


def _meta_twin(model: nn.Module) -> nn.Module:
    """A copy of `model` on the meta device, made without copying its weights."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        meta = torch.empty_like(tensor, device="meta", requires_grad=False)
        memo[id(tensor)] = nn.Parameter(meta, requires_grad=False) if isinstance(tensor, nn.Parameter) else meta
    twin = copy.deepcopy(model, memo).eval()
    for module in twin.modules():
        module.__dict__.pop("forward", None)  # accelerate's wrappers would call the original
    return twin


def _batches(model: nn.Module, inputs: Any) -> Iterator[Any]:
    """The caller's batch, else what the model's config or its first layer lets one guess."""
    if inputs is not None:
        yield inputs
        return
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", config)
    name = getattr(model, "main_input_name", "pixel_values")
    first = next((m for m in _candidates(model).values() if not isinstance(m, nn.Linear)), None)
    dims = len(first.kernel_size) if isinstance(first, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else 2
    own = getattr(first, "in_channels", None)
    channels = [c for c in (_entry(config, CHANNELS), own, 3, 1) if isinstance(c, int)]
    given, frames = _entry(config, SIZES), _entry(config, FRAMES)
    sizes: list[Any] = [given] if given else list(COMMON_SIZES)
    for count in dict.fromkeys(channels):
        for size in sizes:
            shape = (count, *(size if isinstance(size, (tuple, list)) else [size] * min(dims, 2)))
            shapes = [shape, (frames or 16, *shape), (count, frames or 16, *shape[1:])] if dims == 3 else [shape]
            for shape in shapes:
                pixels = torch.empty(1, *shape, device="meta")
                yield {name: pixels} if config is not None else pixels
    linear = next((m for m in _candidates(model).values() if isinstance(m, nn.Linear)), None)
    if linear is not None and config is None:
        yield torch.empty(1, linear.in_features, device="meta")


def _entry(config: Any, names: Sequence[str]) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _probe(twin: nn.Module, batch: Any) -> list[str]:
    """Names of the layers that the floating-point tensors of `batch` reach first."""
    running: list[str] = []
    recorder = _Recorder(running)
    handles = []
    for name, module in twin.named_modules():
        handles.append(module.register_forward_pre_hook(_enter(running, name)))
        handles.append(module.register_forward_hook(lambda *_: running.pop() and None, always_call=True))
    try:
        with warnings.catch_warnings(), torch.random.fork_rng([]), torch.enable_grad(), recorder:
            warnings.simplefilter("ignore")
            if isinstance(batch, Mapping):
                twin(**{name: _tainted(value) for name, value in batch.items()})
            else:
                twin(_tainted(batch))
    except Exception:  # many a model fails on the meta device after its stem, which has been seen by then
        pass
    finally:
        for handle in handles:
            handle.remove()
    modules = dict(twin.named_modules())
    return [name for name in dict.fromkeys(recorder.hits) if can_tap(modules[name])]


def _enter(running: list[str], name: str) -> Callable[..., None]:
    return lambda *_: running.append(name)


def _tainted(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    meta = torch.empty_like(value, device="meta", requires_grad=False)
    return meta.requires_grad_() if meta.is_floating_point() else meta


class _Recorder(TorchFunctionMode):
    """Notes the module of each weight operation on a tainted input, and takes the taint from its output."""

    def __init__(self, running: list[str]) -> None:
        super().__init__()
        self.running, self.hits = running, list[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in WINDOWS or not (args[0] if args else (kwargs or {})["input"]).requires_grad:
            return out
        self.hits.extend(self.running[-1:])
        return out.detach()
