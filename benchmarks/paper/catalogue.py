"""Lists all experiments: the paper's, those beyond it, and those that docs/results/plan.md planned."""

from benchmarks.paper.beyond import BEYOND
from benchmarks.paper.choices import is_at_edge, read
from benchmarks.paper.evidence import EVIDENCE
from benchmarks.paper.evidence_layers import LAYER_EVIDENCE
from benchmarks.paper.evidence_optimizers import OPTIMIZER_EVIDENCE
from benchmarks.paper.evidence_time import TIME_EVIDENCE
from benchmarks.paper.experiments import EXPERIMENTS

PLANNED = EVIDENCE | TIME_EVIDENCE | OPTIMIZER_EVIDENCE | LAYER_EVIDENCE
ALL = EXPERIMENTS | BEYOND | PLANNED
GROUPS = {"all": list(EXPERIMENTS), "beyond": list(BEYOND), "evidence": list(PLANNED)}


def edges(name: str) -> list[str]:
    """Return the arms of final runs whose chosen rate is the lowest or the highest that was tried."""
    tuned = name.replace("evidence_", "evidence_tuning_", 1)
    found = []
    for arm, cell in read().get(tuned, {}).items():
        if is_at_edge(ALL[tuned], cell):
            found.append(arm)
    return found
