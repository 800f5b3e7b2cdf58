"""A model and its names without what wrappers added to them."""

from __future__ import annotations

from torch import nn

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside of DDP, FSDP1, DataParallel, `torch.compile` and what looks like them."""
    children = dict(model.named_children())
    while len(children) == 1 and next(iter(children)) in WRAPPERS:
        (model,) = children.values()
        children = dict(model.named_children())
    return model


def without_wrappers(name: str) -> str:
    """`name` without what wrappers added to it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
