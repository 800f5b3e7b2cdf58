"""Classes that are put on a module and taken off again, without a trace in what is made of the module meanwhile.

Pickles, shallow copies and scripts hold the ordinary module, which needs no hf-tract. What such a class knows of its module
stands in attributes of the module's `__dict__` that are not state.
"""

from __future__ import annotations

import copy
import copyreg
from types import MethodType
from typing import Any

from torch import nn

PRECONDITIONER = "_tract_step"
CALLED_LAYERS = "_tract_layers"


class TrActClass:
    """What every class of ours adds to the one that it was made for, besides acting."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Makes an ordinary module: libraries build layers like another by `type(layer)(...)`."""
        super().__init__(*args, **kwargs)
        self.__class__ = original_class(type(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles the ordinary module, which loads where this library is not installed."""
        function, arguments, *rest = ordinary(self).__reduce_ex__(protocol)
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]
            # pickle holds this one against the object's own class; the other says the same
            function, arguments = copyreg._reconstructor, (arguments[0], object, None)  # type: ignore[attr-defined]
        return (function, arguments, *rest)

    def __prepare_scriptable__(self) -> Any:
        """Gives `torch.jit.script` the ordinary module."""
        return ordinary(self)

    def deepcopy_ordinary(self, memo: dict[int, Any]) -> Any:
        """Returns a deep copy of the ordinary module, registered as this one's."""
        original: Any = original_class(type(self))
        copied = original.__new__(original)
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(_state(self), memo))
        return copied


def original_class(cls: type) -> type:
    """Returns `cls` without ours, which may lie under a class that FSDP2 put on top."""
    if TrActClass not in cls.__mro__:
        return cls
    if any(TrActClass in base.__bases__ for base in cls.__bases__):
        return cls.__bases__[1]
    members = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls.__name__.replace("TrAct", "", 1), tuple(map(original_class, cls.__bases__)), members)


def ordinary(module: Any) -> Any:
    """Returns an ordinary module that shares everything with `module`."""
    original: Any = original_class(type(module))
    same = original.__new__(original)
    same.__dict__.update(_state(module))
    return same


def swap_class(module: nn.Module, cls: Any) -> None:
    """Gives `module` a class, and the forward of that class to accelerate's hooks that captured the one of before."""
    captured = [name for name in ("forward", "_old_forward") if is_own_forward(module, vars(module).get(name))]
    module.__class__ = cls
    for name in captured:
        module.__dict__[name] = MethodType(cls.forward, module)


def is_own_forward(module: nn.Module, forward: Any) -> bool:
    """Says whether `forward` is that of a class of `module`, bound to it."""
    if not isinstance(forward, MethodType) or forward.__self__ is not module:
        return False
    return any(vars(cls).get("forward") is forward.__func__ for cls in type(module).__mro__)


def _state(module: Any) -> dict[str, Any]:
    return {name: value for name, value in module.__dict__.items() if name not in (PRECONDITIONER, CALLED_LAYERS)}
