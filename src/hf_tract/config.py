"""Holds TrAct's settings and its one type of error."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

Scope = Literal["global", "local"]


class TrActError(ValueError):
    """Is raised for a setting or a model that TrAct cannot work with. The model is left as it was."""


@dataclasses.dataclass(frozen=True)
class TrActConfig:
    """Holds TrAct's settings, in the form that is saved with a checkpoint.

    Args:
        lam: the damping of inv(C + lam I), in the units of C's eigenvalues: squared pixels, after normalisation. 0.1
            suits standardised pixels; see https://hf-tract.github.io/hf-tract/usage/ for others.
        layers: "auto" for the first layer, or names or glob patterns of layers.
        scope: "global" for one C per optimizer step, over accumulated micro-steps and data-parallel ranks; "local" for
            one per forward call of each process, as in the paper's code.

    Raises:
        TrActError: for any other value.

    Examples:
        >>> TrActConfig(lam=0.2).to_dict()
        {'lam': 0.2, 'layers': 'auto', 'scope': 'global'}
    """

    lam: float = 0.1
    layers: str | tuple[str, ...] = "auto"
    scope: Scope = "global"

    def __post_init__(self) -> None:
        """Check each value."""
        is_number = isinstance(self.lam, numbers.Real) and not isinstance(self.lam, bool)
        if not is_number or not 0 < self.lam < math.inf:
            raise TrActError(f"`lam` (={self.lam!r}) must be a positive finite number, such as the paper's 0.1.")
        if self.scope not in get_args(Scope):
            raise TrActError(f"`scope` (={self.scope!r}) must be 'global' or 'local'.")
        layers: Any = self.layers
        if isinstance(layers, Iterable) and not isinstance(layers, str):
            layers = tuple(layers)
        is_named = isinstance(layers, (str, tuple)) and len(layers) > 0
        if not is_named or not all(isinstance(name, str) for name in layers):  # "" in a tuple names the model itself
            raise TrActError(
                f"`layers` (={self.layers!r}) must be 'auto', a layer's name or pattern, or several of these."
            )
        object.__setattr__(self, "lam", float(self.lam))
        object.__setattr__(self, "layers", layers)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        values = dataclasses.asdict(self)
        if not isinstance(self.layers, str):
            values["layers"] = list(self.layers)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrActConfig:
        """Build the settings from a dictionary such as `to_dict` returns; a missing entry takes its default.

        Raises:
            TrActError: for an entry that is not a setting.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise TrActError(f"`values` has {unknown}, which are no settings of TrAct; it has {known}.")
        return cls(**values)

    def to_json_file(self, path: str | Path) -> None:
        """Write the settings to `path`."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_json_file(cls, path: str | Path) -> TrActConfig:
        """Read the settings that `to_json_file` wrote to `path`."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
