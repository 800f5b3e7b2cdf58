"""Lists all experiments: the paper's, those beyond it, and those that docs/results/plan.md planned."""

from collections.abc import Mapping

from benchmarks.common.records import RunRecord
from benchmarks.paper.beyond import BEYOND
from benchmarks.paper.choices import choose, is_at_edge, read
from benchmarks.paper.evidence import EVIDENCE
from benchmarks.paper.evidence_layers import LAYER_EVIDENCE
from benchmarks.paper.evidence_optimizers import OPTIMIZER_EVIDENCE
from benchmarks.paper.evidence_time import TIME_EVIDENCE
from benchmarks.paper.experiments import EXPERIMENTS

# Their speed-ups are those of whole runs, which conclusions.py tells.
OF_WHOLE_RUNS = TIME_EVIDENCE | OPTIMIZER_EVIDENCE | LAYER_EVIDENCE
# Their runs are of several devices, and share them.
UNTIMED = OPTIMIZER_EVIDENCE
# They ask for differences alone.
OF_DIFFERENCES = ("evidence_few_patches", "evidence_long")
PLANNED = EVIDENCE | OF_WHOLE_RUNS
ALL = EXPERIMENTS | BEYOND | PLANNED
GROUPS = {"all": list(EXPERIMENTS), "beyond": list(BEYOND), "evidence": list(PLANNED)}


def tuning_of(name: str) -> str:
    """Return the name of the experiment that chooses the cells of final runs, if there is one."""
    return name.replace("evidence_", "evidence_tuning_", 1)


def goal_of(name: str) -> str:
    """Return the name of the experiment that chooses vanilla's rate for the longest of final runs, if there is one."""
    return name.replace("evidence_", "evidence_goal_", 1)


def refuse_stale_choice(name: str, scale: str, have: Mapping[str, RunRecord]) -> None:
    """Refuse final runs of cells that their tuning, as far as it is run now, does not choose.

    Raises:
        SystemExit: so, or where the tuning is not whole.
    """
    if scale != "small":
        return
    for tuned in (tuning_of(name), goal_of(name)):
        if tuned not in read():
            continue
        now = {choice.arm: choice.cell for choice in choose(ALL[tuned], scale, have)}
        if now != read()[tuned]:
            raise SystemExit(
                f"{name}: {tuned} chooses other cells by now. `choose {tuned}` and commit what it writes."
            )


def edges(name: str) -> list[str]:
    """Return the arms of final runs whose chosen rate is the lowest or the highest that was tried."""
    found = []
    for tuned, told in {tuning_of(name): "", goal_of(name): " in its longest runs"}.items():
        for arm, cell in read().get(tuned, {}).items():
            if is_at_edge(ALL[tuned], cell):
                found.append(arm + told)
    return found
