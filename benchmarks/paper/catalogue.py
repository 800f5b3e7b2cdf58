"""Lists all experiments: the paper's, those beyond it, and the evidence by docs/results/plan.md."""

from benchmarks.paper.beyond import BEYOND
from benchmarks.paper.evidence import EVIDENCE
from benchmarks.paper.experiments import EXPERIMENTS

ALL = EXPERIMENTS | BEYOND | EVIDENCE
GROUPS = {"all": list(EXPERIMENTS), "beyond": list(BEYOND), "evidence": list(EVIDENCE)}
