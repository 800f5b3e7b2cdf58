"""Lists what each document says, with the figures recomputed from stored runs as it is read."""

from __future__ import annotations

import functools
from collections.abc import Callable

from benchmarks.verify.stored import Pair, arm_table, layer_table, step_table

# Tables that stand between marks.
TABLES: dict[str, Callable[[], str]] = {
    "cost_step_cpu": lambda: step_table("cost-cpu.jsonl"),
    "cost_layer_cpu": lambda: layer_table("cost-cpu.jsonl"),
    "cost_step_gpu": lambda: step_table("cost-gpu.jsonl"),
    "cost_layer_gpu": lambda: layer_table("cost-gpu.jsonl"),
    "bf16": lambda: arm_table("bf16"),
}
# Documents whose figures are not looked for, and why.
WHOLE = {
    "docs/results/small.md": "written by benchmarks.paper report; a test compares it with the stored runs",
    "docs/results/paper.md": "what the paper did and found, cited",
    "docs/results/plan.md": "what is to be run and how it is decided, before it is run",
    "docs/models.md": "written by benchmarks.survey",
}
# Figures that no run of ours gives, by document, and where they come from.
NOT_MEASURED: dict[str, dict[str, str]] = {
    "docs/performance.md": {
        "within 512 MiB on an accelerator": "a constant of core/pieces.py",
        "within 8 MiB, which a cache holds": "a constant of core/pieces.py",
    },
}


@functools.cache
def claims() -> dict[str, list[str]]:
    """Return the sentences with figures that each document has."""
    return {"README.md": readme()}


def readme() -> list[str]:
    """Return those of the README."""
    cifar = Pair("cifar10_vit", "TrAct 0.1")
    return [f"On a small CIFAR-10 run TrAct gains {cifar.gain} points"]
