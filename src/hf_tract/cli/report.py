"""Works out which layers TrAct would act on, and at what cost, without training the model or loading its weights."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_tract.cli.cost import Cost, moment_cost, patch_count, solve_cost
from hf_tract.cli.loading import LoadedModel
from hf_tract.cli.scale import UNCHANGED, spectrum_of_images
from hf_tract.config import TrActError
from hf_tract.core.notices import advice_on_lam
from hf_tract.core.patches import PatchSpec, groups_of, out_features, patch_size
from hf_tract.core.weights import is_frozen
from hf_tract.discovery.first_layer import FirstLayer, LayerSelection, find_first_layers
from hf_tract.discovery.tracing import LayerInput
from hf_tract.discovery.trials import trial_runs
from hf_tract.discovery.wrappers import unwrap, without_wrappers
from hf_tract.whitening.spectrum import Spectrum

InputsByLayer = dict[str, list[LayerInput]]
# If the forward fails on this many guessed batches after they reach the layers, the next one would fail too.
MAX_FAILURES = 3
MAX_COLUMNS = 2048  # n up to which factorising C costs next to nothing


class LayerInspection(NamedTuple):
    """Describes a layer that TrAct would act on; the last four entries are None if no forward call reaches it.

    Args:
        name: its name in the model without wrappers.
        source: how it was found.
        operation: such as "Linear", "Conv2d 7x7, stride 2x2" or "Conv2d 16x16, patches".
        rows: m of its m x n weight.
        columns: n; C is n x n for each group.
        groups: the groups of a convolution; 1 for a linear layer.
        frozen: whether its weight can't be trained as it is.
        solve: the cost of the factorisation and solve, once per optimizer step.
        patches: b for one image or clip.
        shape: the shape of the input of its operation, for one image or clip.
        spec: how the operation cuts patches out of that input.
        moment: the cost of C for one image or clip.
    """

    name: str
    source: str
    operation: str
    rows: int
    columns: int
    groups: int
    frozen: bool
    solve: Cost
    patches: int | None = None
    shape: tuple[int, ...] | None = None
    spec: PatchSpec | None = None
    moment: Cost | None = None


class Inspection(NamedTuple):
    """Holds the layers, and the number of operations of a forward call on one image (None if it is unknown)."""

    layers: tuple[LayerInspection, ...]
    forward_operations: int | None

    def cost(self, batch_size: int) -> Cost | None:
        """Return the cost that TrAct adds to an optimizer step of `batch_size` images; None if it is unknown."""
        total = Cost(0, 0)
        for layer in self.layers:
            if layer.moment is None:
                return None
            total = total.plus(layer.moment, times=batch_size).plus(layer.solve)
        return total

    def share(self, batch_size: int) -> float | None:
        """Return TrAct's operations as a share of those of an ordinary training step; None if it is unknown."""
        cost = self.cost(batch_size)
        if cost is None or self.forward_operations is None:
            return None
        # A backward is counted as two forwards.
        return cost.operations / (3 * self.forward_operations * batch_size)


class Report(NamedTuple):
    """Holds all that is printed about a model; `spectrum` is that of C on a data set, if one was given."""

    name: str
    loaded: LoadedModel
    inspection: Inspection
    batch_size: int
    lam: float
    spectrum: Spectrum | None


def inspect_model(model: nn.Module, layers: LayerSelection = "auto") -> Inspection:
    """Find the layers of `model` that `apply_tract` would act on, and the cost.

    Args:
        model: any model; it may be on the meta device, and stays as it is.
        layers: as in `TrActConfig`.

    Raises:
        TrActError: as `find_first_layers` does.
    """
    found = find_first_layers(model, layers)
    names = [layer.name for layer in found]
    inputs, operations = _read_inputs(unwrap(model), names)
    inspected = [_inspect_layer(layer, inputs.get(layer.name, [])) for layer in found]
    return Inspection(tuple(inspected), operations)


def _read_inputs(model: nn.Module, names: list[str]) -> tuple[InputsByLayer, int | None]:
    """Return what the named layers read from one image, and the operations of the first forward that completes."""
    best: InputsByLayer = {}
    counted = failures = 0
    with FlopCounterMode(display=False) as counter:
        for _, probe in trial_runs(model, with_values=False):
            operations = counter.get_total_flops() - counted
            counted += operations
            inputs = _by_layer(probe.inputs, names)
            if probe.error is None and operations > 0:
                return inputs, operations
            if len(inputs) > len(best):
                best = inputs
            failures += bool(inputs)
            if failures == MAX_FAILURES:
                break
    return best, None


def _by_layer(inputs: list[LayerInput], names: list[str]) -> InputsByLayer:
    found: InputsByLayer = {}
    for layer_input in inputs:
        name = without_wrappers(layer_input.layer)
        if name in names:
            found.setdefault(name, []).append(layer_input)
    return found


def _inspect_layer(layer: FirstLayer, inputs: list[LayerInput]) -> LayerInspection:
    m = out_features(layer.module)
    n = patch_size(layer.module)
    groups = groups_of(layer.module)
    inspection = LayerInspection(
        name=layer.name,
        source=layer.source,
        operation=type(layer.module).__name__,
        rows=m,
        columns=n,
        groups=groups,
        frozen=is_frozen(layer.module),
        solve=solve_cost(m, n, groups),
    )
    if not inputs:
        return inspection
    patches = 0
    moment = Cost(0, 0)
    for each in inputs:  # a forward may call the layer several times
        patches += patch_count(each.shape, each.spec)
        moment = moment.plus(moment_cost(each.shape, each.spec))
    first = inputs[0]
    return inspection._replace(
        operation=inspection.operation + _settings(first.spec),
        patches=patches,
        shape=first.shape,
        spec=first.spec,
        moment=moment,
    )


def _settings(spec: PatchSpec) -> str:
    """Return kernel, stride and groups of a convolution as text; "" for a linear layer."""
    if not spec.kernel:
        return ""
    settings = " " + "x".join(map(str, spec.kernel))
    if spec.stride == spec.kernel:
        settings += ", patches"
    else:
        settings += ", stride " + "x".join(map(str, spec.stride))
    if spec.groups > 1:
        settings += f", {spec.groups} groups"
    return settings


def measure_spectrum(
    dataset: str,
    split: str,
    samples: int,
    loaded: LoadedModel,
    layer: LayerInspection,
    lam: float,
) -> Spectrum:
    """Return the spectrum of C on a few images of a data set, as `layer` would read them.

    Raises:
        TrActError: as `read_images` does, and for a layer that is no convolution over images.
    """
    from hf_tract.cli.images import read_images

    spec = layer.spec
    shape = layer.shape
    if spec is None or shape is None or len(spec.kernel) != 2 or len(shape) != 4:
        raise TrActError("`dataset` needs a model whose first layer is a convolution over images.")
    images = read_images(dataset, split, samples, shape[1:])
    normalization = loaded.normalization or UNCHANGED
    return spectrum_of_images(normalization.apply(images), spec, lam)


def warnings_for(report: Report) -> list[str]:
    """Return the warnings that a user should see before training."""
    warnings = []
    for layer in report.inspection.layers:
        if layer.frozen:
            warnings.append(f"{layer.name} is frozen: TrAct does nothing until its weight requires a gradient.")
    warnings += _warnings_about_pixels(report)
    n = max(layer.columns for layer in report.inspection.layers)
    if n > MAX_COLUMNS:
        warnings.append(f"n is {n}: the factorisation of C takes noticeable time at every step.")
    return warnings


def _warnings_about_pixels(report: Report) -> list[str]:
    """Return what a user should know about the scale of the pixels, which lam is compared with."""
    warnings = []
    normalization = report.loaded.normalization
    spectrum = report.spectrum
    mean = 1.0
    if spectrum is not None:
        mean = spectrum.mean
    elif normalization is not None:
        mean = normalization.expected_mean_eigenvalue()
    if normalization is None:
        assumed = "lam assumes a mean square of about 1"
        if spectrum is not None:
            assumed = "the images were measured with values from 0 to 1"
        warnings.append(f"Nothing says how this model's pixels are normalised; {assumed}.")
    advice = advice_on_lam(mean, report.lam)
    if advice:
        warnings.append(advice[0].upper() + advice[1:])
    return warnings
