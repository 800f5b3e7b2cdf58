"""Unwraps models, and removes what wrappers add to the names of modules."""

from __future__ import annotations

from torch import nn

from hf_tract.core.patches import is_supported

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Packages with wrappers that hand their inputs on as they are.
LIBRARIES = {"torch", "accelerate", "apex", "deepspeed", "fairscale", "lightning", "megatron", "pytorch_lightning"}


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside of DDP, FSDP1, DataParallel, `torch.compile` and similar wrappers."""
    while _is_wrapper(model):
        (model,) = model.children()
    return model


def _is_wrapper(model: nn.Module) -> bool:
    """Return whether a library's class holds a model; a user's own may change the pixels before it hands them on."""
    names = [name for name, _ in model.named_children()]
    if len(names) != 1 or names[0] not in WRAPPERS:
        return False
    classes = [cls for cls in type(model).__mro__ if cls not in (nn.Module, object)]
    return any(cls.__module__.partition(".")[0] in LIBRARIES for cls in classes)


def without_wrappers(name: str) -> str:
    """Return the name of a module without what wrappers added to it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Return all modules by their names without wrappers."""
    return {without_wrappers(name): module for name, module in model.named_modules()}


def layers_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that TrAct could act on, by their names without wrappers."""
    return {name: module for name, module in modules_by_name(model).items() if is_supported(module)}
