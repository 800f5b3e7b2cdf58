"""Prints, for `hf-tract inspect MODEL`, which layers TrAct would act on, at what cost, and warnings."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.filesize import pick_unit_and_suffix
from rich.table import Table
from rich.text import Text

from hf_tract.cli.loading import load
from hf_tract.cli.report import LayerInspection, Report, inspect_model, measure_spectrum, warnings_for
from hf_tract.config import TrActConfig, TrActError
from hf_tract.discovery.first_layer import NAMED

PACKAGES = ("hf-tract", "torch", "transformers")  # whose versions are printed
app = typer.Typer(add_completion=False, no_args_is_help=True)


def _print_version(requested: bool) -> None:
    if requested:
        versions = [f"{package} {version(package)}" for package in PACKAGES]
        print(", ".join(versions))
        raise typer.Exit


@app.callback()
def main(
    _: Annotated[bool, typer.Option("--version", callback=_print_version, help="Print versions and leave.")] = False,
) -> None:
    """Show which layers of a model TrAct would act on, and at what cost."""


# Options may be written with underscores too, as in the scripts of transformers.
@app.command(context_settings={"token_normalize_func": lambda option: option.replace("_", "-")})
def inspect(  # noqa: PLR0913 each is an option
    model: Annotated[str, typer.Argument(help="A folder, a timm model, a model_type of transformers or a Hub id.")],
    layers: Annotated[
        list[str] | None,
        typer.Option(help="Names or patterns of the layers; found where left out."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of an optimizer step, on one process.")] = 64,
    lam: Annotated[float, typer.Option(help="Damping.")] = 0.1,
    dataset: Annotated[
        str | None,
        typer.Option(help="A folder of images, .npy arrays or parquet, or a Hub id: to measure C's eigenvalues on."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Images to draw from the data set.")] = 64,
    split: Annotated[str, typer.Option(help="Their split.")] = "train",
    trust_remote_code: Annotated[bool, typer.Option(help="Run a model's own code from the Hub.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Show the layers of MODEL that TrAct would act on and why, the cost, and warnings. No weights are loaded."""
    try:
        TrActConfig(lam=lam)  # raises for a lam that is not positive
        loaded = load(model, trust_remote_code)
        inspection = inspect_model(loaded.model, layers or "auto")
        spectrum = None
        if dataset:
            first = inspection.layers[0]
            spectrum = measure_spectrum(dataset, split, samples, loaded, first, lam)
    except TrActError as error:
        message = Text.assemble(("Error: ", "red"), str(error))
        Console(stderr=True, highlight=False, soft_wrap=True).print(message)
        raise typer.Exit(2) from None
    report = Report(model, loaded, inspection, batch_size, lam, spectrum)
    if as_json:
        print(json.dumps(_as_json(report), indent=2))
    else:
        _print_report(report)


def _as_json(report: Report) -> dict[str, Any]:
    inspection = report.inspection
    cost = inspection.cost(report.batch_size)
    return {
        "layers": [_with_names(layer) for layer in inspection.layers],
        "forward_operations": inspection.forward_operations,
        "batch_size": report.batch_size,
        "operations": cost and cost.operations,
        "share": inspection.share(report.batch_size),
        "pixels": _with_names(report.loaded.normalization),
        "spectrum": _with_names(report.spectrum),
        "warnings": warnings_for(report),
    }


def _with_names(value: Any) -> Any:
    """Return a named tuple, and any inside it, as dictionaries, since JSON would turn them into lists."""
    if not hasattr(value, "_asdict"):
        return value
    return {name: _with_names(inner) for name, inner in value._asdict().items()}


def _print_report(report: Report) -> None:
    console = Console(highlight=False, markup=False)
    console.print(f"{report.name} ({report.loaded.source})", style="bold")
    for layer in report.inspection.layers:
        console.print()
        console.print(_layer_table(layer))
    console.print()
    _print_cost(console, report)
    _print_scale(console, report)
    for warning in warnings_for(report):
        console.print(Text.assemble(("Warning: ", "yellow"), warning))


def _layer_table(layer: LayerInspection) -> Table:
    """Return the table of a layer, in which a long name is not cut off at any width."""
    weight = f"{layer.rows} x {layer.columns}"
    if layer.groups > 1:
        weight += f", {layer.groups} groups"
    patches = "unknown"
    if layer.patches is not None and layer.shape is not None:
        # The size is the config's or guessed, so it is shown.
        shape = " x ".join(map(str, layer.shape[1:]))
        patches = f"{layer.patches} of an input of {shape}"
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("layer", layer.name)
    table.add_row("found as", layer.source)
    table.add_row("operation", layer.operation)
    table.add_row("m x n", weight)
    table.add_row("patches", patches)
    return table


def _print_cost(console: Console, report: Report) -> None:
    batch_size = report.batch_size
    cost = report.inspection.cost(batch_size)
    if cost is not None:
        operations = _with_prefix(cost.operations)
        moved = _with_prefix(cost.bytes)
        console.print(f"A step of {batch_size} such inputs: {operations}FLOP and {moved}B beside the ordinary ones.")
    share = report.inspection.share(batch_size)
    if share is not None:
        console.print(f"That is {100 * share:.2g} % of its operations.")


def _print_scale(console: Console, report: Report) -> None:
    lam = report.lam
    normalization = report.loaded.normalization
    spectrum = report.spectrum
    if normalization is not None:
        mean, std = map(_numbers, normalization)
        console.print(f"Pixels: mean {mean}, std {std}.")
    if spectrum is not None:
        console.print(
            f"C on these images: mean eigenvalue {spectrum.mean:.3g}, largest "
            f"{spectrum.largest:.3g}, {spectrum.above} of {spectrum.n} above "
            f"lam {lam:g}; condition of C + lam I {spectrum.condition:.1e}."
        )
    elif normalization is not None:
        expected = normalization.expected_mean_eigenvalue()
        condition = ""
        if any(layer.source == NAMED for layer in report.inspection.layers):
            condition = ", where the layer reads their pixels"
        console.print(f"Mean eigenvalue of C for natural images{condition}: about {expected:.2g}; lam is {lam:g}.")


def _with_prefix(number: int) -> str:
    """Return three digits with a metric prefix."""
    unit, prefix = pick_unit_and_suffix(number, ["", "k", "M", "G", "T", "P"], 1000)
    return f"{number / unit:.3g} {prefix}"


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)
