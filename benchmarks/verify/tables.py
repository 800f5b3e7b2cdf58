"""Writes the tables of stored runs that stand between marks in the documents."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks import overhead_results, robustness_results, spectra_results
from benchmarks.common import markdown
from benchmarks.common.bootstrap import Estimate
from benchmarks.common.statistics import interval, p_text
from benchmarks.overhead_results import AGAIN, OURS, THEIRS, VANILLA, Result
from benchmarks.paper import conclusions, evidence_layers, evidence_time
from benchmarks.paper.choices import name_at
from benchmarks.paper.summary import corrected_by_name
from benchmarks.verify.stored import (
    CROPS_ADAMW,
    CROPS_SGD,
    PLANNED_START,
    RESULTS,
    START,
    STEP_SIZE,
    TRACT,
    Pair,
    Quickstart,
    arms,
    arms_of,
    costs,
    final,
    final_interval,
    flower_rates,
    longest,
    pair,
    robustness,
    times,
)


def step_table(file: str) -> str:
    """Return a table of whole training steps, and of what the first layer alone tells of them."""
    head = ["a whole training step", "batch", "vanilla", "vanilla again", "hf-tract", "by its layer", "torch_tract"]
    rows = []
    for key, result in costs(file).items():
        settings = result[VANILLA].settings
        if settings["scope"] != "step":
            continue
        told = overhead_results.by_layer(key, costs(file))
        rows.append(
            [
                _name(result),
                str(settings["batch"]),
                f"{1000 * np.median(result[VANILLA].seconds):.1f} ms",
                times(result, AGAIN),
                times(result),
                "" if told is None else f"x {told.text()}",
                times(result, THEIRS),
            ]
        )
    return _table(head, rows)


def layer_table(file: str) -> str:
    """Return a table of what is added to the first layer alone."""
    head = ["the first layer alone", "batch", "vanilla", "hf-tract adds", "torch_tract adds", "ratio of both"]
    head += ["hf-tract's peak memory", "torch_tract's"]
    rows = []
    for result in costs(file).values():
        settings = result[VANILLA].settings
        if settings["scope"] != "layer":
            continue
        both = overhead_results.added_over_theirs(result)
        rows.append(
            [
                _name(result),
                str(settings["batch"]),
                f"{1000 * np.median(result[VANILLA].seconds):.1f} ms",
                milliseconds(overhead_results.added(result, OURS)),
                milliseconds(overhead_results.added(result, THEIRS)) or "fails",
                "" if both is None else both.text(digits=2),
                _peak(result, OURS),
                _peak(result, THEIRS),
            ]
        )
    return _table(head, rows)


def arm_table(experiment: str, setting: str = "", reference: str = "") -> str:
    """Return a table of an experiment's arms: final accuracy, and the gain from the first arm and from another."""
    found = arms(experiment, setting)
    first = next(iter(found))
    bases = [first]
    if reference:
        bases.append(reference)
    rows = []
    for name, arm in found.items():
        gains = _gains_over(bases, experiment, name, setting)
        rows.append([name, str(len(arm.runs)), interval(arm.final).text(), *gains])
    return _table(["arm", "seeds", "top-1, %", *(f"from {base}, points" for base in bases)], rows)


def _gains_over(bases: list[str], experiment: str, arm: str, setting: str = "") -> list[str]:
    """Return what an arm gains over each base: nothing over itself, and nothing for the first of them."""
    return ["" if arm in (bases[0], base) else pair(experiment, arm, base, setting).gain for base in bases]


def milliseconds(estimate: Estimate | None) -> str:
    """Return seconds as milliseconds, with the interval."""
    return "" if estimate is None else f"{estimate.text(1000, 2)} ms"


def _name(result: Result) -> str:
    settings = result[VANILLA].settings
    form = "" if settings["form"] == "eager" else f", {settings['form']}"
    return f"{settings['model']}, {settings['precision']}{form}"


def _peak(result: Result, arm: str) -> str:
    added = overhead_results.bytes_added(result, arm)
    return "" if added is None else f"{added / 2**20:+z.1f} MiB"


def _table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table as the text between its marks."""
    return "\n".join([*markdown.table(head, rows), ""])


def spectra_table(part: str) -> str:
    """Return vanilla's error at each rate on the validation blocks, or every arm's on the test blocks."""
    runs = spectra_results.read(RESULTS / "spectra.jsonl", part)
    if part == "test":
        return _table(spectra_results.HEAD, spectra_results.rows(runs))
    rates = [f"{rate:g}" for rate in spectra_results.rates_of(runs)]
    return _table(["learning rate", *rates], spectra_results.rate_rows(runs))


def robustness_table() -> str:
    """Return E5's accuracy on clean and on corrupted images, and what is lost between them."""
    return _table(robustness_results.HEAD, robustness_results.rows(robustness()))


def corruptions_table() -> str:
    """Return E5's accuracy under each corruption."""
    return _table(robustness_results.CORRUPTION_HEAD, robustness_results.rows_by_corruption(robustness()))


def calibration_table() -> str:
    """Return E5's calibration errors."""
    return _table(robustness_results.ERROR_HEAD, robustness_results.error_rows(robustness()))


def flower_rates_table() -> str:
    """Return vanilla's loss at each rate, by which that of E6's flowers was chosen."""
    found = flower_rates()
    return _table(["learning rate", *found], [["vanilla's loss", *found.values()]])


def masked_table(folder: str) -> str:
    """Return the test loss of each arm of examples/quickstart.py, whose runs a folder of docs/results stores."""
    vanilla = Quickstart("vanilla", folder=folder)
    others = {arm: Quickstart(arm, folder=folder) for arm in ("TrAct", "TrAct, whitened start")}
    probabilities = corrected_by_name({arm: found.difference for arm, found in others.items()})
    rows = [["vanilla", str(len(vanilla.loss)), vanilla.end, "", ""]]
    for arm, found in others.items():
        rows.append([arm, str(len(found.loss)), found.end, found.change, p_text(probabilities[arm])])
    return _table(["arm", "seeds", "test loss", "from vanilla", "p"], rows)


def lam_table() -> str:
    """Return the gain of each lam on the small CIFAR-10 run, by rising lam."""
    experiments = {"0.00625": "lambda_sweep", "0.05": "lambda_sweep", "0.1": "lambda_sweep", "0.2": "lambda_sweep"}
    experiments |= {"0.8": "beyond_vit", "1.6": "lambda_sweep"}
    gains = []
    for lam, experiment in experiments.items():
        gains.append(pair(experiment, f"TrAct {lam}").gain)
    return _table(["lam", *experiments], [["above vanilla", *gains]])


def rate_table() -> str:
    """Return the final accuracy of each arm at each rate, with the number of seeds."""
    optimizers = {"AdamW": ("0.0005", "0.001", "0.002"), "SGD": ("0.03", "0.06", "0.12")}
    settings = [f"{name}, lr {rate}" for name, rates in optimizers.items() for rate in rates]
    rows = []
    for arm in ("vanilla", TRACT, START):
        cells = [arm]
        for setting in settings:
            seeds = len(arms("beyond_rates", setting)[arm].runs)
            cells.append(f"{final_interval('beyond_rates', arm, setting)} ({seeds})")
        rows.append(cells)
    return _table(["top-1, %", *settings], rows)


def range_table() -> str:
    """Return the accuracy of each arm on pixels that are not standardised."""
    settings = ("[0, 1]", "[0, 255]")
    rows = []
    for arm in arms("beyond_range", settings[0]):
        rows.append([arm, *(final("beyond_range", arm, setting) for setting in settings)])
    return _table(["top-1, %", *settings], rows)


def start_table() -> str:
    """Return what the whitened start with TrAct gains over vanilla and over TrAct, in each setting that was run."""
    settings = []
    for rate in ("0.0005", "0.001", "0.002"):
        settings.append((f"photo crops, AdamW {rate}", "beyond_rates", f"AdamW, lr {rate}"))
    for rate in ("0.002", "0.004"):
        settings.append((f"CIFAR-10, ViT, Adam {rate}", "beyond_vit_rates", f"Adam, lr {rate}"))
    for rate in ("0.03", "0.06", "0.12"):
        settings.append((f"photo crops, SGD {rate}", "beyond_rates", f"SGD, lr {rate}"))
    settings.append(("CIFAR-10, ResNet-18, SGD 0.08", "beyond_resnet", ""))
    rows = []
    for title, experiment, setting in settings:
        above = pair(experiment, START, "vanilla", setting)
        rows.append(_start_row(title, above, pair(experiment, START, TRACT, setting)))
    above = pair(STEP_SIZE, PLANNED_START)
    rows.append(_start_row("CIFAR-10, ViT, Adam 0.002, by a plan", above, pair(STEP_SIZE, PLANNED_START, "TrAct")))
    for data, experiment in conclusions.IN_TIME.items():
        start = longest(PLANNED_START)
        above = pair(experiment, start, longest("vanilla"))
        alone = pair(experiment, start, longest("TrAct"))
        rows.append(_start_row(f"{data}, ViT, Adam, best rate and lam, by a plan", above, alone))
    above = pair("evidence_adamw", PLANNED_START)
    alone = pair("evidence_adamw", PLANNED_START, "TrAct")
    rows.append(_start_row("CIFAR-10, ViT, AdamW, best rate, by a plan", above, alone))
    head = ["a whitened start with TrAct", "above vanilla", "seeds", "above TrAct alone", "seeds"]
    return _table(head, rows)


def _start_row(title: str, above: Pair, alone: Pair) -> list[str]:
    return [title, above.gain, str(len(above.arm.runs)), alone.gain, str(len(alone.arm.runs))]


def in_time_table() -> str:
    """Return E1's speed-ups."""
    found = arms_of(conclusions.IN_TIME)
    return "\n".join([*conclusions.in_time_table(found, evidence_time.SHARES), ""])


def equal_epochs_table() -> str:
    """Return E1's accuracies after whole runs of equal lengths."""
    head = ["data", "epochs", "vanilla, %", "TrAct", "TrAct from a whitened start", "DualPatchNorm"]
    rows = []
    for data, name in conclusions.IN_TIME.items():
        for share in evidence_time.SHARES:
            gains = _gains_at(name, share, ("TrAct", PLANNED_START, "DualPatchNorm"))
            rows.append([data, *gains])
    return _table(head, rows)


def _gains_at(experiment: str, share: int, compared: tuple[str, ...]) -> list[str]:
    """Return the epochs of one length, vanilla's accuracy after them, and what others gain over it."""
    vanilla = name_at("vanilla", share)
    found = arms(experiment)[vanilla]
    row = [str(found.curves.shape[1]), interval(found.final).text()]
    for arm in compared:
        row.append(pair(experiment, name_at(arm, share), vanilla).gain)
    return row


def layers_table() -> str:
    """Return what a step of E4 takes, and how much faster other layers are than the first alone."""
    found = {"ViT": arms(conclusions.IN_LAYERS["ViT"])}
    return "\n".join([*conclusions.layers_table(found, evidence_layers.SHARES), ""])


def layers_equal_epochs_table() -> str:
    """Return E4's accuracies after whole runs of equal lengths."""
    name, deeper, first = conclusions.IN_LAYERS["ViT"], conclusions.DEEPER, conclusions.FIRST
    compared = tuple(evidence_layers.VIT_LAYERS)
    rows = []
    for share in evidence_layers.SHARES:
        from_first = pair(name, name_at(deeper, share), name_at(first, share)).gain
        rows.append([*_gains_at(name, share, compared), from_first])
    return _table(["epochs", "vanilla, %", *compared, "all layers from the first"], rows)


def layers_resnet_table() -> str:
    """Return E4's longest runs of the ResNet-18: final accuracies, and what a step takes."""
    name = conclusions.IN_LAYERS["ResNet-18"]
    bases = [longest("vanilla"), longest(conclusions.FIRST)]
    rows = []
    for layers in ("vanilla", *evidence_layers.RESNET_LAYERS):
        arm = longest(layers)
        found = arms(name)[arm]
        gains = _gains_over(bases, name, arm)
        rows.append([layers, f"{found.milliseconds:.1f}", interval(found.final).text(), *gains])
    head = ["layers", "milliseconds a step", "top-1, %", "from vanilla, points", "from the first layer, points"]
    return _table(head, rows)


def optimizer_table() -> str:
    """Return what TrAct gains under each optimizer, alone and from a whitened start."""
    found = arms_of(conclusions.BY_OPTIMIZER)
    alone = conclusions.optimizer_gains(found, "TrAct")
    starts = conclusions.optimizer_gains(found, PLANNED_START)
    rows = []
    for tract, start in zip(alone, starts, strict=True):
        vanilla = interval(found[tract.optimizer]["vanilla"].final).text()
        cells = [tract.gain.text("+"), p_text(tract.p), start.gain.text("+"), p_text(start.p)]
        rows.append([f"`{tract.optimizer}`", vanilla, *cells])
    return _table(["`--optimizer`", "vanilla, %", "TrAct", "p", "TrAct from a whitened start", "p"], rows)


# By the name that stands between their marks.
TABLES: dict[str, Callable[[], str]] = {
    "cost_step_cpu": lambda: step_table("cost-cpu.jsonl"),
    "cost_layer_cpu": lambda: layer_table("cost-cpu.jsonl"),
    "cost_step_gpu": lambda: step_table("cost-gpu.jsonl"),
    "cost_layer_gpu": lambda: layer_table("cost-gpu.jsonl"),
    "bf16": lambda: arm_table("bf16"),
    "beyond_crops_adamw": lambda: arm_table("beyond_crops", CROPS_ADAMW, TRACT),
    "beyond_crops_sgd": lambda: arm_table("beyond_crops", CROPS_SGD, TRACT),
    "beyond_vit": lambda: arm_table("beyond_vit", reference=TRACT),
    "beyond_rates": rate_table,
    "beyond_range": range_table,
    "lam_units_half": lambda: arm_table("lam_units", "mean 0.5, std 0.5", TRACT),
    "lam_units_reflectance": lambda: arm_table("lam_units", "reflectance (0 to 0.3)", TRACT),
    "lam": lam_table,
    "whitened_start": start_table,
    "spectra_rates": lambda: spectra_table("validation"),
    "spectra": lambda: spectra_table("test"),
    "in_time": in_time_table,
    "equal_epochs": equal_epochs_table,
    "layers": layers_table,
    "layers_equal_epochs": layers_equal_epochs_table,
    "layers_resnet": layers_resnet_table,
    "few_patches": lambda: arm_table("evidence_few_patches"),
    "long": lambda: arm_table("evidence_long"),
    "optimizers": optimizer_table,
    "generative": lambda: masked_table("generative"),
    "flower_rates": flower_rates_table,
    "flowers": lambda: masked_table("flowers"),
    "robustness": robustness_table,
    "corruptions": corruptions_table,
    "calibration": calibration_table,
}
