"""Unwraps models, and removes what wrappers add to the names of modules."""

from __future__ import annotations

from torch import nn

from hf_tract.core.patches import is_supported

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside of DDP, FSDP1, DataParallel, `torch.compile` and similar wrappers."""
    children = dict(model.named_children())
    while len(children) == 1 and next(iter(children)) in WRAPPERS:
        (model,) = children.values()
        children = dict(model.named_children())
    return model


def without_wrappers(name: str) -> str:
    """Return the name of a module without what wrappers added to it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Return all modules by their names without wrappers."""
    return {without_wrappers(name): module for name, module in model.named_modules()}


def layers_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that TrAct could act on, by their names without wrappers."""
    return {name: module for name, module in modules_by_name(model).items() if is_supported(module)}
