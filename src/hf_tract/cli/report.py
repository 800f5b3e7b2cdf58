"""What TrAct would take of a model, and what that would cost, without training or loading it."""

from __future__ import annotations

import dataclasses
import warnings

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_tract.cli.cost import Cost, moment_cost, patches, solve_cost
from hf_tract.core.patches import PatchSpec, out_features, patch_size
from hf_tract.core.weights import is_frozen
from hf_tract.discovery.first_layer import FirstLayer, LayerSelection, find_first_layers
from hf_tract.discovery.inputs import guess_inputs
from hf_tract.discovery.probe import LayerInput, Recorder, meta_copy, recording, run_forward
from hf_tract.discovery.wrappers import unwrap, without_wrappers

ENOUGH = (
    3  # guesses of a batch that reach the layers, after which a forward that fails would fail with the next one too
)


@dataclasses.dataclass(frozen=True)
class LayerInspection:
    """One layer: its weight is m x n, its C n x n for each of its groups.

    Args:
        name: in the model without wrappers.
        source: how it was found.
        operation: such as "Linear", "Conv2d 7x7, stride 2x2" or "Conv2d 16x16, patches"; the class where no forward succeeded.
        rows: m.
        columns: n.
        groups: of a convolution.
        frozen: whether its weight can't be trained as it is.
        patches: b that one image or clip brings; None where no forward succeeded, as the next three.
        shape: of the input of its operation, for one image or clip.
        spec: how it cuts patches out of it.
        moment: cost of C for one image.
        solve: cost of the factorisation and solve, once an optimizer step.
    """

    name: str
    source: str
    operation: str
    rows: int
    columns: int
    groups: int
    frozen: bool
    patches: int | None
    shape: tuple[int, ...] | None
    spec: PatchSpec | None
    moment: Cost | None
    solve: Cost


@dataclasses.dataclass(frozen=True)
class Inspection:
    """The layers, and the operations of a forward for one image (None where no forward could be counted)."""

    layers: tuple[LayerInspection, ...]
    forward: int | None

    def operations(self, batch_size: int) -> int | None:
        """What TrAct adds to an optimizer step of `batch_size` images."""
        total = 0
        for layer in self.layers:
            if layer.moment is None:
                return None
            total += layer.moment.operations * batch_size + layer.solve.operations
        return total

    def share(self, batch_size: int) -> float | None:
        """TrAct's operations over those of an ordinary training step, whose backward is counted as two forwards."""
        added = self.operations(batch_size)
        return None if added is None or not self.forward else added / (3 * self.forward * batch_size)


def inspect_model(model: nn.Module, layers: LayerSelection = "auto") -> Inspection:
    """What `apply_tract` would take of `model`, and its cost; the model may be on the meta device and stays as it is.

    Args:
        model: any model.
        layers: as for `apply_tract`.

    Returns:
        The layers, their sizes and operations.

    Raises:
        TrActError: as `find_first_layers` does.
    """
    found = find_first_layers(model, layers)
    readings, forward = _read(unwrap(model), [layer.name for layer in found])
    return Inspection(tuple(_inspected(layer, readings.get(layer.name, [])) for layer in found), forward)


def _read(model: nn.Module, names: list[str]) -> tuple[dict[str, list[LayerInput]], int | None]:
    """What the layers read of one image, and a forward's operations, in the first forward on the meta device that succeeds."""
    best: list[LayerInput] = []
    try:
        copied = meta_copy(model).requires_grad_(False)
    except Exception:  # as for the search: a model that can't be copied is no error
        return {}, None
    wrapped = [name for name, _ in copied.named_modules() if without_wrappers(name) in names]
    forward, tries = None, 0
    for batch in guess_inputs(copied):
        counter = FlopCounterMode(display=False)
        recorder = Recorder(wrapped)
        with warnings.catch_warnings(), recording(copied, recorder.running), recorder:
            warnings.simplefilter("ignore")
            try:
                with torch.no_grad(), counter:
                    run_forward(copied, batch)
                forward = int(counter.get_total_flops())
            except Exception:  # a guess that doesn't fit, or a forward that wants values after its stem
                pass
        best = recorder.readings if forward or len(recorder.readings) > len(best) else best
        tries += bool(recorder.readings)
        if forward or tries == ENOUGH:
            break
    return {name: [r for r in best if without_wrappers(r.name) == name] for name in names}, forward


def _inspected(layer: FirstLayer, readings: list[LayerInput]) -> LayerInspection:
    m, n, groups = out_features(layer.module), patch_size(layer.module), getattr(layer.module, "groups", 1)
    costs = [moment_cost(reading.shape, reading.spec) for reading in readings]
    return LayerInspection(
        name=layer.name,
        source=layer.source,
        operation=_operation(layer.module, readings),
        rows=m,
        columns=n,
        groups=groups,
        frozen=is_frozen(layer.module),
        patches=sum(patches(r.shape, r.spec) for r in readings) if readings else None,
        shape=readings[0].shape if readings else None,
        spec=readings[0].spec if readings else None,
        moment=Cost(*map(sum, zip(*costs, strict=True))) if costs else None,
        solve=solve_cost(m, n, groups),
    )


def _operation(layer: nn.Module, readings: list[LayerInput]) -> str:
    spec = readings[0].spec if readings else None
    if spec is None or not spec.kernel:
        return type(layer).__name__
    kernel, stride = ("x".join(map(str, sizes)) for sizes in (spec.kernel, spec.stride))
    steps = "patches" if spec.stride == spec.kernel else f"stride {stride}"
    return f"{type(layer).__name__} {kernel}, {steps}" + (f", {spec.groups} groups" if spec.groups > 1 else "")
