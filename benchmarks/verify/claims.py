"""Lists the sentences that each document says, with the figures recomputed from stored runs as it is read."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import yaml

from benchmarks import robustness_results
from benchmarks.common.statistics import p_text
from benchmarks.paper import conclusions, evidence_layers
from benchmarks.paper.catalogue import tuning_of
from benchmarks.paper.choices import read
from benchmarks.paper.evidence_optimizers import OPTIMIZERS, TUNINGS
from benchmarks.paper.evidence_time import SHARES
from benchmarks.paper.summary import corrected_by_name, gain
from benchmarks.paper.time_to_accuracy import least_in_words
from benchmarks.paper.verdicts import step_size
from benchmarks.verify.stored import (
    CROPS_ADAMW,
    CROPS_SGD,
    PLANNED_START,
    RELATIVE,
    START,
    STEM,
    STEP_SIZE,
    TRACT,
    Quickstart,
    arms,
    arms_of,
    colour_statistics,
    cost,
    final_interval,
    longest,
    pair,
    robustness,
    times,
)

# Documents whose figures are not looked for, and why.
UNCHECKED = {
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
        **of_the_time(),
        **of_optimizers(),
        **of_deeper_layers(),
        **of_what_may_hurt(),
        **of_robustness(),
        **of_the_flowers(),
        **of_colour_statistics(),
        **of_costs(),
        **of_the_quickstart(),
    }


def of_cifar10() -> dict[str, str]:
    """Return those of the small ViT and ResNet-18 on CIFAR-10."""
    tract = pair("cifar10_vit", TRACT)
    resnet = pair("cifar10_resnet18_sgd", TRACT)
    return {
        "tract": tract.gain,
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
    both = pair("beyond_vit", START, TRACT)
    later = both.of(range(5, 20))
    alone = "start alone"
    return {
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
        "e0_start_p": corrected_p(STEP_SIZE, start, "TrAct"),
        "e0_alone": pair(STEP_SIZE, "matched start").gain,
        "e0_alone_from_tract": pair(STEP_SIZE, "matched start", "TrAct").gain,
        "e0_control": decision.best_control.removeprefix("first rate x "),
        "e0_above_control": decision.above_control.text("+"),
        "e0_p": f"{decision.p:.4f}",
        "e0_lent": decision.room.text("+"),
        "e0_lent_p": corrected_p(STEP_SIZE, decision.best_lent, "TrAct"),
        "e0_share": decision.share.text(digits=2),
        "e0_grafted": pair(STEP_SIZE, "TrAct, grafted").gain,
        "e0_grafted_from_tract": pair(STEP_SIZE, "TrAct, grafted", "TrAct").gain,
        "e0_eigen_from_start": pair(STEP_SIZE, eigen, start).gain,
        "e0_frozen": pair(STEP_SIZE, "frozen first layer").gain,
        "e0_triple": pair(STEP_SIZE, "first rate x 3").gain,
        "e0_shorter": pair(STEP_SIZE, "vanilla in 2/3").gain,
    }


def of_the_time() -> dict[str, str]:
    """Return those of E1: what TrAct saves in time."""
    tract, start = {}, {}
    for data, each in arms_of(conclusions.IN_TIME).items():
        tract[data] = conclusions.faster_than("vanilla", each, "TrAct", SHARES)
        start[data] = conclusions.faster_than("vanilla", each, PLANNED_START, SHARES)
    return {
        "e1_cifar": tract["CIFAR-10"].text(digits=2),
        "e1_flowers": tract["flowers"].text(digits=2),
        "e1_start_cifar": start["CIFAR-10"].text(digits=2),
        "e1_start_flowers": start["flowers"].text(digits=2),
        "e1_least": least_in_words(tract),
        "e1_dual_flowers": pair("evidence_flowers", longest("DualPatchNorm"), longest("vanilla")).gain,
        "e1_tract_flowers": pair("evidence_flowers", longest("TrAct"), longest("vanilla")).gain,
    }


def of_optimizers() -> dict[str, str]:
    """Return what TrAct gains under other optimizers than Adam."""
    split, muon = "evidence_muon_split", "evidence_muon"
    found = {
        "muon_tract": pair(split, "TrAct").gain,
        "muon_start_from_tract": pair(split, PLANNED_START, "TrAct").gain,
        "muon_split_end": final_interval(split, "TrAct"),
        "all_muon_tract": pair(muon, "TrAct").gain,
        "all_muon_vanilla": final_interval(muon, "vanilla"),
        "soap_vanilla": final_interval("evidence_soap", "vanilla"),
        "coordinates": pair(muon, "whitened coordinates").gain,
        "soap_tract": pair("evidence_soap", "TrAct").gain,
        "muon_vanilla": final_interval(split, "vanilla"),
        "adamw_vanilla": final_interval("evidence_adamw", "vanilla"),
        "adamw_tract": pair("evidence_adamw", "TrAct").gain,
        "adamw_start_from_tract": pair("evidence_adamw", PLANNED_START, "TrAct").gain,
    }
    free = "evidence_schedule_free"
    found["schedule_free_tract"] = pair(free, "TrAct").gain
    found["schedule_free_start_from_tract"] = pair(free, PLANNED_START, "TrAct").gain
    for name in OPTIMIZERS:
        found[f"{name}_rate_ratio"] = f"{rate_ratio(name):g}"
    return found


def rate_ratio(optimizer: str) -> float:
    """Return TrAct's best learning rate over vanilla's, under an optimizer of E3."""
    tuned = tuning_of(conclusions.BY_OPTIMIZER[optimizer])
    cells, chosen = TUNINGS[tuned].arms, read()[tuned]
    ratio: float = cells[chosen["TrAct"]]["learning_rate"] / cells[chosen["vanilla"]]["learning_rate"]
    return ratio


def of_deeper_layers() -> dict[str, str]:
    """Return those of E4: what TrAct saves in time on the ViT, and adds in deeper layers."""
    name, resnet = conclusions.IN_LAYERS["ViT"], conclusions.IN_LAYERS["ResNet-18"]
    found, first, deeper = arms(name), conclusions.FIRST, conclusions.DEEPER
    return {
        "layers_first": conclusions.faster_text("vanilla", found, first, evidence_layers.SHARES),
        "layers_all": conclusions.faster_text(first, found, deeper, evidence_layers.SHARES),
        "layers_all_points": pair(name, longest(deeper), longest(first)).gain,
        "layers_block_points": pair(name, longest("and first block"), longest(first)).gain,
        "resnet_layers_points": pair(resnet, longest(deeper), longest(first)).gain,
        "resnet_first_points": pair(resnet, longest(first), longest("vanilla")).gain,
    }


def of_what_may_hurt() -> dict[str, str]:
    """Return those of E2: few patches, and masked image modelling for four times as long."""
    longer = Quickstart("TrAct", folder="generative")
    return {
        "few_patches": pair("evidence_few_patches", TRACT).gain,
        "long_tract": pair("evidence_long", TRACT).gain,
        "longer_tract": longer.change,
        "longer_ahead_until": longer.ahead_until,
        "longer_seeds_above": longer.seeds_above,
    }


def of_the_flowers() -> dict[str, str]:
    """Return those of E6's masked modelling of flowers."""
    tract = Quickstart("TrAct", folder="flowers")
    return {
        "flowers_vanilla": Quickstart("vanilla", folder="flowers").end,
        "flowers_tract": tract.change,
        "flowers_epoch": tract.epoch,
        "flowers_start_from_tract": Quickstart("TrAct, whitened start", "TrAct", "flowers").change,
    }


def of_robustness() -> dict[str, str]:
    """Return what may be said of E5's arms."""
    found = robustness()
    return {
        "robust_tract_clean": robustness_results.from_vanilla(found, "clean")["TrAct"].found.text("+"),
        "robust_tract_corrupted": robustness_results.from_vanilla(found, "corrupted")["TrAct"].found.text("+"),
        "robust_start_corrupted": robustness_results.from_vanilla(found, "corrupted")["matched start"].found.text("+"),
        "robust_tract": robustness_results.sentence(found, "TrAct"),
        "robust_start": robustness_results.sentence(found, "matched start"),
        "robust_both": robustness_results.sentence(found, PLANNED_START),
        "robust_noise": robustness_results.under(found, "TrAct", "gaussian noise").text("+"),
        "robust_blur": robustness_results.under(found, "TrAct", "gaussian blur").text("+"),
        "robust_brightness": robustness_results.under(found, "TrAct", "brightness").text("+"),
        "ece_clean": robustness_results.from_vanilla(found, "clean_error")["TrAct"].found.text("+"),
        "ece_corrupted": robustness_results.from_vanilla(found, "corrupted_error")["TrAct"].found.text("+"),
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


def corrected_p(experiment: str, arm: str, base: str) -> str:
    """Return the p of a difference by Holm over all arms' differences from this base."""
    found = arms(experiment)
    gains = {name: gain(each, found[base]) for name, each in found.items() if name != base}
    return p_text(corrected_by_name(gains)[arm])


def start_at_best_rates() -> str:
    """Return what the start at AdamW's 2e-3 gains over TrAct at 1e-3, the best of three rates for each."""
    start = arms("beyond_rates", "AdamW, lr 0.002")[START]
    tract = arms("beyond_rates", "AdamW, lr 0.001")[TRACT]
    return gain(start, tract).text("+")


def torch_tract_difference() -> str:
    """Return the largest difference between the paper's package and hf-tract in points, over epochs, from one seed."""
    both = pair("baselines", "torch_tract 0.1", TRACT)
    return f"{abs(both.arm.curves - both.base.curves).max():.2f}"
