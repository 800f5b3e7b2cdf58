"""Lists E3 of docs/results/plan.md: what TrAct adds to other optimizers than Adam."""

from __future__ import annotations

from benchmarks.paper.evidence import MATCHED, SMOKE_VALIDATION, TRACT, TUNING_SEED, VALIDATION
from benchmarks.paper.experiment import Changes, Experiment
from benchmarks.paper.experiments import NO_TRACT, VANILLA, VIT_SMALL, VIT_SMOKE

# That of all these optimizers is decoupled from the gradient.
DECAY = {"weight_decay": 0.05}
# A rate that falls would spoil what schedule-free optimizers average.
CONSTANT = {"schedule": "constant"}
OPTIMIZERS: dict[str, Changes] = {
    "AdamW": {"optimizer": "adamw"},
    "Muon, AdamW for first layer and head": {"optimizer": "muon_split"},
    "Muon": {"optimizer": "muon"},
    "SOAP": {"optimizer": "soap"},
    "schedule-free AdamW": {"optimizer": "schedule_free"} | CONSTANT,
}
ARMS: dict[str, Changes] = VANILLA | {"TrAct": TRACT, "matched start, TrAct": MATCHED}
COORDINATES = {"whitened coordinates": NO_TRACT | {"variant": "coordinates", "lam": 0.1}}
RATES = (1e-3, 2e-3, 4e-3, 8e-3)


def at_rates(arms: dict[str, Changes]) -> dict[str, Changes]:
    """Return each arm at each rate."""
    found: dict[str, Changes] = {}
    for name, arm in arms.items():
        for rate in RATES:
            found[f"{name}, lr {rate:g}"] = arm | {"learning_rate": rate}
    return found


def settings(*names: str) -> dict[str, Changes]:
    """Return these optimizers as settings of an experiment."""
    return {f"{name}; 100 epochs": OPTIMIZERS[name] | DECAY for name in names}


def tuning(title: str, optimizers: dict[str, Changes], arms: dict[str, Changes]) -> Experiment:
    """Return the choice of a rate for each arm under each optimizer."""
    return Experiment(
        f"E3: {title}, on the validation split",
        "cifar10_vit.yaml",
        optimizers,
        at_rates(arms),
        VIT_SMALL | VALIDATION,
        VIT_SMOKE | SMOKE_VALIDATION,
        small_seeds=1,
        first_seed=TUNING_SEED,
    )


OPTIMIZER_EVIDENCE = {
    "evidence_tuning_optimizers": tuning("four rates of each arm", settings(*OPTIMIZERS), ARMS),
    "evidence_tuning_coordinates": tuning("Muon in whitened coordinates", settings("Muon"), COORDINATES),
}
