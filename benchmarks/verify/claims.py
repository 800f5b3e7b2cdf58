"""Lists what each document says, with the figures recomputed from stored runs as it is read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from benchmarks import spectra_results
from benchmarks.paper.summary import gain
from benchmarks.paper.verdicts import step_size
from benchmarks.verify.stored import (
    RESULTS,
    Pair,
    Quickstart,
    arm_table,
    arms,
    colour_statistics,
    cost,
    final,
    final_interval,
    layer_table,
    markdown,
    pair,
    step_table,
    times,
)

TRACT = "TrAct 0.1"
START = "matched start, TrAct 0.1"
STEM = "whitening stem"
RELATIVE = "lam 0.1 tr(C) / n"
CROPS_ADAMW = "AdamW, lr 0.001"
CROPS_SGD = "SGD, lr 0.12"
STEP_SIZE = "evidence_step_size"
PLANNED_START = "matched start, TrAct"

# Tables that stand between marks.
TABLES: dict[str, Callable[[], str]] = {
    "cost_step_cpu": lambda: step_table("cost-cpu.jsonl"),
    "cost_layer_cpu": lambda: layer_table("cost-cpu.jsonl"),
    "cost_step_gpu": lambda: step_table("cost-gpu.jsonl"),
    "cost_layer_gpu": lambda: layer_table("cost-gpu.jsonl"),
    "bf16": lambda: arm_table("bf16"),
    "beyond_crops_adamw": lambda: arm_table("beyond_crops", CROPS_ADAMW, TRACT),
    "beyond_crops_sgd": lambda: arm_table("beyond_crops", CROPS_SGD, TRACT),
    "beyond_vit": lambda: arm_table("beyond_vit", reference=TRACT),
    "beyond_rates": lambda: rate_table(),
    "beyond_range": lambda: range_table(),
    "lam_units_half": lambda: arm_table("lam_units", "mean 0.5, std 0.5", TRACT),
    "lam_units_reflectance": lambda: arm_table("lam_units", "reflectance (0 to 0.3)", TRACT),
    "lam": lambda: lam_table(),
    "whitened_start": lambda: start_table(),
    "spectra_rates": lambda: spectra_table("validation"),
    "spectra": lambda: spectra_table("test"),
}
# Documents whose figures are not looked for, and why.
WHOLE = {
    "docs/results/small.md": "written by benchmarks.paper report; a test compares it with the stored runs",
    "docs/results/evidence.md": "written by benchmarks.paper report; a test compares it with the stored runs",
    "docs/results/paper.md": "what the paper did and found, cited",
    "docs/results/plan.md": "what is to be run and how it is decided, before it is run",
    "docs/models.md": "written by benchmarks.survey",
}


def _read(file: str) -> Any:
    return yaml.safe_load(Path(__file__).with_name(file).read_text(encoding="utf-8"))


# Figures that no run of ours gives, by document, and where they come from.
NOT_MEASURED: dict[str, dict[str, str]] = _read("not_measured.yaml")
SENTENCES: dict[str, list[str]] = _read("sentences.yaml")


@functools.cache
def claims() -> dict[str, list[str]]:
    """Return the sentences with figures that each document has."""
    known = figures()
    return {name: [sentence.format_map(known) for sentence in said] for name, said in SENTENCES.items()}


def figures() -> dict[str, str]:
    """Return the figures of sentences.yaml by name."""
    return {
        **of_cifar10(),
        **of_other_settings(),
        **of_the_start(),
        **of_the_step_size(),
        **of_optimizers(),
        **of_colour_statistics(),
        **of_costs(),
        **of_the_quickstart(),
    }


def of_cifar10() -> dict[str, str]:
    """Return those of the small ViT and ResNet-18 on CIFAR-10."""
    tract = pair("cifar10_vit", TRACT)
    resnet = pair("cifar10_resnet18_sgd", TRACT)
    return {
        "vanilla": final_interval("cifar10_vit", "vanilla"),
        "tract": tract.gain,
        "tract_epoch": tract.epoch,
        "tract_epochs": tract.speed_up,
        "tract_in_time": tract.in_time,
        "shorter": pair("speed_up", "TrAct 0.1 in 2/3").gain,
        "lam_05": pair("cifar10_vit", "TrAct 0.05").gain,
        "lam_2": pair("cifar10_vit", "TrAct 0.2").gain,
        "lam_2_from_1": pair("cifar10_vit", "TrAct 0.2", TRACT).gain,
        "lam_low": pair("lambda_sweep", "TrAct 0.00625").gain,
        "lam_high": pair("lambda_sweep", "TrAct 1.6").gain,
        "resnet": resnet.gain,
        "resnet_epochs": resnet.speed_up,
        "resnet_in_time": resnet.in_time.split()[0],
        "torch_tract": torch_tract_difference(),
    }


def of_other_settings() -> dict[str, str]:
    """Return those of norms, other pixels and lam in other units."""
    half, reflectance = "mean 0.5, std 0.5", "reflectance (0 to 0.3)"
    return {
        "patch_norm": pair("patch_norm", "PatchNorm").gain,
        "dual_patch_norm": pair("patch_norm", "DualPatchNorm").gain,
        "stem": pair("baselines", STEM).gain,
        "unit_pixels": pair("input_range", TRACT, setting="[0, 1]").gain,
        "raw_pixels": pair("input_range", TRACT, setting="[0, 255]").gain,
        "raw_vanilla": final_interval("input_range", "vanilla", "[0, 255]"),
        "raw_tract": final_interval("input_range", TRACT, "[0, 255]"),
        "relative_half": pair("lam_units", RELATIVE, TRACT, half).gain,
        "relative_reflectance": pair("lam_units", RELATIVE, TRACT, reflectance).gain,
    }


def of_the_start() -> dict[str, str]:
    """Return those of a whitened start."""
    vanilla = pair("beyond_vit", START)
    both = pair("beyond_vit", START, TRACT)
    later = both.of(range(5, 20))
    alone = "start alone"
    return {
        "start": vanilla.gain,
        "start_epoch": vanilla.epoch,
        "start_in_time": vanilla.in_time,
        "start_first_seeds": both.of(range(5)).gain,
        "start_later_seeds": later.gain,
        "start_later_p": later.p,
        "start_epoch_1": both.gain_after(1),
        "start_epoch_6": both.gain_after(6),
        "start_below": both.seeds_below,
        "start_best_rates": start_at_best_rates(),
        "alone_adamw": pair("beyond_crops", alone, setting=CROPS_ADAMW).gain,
        "alone_sgd": pair("beyond_crops", alone, setting=CROPS_SGD).gain,
        "stem_adamw": pair("beyond_crops", STEM, START, CROPS_ADAMW).gain,
        "stem_sgd": pair("beyond_crops", STEM, START, CROPS_SGD).gain,
        "stem_cifar": pair("beyond_vit", STEM, START).gain,
    }


def of_the_step_size() -> dict[str, str]:
    """Return those of E0: is TrAct more than a learning rate of the first layer?"""
    start, eigen = PLANNED_START, "eigenvectors, lam 0.1"
    decision = step_size(arms(STEP_SIZE))
    assert decision.share is not None
    return {
        "e0_vanilla": final_interval(STEP_SIZE, "vanilla"),
        "e0_tract": pair(STEP_SIZE, "TrAct").gain,
        "e0_start": pair(STEP_SIZE, start).gain,
        "e0_start_from_tract": pair(STEP_SIZE, start, "TrAct").gain,
        "e0_alone": pair(STEP_SIZE, "matched start").gain,
        "e0_alone_from_tract": pair(STEP_SIZE, "matched start", "TrAct").gain,
        "e0_control": decision.best_control,
        "e0_above_control": decision.above_control.text("+"),
        "e0_p": f"{decision.p:.4f}",
        "e0_verdict": decision.sentence,
        "e0_lent": decision.room.text("+"),
        "e0_share": decision.share.text(digits=2),
        "e0_grafted": pair(STEP_SIZE, "TrAct, grafted").gain,
        "e0_grafted_from_tract": pair(STEP_SIZE, "TrAct, grafted", "TrAct").gain,
        "e0_eigen_from_start": pair(STEP_SIZE, eigen, start).gain,
        "e0_frozen": pair(STEP_SIZE, "frozen first layer").gain,
        "e0_triple": pair(STEP_SIZE, "first rate x 3").gain,
        "e0_shorter": pair(STEP_SIZE, "vanilla in 2/3").gain,
    }


def of_optimizers() -> dict[str, str]:
    """Return what TrAct gains under other optimizers than Adam."""
    muon = "evidence_muon_split"
    return {
        "muon_vanilla": final_interval(muon, "vanilla"),
        "muon_tract": pair(muon, "TrAct").gain,
        "muon_start": pair(muon, PLANNED_START).gain,
        "muon_start_from_tract": pair(muon, PLANNED_START, "TrAct").gain,
    }


def of_colour_statistics() -> dict[str, str]:
    """Return what a random forest on colours and gradients reaches."""
    return {
        "crops_by_colours": colour_statistics("photo_crops"),
        "cifar_by_colours": colour_statistics("cifar10"),
    }


def of_the_quickstart() -> dict[str, str]:
    """Return those of masked image modelling by examples/quickstart.py."""
    found = {"masked": Quickstart("vanilla").end}
    for name, arm in {"tract": "TrAct", "start": "TrAct, whitened start"}.items():
        runs = Quickstart(arm)
        found[f"masked_{name}"] = runs.change
        found[f"masked_{name}_epoch"] = runs.epoch
        found[f"masked_{name}_in_time"] = runs.in_time
    found["masked_start_from_tract"] = Quickstart("TrAct, whitened start", "TrAct").change
    return found


def of_costs() -> dict[str, str]:
    """Return the times of whole training steps on a GPU, over those without TrAct."""
    names = {"gpu_vit": "ViT-S/16", "gpu_resnet": "ResNet-50", "gpu_cifar": "ResNet-18 @32"}
    found = {}
    for name, model in names.items():
        batch = 128 if "@32" in model else 256
        result = cost("cost-gpu.jsonl", f"{model} | step | cuda | bf16 | eager | {batch}")
        found[name] = times(result)
    return found


def start_at_best_rates() -> str:
    """Return what the start at AdamW's 2e-3 gains over TrAct at 1e-3, the best of three rates for each."""
    start = arms("beyond_rates", "AdamW, lr 0.002")[START]
    tract = arms("beyond_rates", "AdamW, lr 0.001")[TRACT]
    return gain(start, tract).text("+")


def torch_tract_difference() -> str:
    """Return the largest difference between the paper's package and hf-tract in points, over epochs, from one seed."""
    both = pair("baselines", "torch_tract 0.1", TRACT)
    return f"{abs(both.arm.curves - both.base.curves).max():.2f}"


def spectra_table(part: str) -> str:
    """Return vanilla's error at each rate on the validation blocks, or every arm's on the test blocks."""
    runs = spectra_results.read(RESULTS / "spectra.jsonl", part)
    if part == "test":
        return markdown(spectra_results.HEAD, spectra_results.rows(runs))
    rates = [f"{rate:g}" for rate in spectra_results.rates_of(runs)]
    return markdown(["learning rate", *rates], spectra_results.rate_rows(runs))


def lam_table() -> str:
    """Return the gain of each lam on the small CIFAR-10 run, by rising lam."""
    experiments = {"0.00625": "lambda_sweep", "0.05": "lambda_sweep", "0.1": "lambda_sweep", "0.2": "lambda_sweep"}
    experiments |= {"0.8": "beyond_vit", "1.6": "lambda_sweep"}
    gains = []
    for lam, experiment in experiments.items():
        gains.append(pair(experiment, f"TrAct {lam}").gain)
    return markdown(["lam", *experiments], [["above vanilla", *gains]])


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
    return markdown(["top-1, %", *settings], rows)


def range_table() -> str:
    """Return the accuracy of each arm on pixels that are not standardised."""
    settings = ("[0, 1]", "[0, 255]")
    rows = []
    for arm in arms("beyond_range", settings[0]):
        rows.append([arm, *(final("beyond_range", arm, setting) for setting in settings)])
    return markdown(["top-1, %", *settings], rows)


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
    head = ["a whitened start with TrAct", "above vanilla", "seeds", "above TrAct alone", "seeds"]
    return markdown(head, rows)


def _start_row(title: str, above: Pair, alone: Pair) -> list[str]:
    return [title, above.gain, str(len(above.arm.runs)), alone.gain, str(len(alone.arm.runs))]
