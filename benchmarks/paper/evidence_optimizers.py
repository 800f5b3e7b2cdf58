"""Lists E3 of docs/results/plan.md: what TrAct adds to other optimizers than Adam."""

from __future__ import annotations

from benchmarks.paper.beyond import MATCHED
from benchmarks.paper.choices import FINALISTS, final_runs, known
from benchmarks.paper.evidence import SMOKE_VALIDATION, TRACT, TUNING_EPOCHS, TUNING_SEED, VALIDATION
from benchmarks.paper.experiment import Changes, Experiment
from benchmarks.paper.experiments import NO_TRACT, VANILLA, VIT_SMALL, VIT_SMOKE

# That of all these optimizers is decoupled from the gradient.
DECAY = {"weight_decay": 0.05}
# A rate that falls would spoil what schedule-free optimizers average.
CONSTANT = {"schedule": "constant"}
OPTIMIZERS: dict[str, Changes] = {
    "adamw": {},
    "muon_split": {},
    "muon": {},
    "soap": {},
    "schedule_free": CONSTANT,
}
ARMS: dict[str, Changes] = VANILLA | {"TrAct": TRACT, "matched start, TrAct": MATCHED}
COORDINATES = {"whitened coordinates": NO_TRACT | {"variant": "coordinates", "lam": 0.1}}
# An edge extends those of its own optimizer.
PLANNED_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
RATES = {
    "adamw": PLANNED_RATES,
    "muon_split": (*PLANNED_RATES, 1.6e-2),
    "muon": (*PLANNED_RATES, 1.6e-2),
    "soap": (*PLANNED_RATES, 1.6e-2, 3.2e-2),
    "schedule_free": (*PLANNED_RATES, 1.6e-2),
}
SEEDS = range(100, 108)


def cells(optimizer: str) -> dict[str, Changes]:
    """Return each arm under an optimizer, at each rate."""
    arms = dict(ARMS)
    if optimizer == "muon":
        arms |= COORDINATES
    settings = DECAY | {"optimizer": optimizer, "epochs": TUNING_EPOCHS} | OPTIMIZERS[optimizer]
    found: dict[str, Changes] = {}
    for name, arm in arms.items():
        for rate in RATES[optimizer]:
            found[f"{name}, lr {rate:g}"] = arm | settings | {"learning_rate": rate}
    return found


def tuning(optimizer: str) -> Experiment:
    """Return the choice of a rate for each arm under an optimizer."""
    return Experiment(
        f"E3: rates of each arm, {optimizer}, on the validation split",
        "cifar10_vit.yaml",
        {"": {}},
        cells(optimizer),
        VIT_SMALL | VALIDATION,
        VIT_SMOKE | SMOKE_VALIDATION,
        small_seeds=2,
        first_seed=TUNING_SEED,
        finalists=FINALISTS,
    )


def final(optimizer: str) -> Experiment | None:
    """Return the runs of each arm at its best rate."""
    title = f"E3: with other optimizers, {optimizer}"
    tuned = f"evidence_tuning_{optimizer}"
    return final_runs(title, tuned, TUNINGS[tuned], VIT_SMALL, SEEDS)


TUNINGS = {f"evidence_tuning_{name}": tuning(name) for name in OPTIMIZERS}
OPTIMIZER_EVIDENCE = TUNINGS | known({f"evidence_{name}": final(name) for name in OPTIMIZERS})
