"""Makes TrAct one of accelerate's hooks, so that accelerate's own tools add and remove it."""

from __future__ import annotations

from typing import Any

from accelerate.hooks import ModelHook
from torch import nn

from hf_tract.apply import TrActHandle, apply_tract
from hf_tract.config import Scope
from hf_tract.discovery.first_layer import LayerSelection


class TrActHook(ModelHook):  # type: ignore[misc]  # accelerate is not typed
    """Applies TrAct when accelerate adds this hook to a model or to a layer, and removes it with the hook.

    Args:
        lam: as in `TrActConfig`.
        layers: layers of the module that the hook is added to, as in `apply_tract`.
        scope: as in `TrActConfig`.
        example_batch: as in `find_first_layers`.
        process_group: as in `apply_tract`.

    Examples:
        >>> from accelerate.hooks import add_hook_to_module, remove_hook_from_module
        >>> model = add_hook_to_module(nn.Linear(8, 2), TrActHook(lam=0.1))
        >>> model = remove_hook_from_module(model)
    """

    def __init__(
        self,
        lam: float = 0.1,
        layers: LayerSelection = "auto",
        scope: Scope = "global",
        *,
        example_batch: Any = None,
        process_group: Any = None,
    ) -> None:
        self.lam = lam
        self.layers = layers
        self.scope: Scope = scope
        self.options = {"example_batch": example_batch, "process_group": process_group}
        self.handle: TrActHandle | None = None

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Apply TrAct to `module`, and return it."""
        self.handle = apply_tract(module, self.lam, self.layers, self.scope, **self.options)
        return module

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Remove TrAct from `module`, and return it."""
        if self.handle is not None:
            self.handle.remove()
        self.handle = None
        return module
