"""Lists what each document says, with the figures recomputed from stored runs as it is read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import yaml

from benchmarks.verify.stored import Pair, arm_table, layer_table, step_table

TRACT = "TrAct 0.1"
START = "matched start, TrAct 0.1"
STEM = "whitening stem"
CROPS_ADAMW = "AdamW, lr 0.001"
CROPS_SGD = "SGD, lr 0.12"

# Tables that stand between marks.
TABLES: dict[str, Callable[[], str]] = {
    "cost_step_cpu": lambda: step_table("cost-cpu.jsonl"),
    "cost_layer_cpu": lambda: layer_table("cost-cpu.jsonl"),
    "cost_step_gpu": lambda: step_table("cost-gpu.jsonl"),
    "cost_layer_gpu": lambda: layer_table("cost-gpu.jsonl"),
    "bf16": lambda: arm_table("bf16"),
    "lam": lambda: lam_table(),
    "whitened_start": lambda: start_table(),
}
# Documents whose figures are not looked for, and why.
WHOLE = {
    "docs/results/small.md": "written by benchmarks.paper report; a test compares it with the stored runs",
    "docs/results/paper.md": "what the paper did and found, cited",
    "docs/results/plan.md": "what is to be run and how it is decided, before it is run",
    "docs/models.md": "written by benchmarks.survey",
}
# Figures that no run of ours gives, by document, and where they come from.
NOT_MEASURED: dict[str, dict[str, str]] = yaml.safe_load(
    Path(__file__).with_name("not_measured.yaml").read_text(encoding="utf-8")
)


@functools.cache
def claims() -> dict[str, list[str]]:
    """Return the sentences with figures that each document has."""
    return {"README.md": readme(), "docs/usage.md": usage(), "docs/whitening.md": whitening()}


def readme() -> list[str]:
    """Return those of the README."""
    cifar = Pair("cifar10_vit", "TrAct 0.1")
    return [f"On a small CIFAR-10 run TrAct gains {cifar.gain} points"]


def usage() -> list[str]:
    """Return those of docs/usage.md."""
    relative = "lam 0.1 tr(C) / n"
    centred = Pair("lam_units", relative, TRACT, "mean 0.5, std 0.5")
    reflectance = Pair("lam_units", relative, TRACT, "reflectance (0 to 0.3)")
    return [
        f"{centred.gain} points on pixels of mean 0.5 and std 0.5, and {reflectance.gain} on reflectances",
    ]


def whitening() -> list[str]:
    """Return those of docs/whitening.md."""
    cifar = Pair("beyond_vit", START, TRACT)
    alone_adamw = Pair("beyond_crops", "start alone", setting=CROPS_ADAMW)
    alone_sgd = Pair("beyond_crops", "start alone", setting=CROPS_SGD)
    stem_adamw = Pair("beyond_crops", STEM, START, CROPS_ADAMW)
    stem_sgd = Pair("beyond_crops", STEM, START, CROPS_SGD)
    stem_cifar = Pair("beyond_vit", STEM, START)
    return [
        f"The fifteen later ones by themselves say {cifar.of(range(5, 20)).gain}",
        f"it ends {alone_adamw.gain} points from vanilla under AdamW, and {alone_sgd.gain} under SGD at 0.12",
        f"{stem_adamw.gain} above the start with TrAct under AdamW, {stem_sgd.gain} under SGD at 0.12",
        f"On CIFAR-10 it is below: {stem_cifar.gain}",
    ]


def lam_table() -> str:
    """Return the gain of each lam on the small CIFAR-10 run, by rising lam."""
    experiments = {"0.00625": "lambda_sweep", "0.05": "lambda_sweep", "0.1": "lambda_sweep", "0.2": "lambda_sweep"}
    experiments |= {"0.8": "beyond_vit", "1.6": "lambda_sweep"}
    gains = []
    for lam, experiment in experiments.items():
        gains.append(Pair(experiment, f"TrAct {lam}").gain)
    lines = [["lam", *experiments], ["---"] * (1 + len(gains)), ["above vanilla", *gains]]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


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
    lines = [
        "| a whitened start with TrAct | above vanilla | seeds | above TrAct alone | seeds |",
        "|---|---|---|---|---|",
    ]
    for title, experiment, setting in settings:
        above = Pair(experiment, START, "vanilla", setting)
        alone = Pair(experiment, START, TRACT, setting)
        lines.append(f"| {title} | {above.gain} | {len(above.arm.runs)} | {alone.gain} | {len(alone.arm.runs)} |")
    return "\n".join(lines) + "\n"
