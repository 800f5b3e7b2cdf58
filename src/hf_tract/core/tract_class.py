"""Puts a class on a module and takes it off again, and keeps it out of pickles, copies and scripts of the module.

Pickles, shallow copies and scripts contain the ordinary module, which loads where hf-tract is not installed. What a
TrAct class needs to know about its module is stored in the module's `__dict__`, and is no part of the state dict.
"""

from __future__ import annotations

import copy
import copyreg
import multiprocessing.context
from types import MethodType
from typing import Any

from torch import nn

from hf_tract.core.notices import warn_once
from hf_tract.core.patches import has_torchs_conv_forward

_warned: set[str] = set()
PRECONDITIONER = "_tract_preconditioner"
READ_LAYERS = "_tract_layers"
# Of a class that TrAct has made, not of a subclass.
ORIGINAL = "_tract_original"


class TrActClass:
    """Is the first base of every class that TrAct puts on a module; the second base is the module's original class."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Leave out what the original class does with subclasses: some register them, with arguments of their own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Make an ordinary module: libraries that call `type(layer)(...)` to build a similar layer expect one."""
        super().__init__(*args, **kwargs)
        self.__class__ = original_class(type(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the module as one of its original class, without TrAct."""
        if multiprocessing.context.get_spawning_popen() is not None:
            warn_once(
                _warned,
                "TrAct: a model that is handed to another process is the ordinary one there. Call `apply_tract` in "
                "that process.",
            )
        function, arguments, *rest = _ordinary(self).__reduce_ex__(protocol)
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]
            # pickle refuses to make an object of another class by `__newobj__`; `_reconstructor` does the same.
            function = copyreg._reconstructor  # type: ignore[attr-defined]
            arguments = (arguments[0], object, None)
        return (function, arguments, *rest)

    def __prepare_scriptable__(self) -> Any:
        """Give `torch.jit.script` the ordinary module."""
        return _ordinary(self)

    def deepcopy_ordinary(self, memo: dict[int, Any]) -> Any:
        """Return a deep copy without TrAct, and record it in `memo` as the copy of this module."""
        ordinary = _ordinary(self)
        original: Any = type(ordinary)
        copied = original.__new__(original)
        memo[id(self)] = copied
        # The function of `layer.compile()` runs the original; torch leaves it out of copies too.
        ordinary.__dict__.pop("_compiled_call_impl", None)
        copied.__dict__.update(copy.deepcopy(vars(ordinary), memo))
        return copied


def original_class(cls: type) -> type:
    """Return `cls` without TrAct's class, even if another library, such as FSDP2, has subclassed that."""
    if TrActClass not in cls.__mro__:
        return cls
    if ORIGINAL in vars(cls):
        original: type = vars(cls)[ORIGINAL]
        return original
    # Another library has subclassed TrAct's class, so its subclass is rebuilt on top of the original.
    members = dict(vars(cls))
    members.pop("__dict__", None)
    members.pop("__weakref__", None)
    name = cls.__name__.replace("TrAct", "", 1)
    bases = tuple(map(original_class, cls.__bases__))
    return type(name, bases, members)


def swap_class(module: nn.Module, cls: Any) -> None:
    """Give `module` the class `cls`, and replace the old class's forward where accelerate's hooks have captured it."""
    captured = []
    for name in ("forward", "_old_forward"):
        if is_own_forward(module, vars(module).get(name)):
            captured.append(name)
    module.__class__ = cls
    for name in captured:
        module.__dict__[name] = MethodType(cls.forward, module)


def is_own_forward(module: nn.Module, forward: Any) -> bool:
    """Return whether `forward` is a method of `module` that one of its classes defines."""
    if not isinstance(forward, MethodType) or forward.__self__ is not module:
        return False
    return any(vars(cls).get("forward") is forward.__func__ for cls in type(module).__mro__)


def foreign_forward(layer: nn.Module) -> str:
    """Return the name of a forward that another library has set on the layer, if it bypasses TrAct; "" otherwise.

    It does not if it still calls a convolution's `_conv_forward`, nor under accelerate's hooks, in which `swap_class`
    replaces the captured forward.
    """
    forward = vars(layer).get("forward")
    if forward is None or is_own_forward(layer, forward):
        return ""
    if "_old_forward" in vars(layer):  # accelerate's hooks
        return ""
    if has_torchs_conv_forward(original_class(type(layer))):
        return ""
    return getattr(forward, "__qualname__", None) or repr(forward)


def _ordinary(module: Any) -> Any:
    """Return a module of the original class that shares all attributes with `module`."""
    original: Any = original_class(type(module))
    shared = original.__new__(original)
    shared.__dict__.update(vars(module))
    shared.__dict__.pop(PRECONDITIONER, None)
    shared.__dict__.pop(READ_LAYERS, None)
    return shared
