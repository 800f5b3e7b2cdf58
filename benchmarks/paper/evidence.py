"""Lists the experiments of docs/results/plan.md: is it more than a step size, and what does it save in time."""

from __future__ import annotations

from benchmarks.paper.experiment import Changes, Experiment
from benchmarks.paper.experiments import NO_TRACT, NORMS, VANILLA, VIT_SMALL, VIT_SMOKE, tract

# Seeds below 100 have been looked at, or chose something.
TUNING_SEED = 50
FRESH_SEED = 100
VALIDATION = {"validation_samples": 5000}
# Vanilla's best of four on the validation rows (evidence_rate), by seeds 50 and 51.
CHOSEN_RATE = {"learning_rate": 2e-3}
MATCHED: Changes = {"whiten_init": True, "lam": 0.1}
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

RATES = [1e-3 * 2 ** (step / 2) for step in range(10)]
FLOWERS_SMALL = VIT_SMALL | {
    "train_samples": 3800,
    "epochs": 60,
    "warmup_epochs": 4,
    "model_config": VIT_SMALL["model_config"] | {"patch_size": 8},
}
# Four patches an image and n = 768: a step has fewer patches than n.
FEW_PATCHES = {
    **VIT_SMALL,
    **CHOSEN_RATE,
    "batch_size": 32,
    "model_config": VIT_SMALL["model_config"] | {"patch_size": 16},
}
LONG = VIT_SMALL | CHOSEN_RATE | {"epochs": 60}
FLOWERS_VALIDATION = {"validation_samples": 672}
SMOKE_VALIDATION = {"validation_samples": 32}


def tuning_arms(epochs: int) -> dict[str, Changes]:
    """Return ten cells of each arm: ten rates, or five rates and two dampings."""
    found: dict[str, Changes] = {}
    for rate in RATES:
        cell = NO_TRACT | {"epochs": epochs, "learning_rate": rate}
        found[f"vanilla, lr {rate:.3g}"] = cell
        found[f"DualPatchNorm, lr {rate:.3g}"] = cell | NORMS["DualPatchNorm"]
    for rate in RATES[::2]:
        for lam in (0.1, 0.8):
            cell = {"epochs": epochs, "learning_rate": rate, "lam": lam}
            found[f"TrAct {lam}, lr {rate:.3g}"] = cell
            found[f"matched start, TrAct {lam}, lr {rate:.3g}"] = MATCHED | cell
    return found


def tuning(data: str, recipe: str, epochs: int, small: Changes) -> Experiment:
    """Return E1's choice of a cell for each arm."""
    return Experiment(
        f"E1: ten cells of each arm, {data}, on the validation split",
        recipe,
        {"": {}},
        tuning_arms(epochs),
        small,
        VIT_SMOKE | SMOKE_VALIDATION,
        small_seeds=1,
        first_seed=TUNING_SEED,
    )


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
    "evidence_tuning_cifar10": tuning("CIFAR-10", "cifar10_vit.yaml", 67, VIT_SMALL | VALIDATION),
    "evidence_tuning_flowers": tuning("flowers", "flowers_vit.yaml", 267, FLOWERS_SMALL | FLOWERS_VALIDATION),
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
