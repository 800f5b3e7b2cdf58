"""`hf-tract inspect MODEL`: what TrAct would take of a model, what it would cost, and what speaks against it."""

from __future__ import annotations

import dataclasses
import json
from importlib.metadata import version
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_tract.cli.loading import Loaded, Normalization, load
from hf_tract.cli.report import Inspection, LayerInspection, inspect_model
from hf_tract.cli.scale import expected_mean, normalised, spectrum
from hf_tract.config import TrActConfig, TrActError
from hf_tract.core.notices import advice_on_lam
from hf_tract.whitening.spectrum import Spectrum

app = typer.Typer(add_completion=False, no_args_is_help=True, help="TrAct: the first layer learns like an embedding.")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"hf-tract {version('hf-tract')}, torch {version('torch')}, transformers {version('transformers')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print versions and leave.")
    ] = False,
) -> None:
    """TrAct: the first layer learns like an embedding."""


@app.command(context_settings={"token_normalize_func": lambda option: option.replace("_", "-")})
def inspect(
    model: Annotated[str, typer.Argument(help="A folder, a timm model, a model_type of transformers or a Hub id.")],
    layers: Annotated[
        list[str] | None, typer.Option(help="Names or patterns of the layers; found where left out.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of an optimizer step, on one process.")] = 64,
    lam: Annotated[float, typer.Option(help="Damping.")] = 0.1,
    dataset: Annotated[
        str | None,
        typer.Option(help="A folder of images, .npy arrays or parquet, or a Hub id: to measure C's eigenvalues on."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Images to draw from all over it.")] = 64,
    split: Annotated[str, typer.Option(help="Split of it.")] = "train",
    trust_remote_code: Annotated[bool, typer.Option(help="Run a model's own code from the Hub.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Show the layers that TrAct would take of MODEL and why, its cost, and warnings. No weights are loaded."""
    try:
        TrActConfig(lam=lam)
        loaded = load(model, trust_remote_code=trust_remote_code)
        inspection = inspect_model(loaded.model, layers or "auto")
        measured = _measure(loaded, inspection, dataset, split, samples, lam) if dataset else None
    except TrActError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(Text.assemble(("Error: ", "red"), str(error)))
        raise typer.Exit(2) from None
    warnings = advice(inspection, loaded.pixels, measured, lam)
    if as_json:
        print(json.dumps(_as_json(inspection, batch_size, loaded, measured, warnings), indent=2))
    else:
        _show(model, loaded, inspection, batch_size, lam, measured, warnings)


def advice(inspection: Inspection, pixels: Normalization | None, measured: Spectrum | None, lam: float) -> list[str]:
    """What a user should know before training."""
    found = [FROZEN.format(layer.name) for layer in inspection.layers if layer.frozen]
    if pixels is None and measured is None:
        found.append("Nothing says how this model's pixels are normalised; lam assumes a mean square of about 1.")
    mean = measured.mean if measured else expected_mean(pixels) if pixels else 1.0
    if unfit := advice_on_lam(mean, lam):
        found.append(unfit[0].upper() + unfit[1:])
    if measured and measured.condition > 1e6:
        found.append(
            f"C + lam I has a condition number of {measured.condition:.1e}: normalise the pixels or raise lam."
        )
    if (largest := max(layer.columns for layer in inspection.layers)) > 2048:
        found.append(f"n is {largest}: the factorisation of C is felt at every step.")
    return found


def _measure(loaded: Loaded, inspection: Inspection, dataset: str, split: str, samples: int, lam: float) -> Spectrum:
    """C's eigenvalues on a few images of a data set, as the first layer would read them."""
    from hf_tract.cli.images import read_images

    first = inspection.layers[0]
    if first.shape is None or len(first.shape) != 4 or first.spec is None or len(first.spec.kernel) != 2:
        raise TrActError("`dataset` needs a model whose first layer is a convolution over images.")
    _, channels, height, width = first.shape
    images = read_images(dataset, split, samples, (height, width), channels)
    return spectrum(normalised(images, loaded.pixels or Normalization((0.0,), (1.0,))), first.spec, lam)


def _show(
    name: str,
    loaded: Loaded,
    inspection: Inspection,
    batch_size: int,
    lam: float,
    measured: Spectrum | None,
    warnings: list[str],
) -> None:
    console = Console(highlight=False, markup=False)
    console.print(f"{name} ({loaded.kind})", style="bold")
    for layer in inspection.layers:
        console.print()
        console.print(_described(layer))
    console.print()
    operations, share = inspection.operations(batch_size), inspection.share(batch_size)
    moved = sum(layer.moment.bytes * batch_size + layer.solve.bytes for layer in inspection.layers if layer.moment)
    if operations is not None:
        console.print(
            f"A step of {batch_size} images: {_units(operations)}FLOP and {_units(moved)}B beside the ordinary ones."
        )
    if share is not None:
        console.print(f"That is {100 * share:.2g} % of its operations.")
    if loaded.pixels is not None:
        console.print(f"Pixels: mean {_numbers(loaded.pixels.mean)}, std {_numbers(loaded.pixels.std)}.")
    if measured is not None:
        console.print(
            f"C on these images: mean eigenvalue {measured.mean:.3g}, largest {measured.largest:.3g}, {measured.above} of "
            f"{measured.n} above lam {lam:g}; condition of C + lam I {measured.condition:.1e}."
        )
    elif loaded.pixels is not None:
        console.print(
            f"Mean eigenvalue of C for natural images: about {expected_mean(loaded.pixels):.2g}; lam is {lam:g}."
        )
    for warning in warnings:
        console.print(Text.assemble(("Warning: ", "yellow"), warning))


def _described(layer: LayerInspection) -> Table:
    """A layer's lines: what is long stands in one piece, whatever the width."""
    groups = f", {layer.groups} groups" if layer.groups > 1 else ""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("layer", layer.name)
    table.add_row("found as", layer.source)
    table.add_row("operation", layer.operation)
    table.add_row("m x n", f"{layer.rows} x {layer.columns}{groups}")
    table.add_row("patches", "unknown" if layer.patches is None else f"{layer.patches} of an image")
    return table


def _as_json(
    inspection: Inspection, batch_size: int, loaded: Loaded, measured: Spectrum | None, warnings: list[str]
) -> dict[str, Any]:
    return {
        "layers": [_plain(layer) for layer in inspection.layers],
        "forward_operations": inspection.forward,
        "batch_size": batch_size,
        "operations": inspection.operations(batch_size),
        "share": inspection.share(batch_size),
        "pixels": loaded.pixels._asdict() if loaded.pixels else None,
        "spectrum": measured._asdict() if measured else None,
        "warnings": warnings,
    }


def _plain(layer: LayerInspection) -> dict[str, Any]:
    """The named tuples inside as objects with names."""
    values = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)}
    return {name: value._asdict() if hasattr(value, "_asdict") else value for name, value in values.items()}


def _units(number: float) -> str:
    """With a metric prefix, three digits."""
    for prefix in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:.3g} P"


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


FROZEN = "{} is frozen: TrAct does nothing until its weight requires a gradient."
