"""Lists all experiments: the paper's, those beyond it, and those that docs/results/plan.md planned."""

from benchmarks.paper.beyond import BEYOND
from benchmarks.paper.evidence import EVIDENCE
from benchmarks.paper.evidence_layers import LAYER_EVIDENCE
from benchmarks.paper.evidence_optimizers import OPTIMIZER_EVIDENCE
from benchmarks.paper.evidence_time import TIME_EVIDENCE
from benchmarks.paper.experiments import EXPERIMENTS

PLANNED = EVIDENCE | TIME_EVIDENCE | OPTIMIZER_EVIDENCE | LAYER_EVIDENCE
ALL = EXPERIMENTS | BEYOND | PLANNED
GROUPS = {"all": list(EXPERIMENTS), "beyond": list(BEYOND), "evidence": list(PLANNED)}
