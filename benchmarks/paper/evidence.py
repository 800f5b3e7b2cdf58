"""Lists E0 and E2 of docs/results/plan.md: is it more than a step size, and where may it hurt."""

from __future__ import annotations

from benchmarks.paper.beyond import MATCHED
from benchmarks.paper.choices import FRESH_SEED
from benchmarks.paper.experiment import Changes, Experiment
from benchmarks.paper.experiments import NO_TRACT, VANILLA, VIT_SMALL, VIT_SMOKE, tract

TUNING_SEED = 50
# Of CIFAR-10's recipes, in per cent: 10 epochs where the final runs have up to 15.
TUNING_EPOCHS = 67
VALIDATION = {"validation_samples": 5000}
# Vanilla's best of four on the validation rows (evidence_rate), by seeds 50 and 51.
CHOSEN_RATE = {"learning_rate": 2e-3}
TRACT: Changes = {"lam": 0.1}
SHORTER = {"vanilla in 2/3": NO_TRACT | {"epochs": 67}}


def first_rates(*rates: float) -> dict[str, Changes]:
    """Return arms without TrAct whose first layer learns at `rate` times the others' rate."""
    return {f"first rate x {rate:g}": NO_TRACT | {"first_rate": rate} for rate in rates}


def eigen(*lams: float) -> dict[str, Changes]:
    """Return arms that train the layer in the eigenvectors of C, damped by lam."""
    return {f"eigenvectors, lam {lam:g}": NO_TRACT | {"variant": "eigen", "lam": lam} for lam in lams}


def oracle(donor: Changes) -> Changes:
    """Return an arm without TrAct that starts with the first layer of a finished run."""
    return NO_TRACT | {"variant": "oracle", "donor": donor}


STEP_SIZE_ARMS = {
    **VANILLA,
    **first_rates(0.1, 0.2, 0.5, 3),
    "frozen first layer": NO_TRACT | {"variant": "frozen"},
    "TrAct": TRACT,
    "matched start": NO_TRACT | MATCHED,
    "matched start, TrAct": MATCHED,
    "TrAct, grafted": NO_TRACT | TRACT | {"variant": "grafted"},
    **eigen(1e-3, 1e-2, 1e-1),
    "first layer of vanilla": oracle(NO_TRACT),
    "first layer of TrAct": oracle(MATCHED),
    **SHORTER,
}

# Four patches an image and n = 768: a step has fewer patches than n.
FEW_PATCHES = {
    **VIT_SMALL,
    **CHOSEN_RATE,
    "batch_size": 32,
    "model_config": VIT_SMALL["model_config"] | {"patch_size": 16},
}
LONG = VIT_SMALL | CHOSEN_RATE | {"epochs": 60}
SMOKE_VALIDATION = {"validation_samples": 32}


EVIDENCE = {
    "evidence_rate": Experiment(
        "E0: the learning rate of vanilla, on the validation split",
        "cifar10_vit.yaml",
        {"": {}},
        {f"vanilla, lr {rate:g}": NO_TRACT | {"learning_rate": rate} for rate in (1e-3, 2e-3, 4e-3, 8e-3)},
        VIT_SMALL | VALIDATION,
        VIT_SMOKE | SMOKE_VALIDATION,
        small_seeds=2,
        first_seed=TUNING_SEED,
    ),
    "evidence_step_size": Experiment(
        "E0: is it more than a step size, and how much is there to gain?",
        "cifar10_vit.yaml",
        {"": {}},
        STEP_SIZE_ARMS,
        VIT_SMALL | CHOSEN_RATE,
        VIT_SMOKE,
        full_seeds=10,
        small_seeds=10,
        first_seed=FRESH_SEED,
        reference="TrAct",
    ),
    "evidence_few_patches": Experiment(
        "E2: fewer patches in a step than n",
        "cifar10_vit.yaml",
        {"": {}},
        VANILLA | tract(0.1, 0.8),
        FEW_PATCHES,
        VIT_SMOKE,
        first_seed=FRESH_SEED,
    ),
    "evidence_long": Experiment(
        "E2: four times as long",
        "cifar10_vit.yaml",
        {"": {}},
        VANILLA | tract(0.1),
        LONG,
        VIT_SMOKE,
        first_seed=FRESH_SEED,
    ),
}
