"""Lists E1 of docs/results/plan.md: what TrAct saves in time."""

from __future__ import annotations

from benchmarks.paper.choices import FINALISTS, final_runs, known
from benchmarks.paper.evidence import MATCHED, SMOKE_VALIDATION, TUNING_EPOCHS, TUNING_SEED, VALIDATION
from benchmarks.paper.experiment import Changes, Experiment
from benchmarks.paper.experiments import NO_TRACT, NORMS, VIT_SMALL, VIT_SMOKE

# The rates of vanilla, in half octaves above .001; TrAct has every second one. An edge extends its own data set's
# by a factor of two, such as range(12) or range(-2, 10).
STEPS = {"CIFAR-10": range(10), "flowers": range(10)}
FLOWERS_SMALL = VIT_SMALL | {
    "train_samples": 3800,
    "epochs": 60,
    "warmup_epochs": 4,
    "model_config": VIT_SMALL["model_config"] | {"patch_size": 8},
}
FLOWERS_VALIDATION = {"validation_samples": 672}
# The lengths of whole runs, in per cent of the longest: 5, 7, 10 and 15 epochs, and 20, 28, 40 and 60.
SHARES = (33, 47, 67, 100)
SEEDS = range(200, 208)


def tuning_arms(epochs: int, steps: range) -> dict[str, Changes]:
    """Return ten cells of each arm: ten rates, or five rates and two dampings."""
    rates = [1e-3 * 2 ** (step / 2) for step in steps]
    found: dict[str, Changes] = {}
    for rate in rates:
        cell = NO_TRACT | {"epochs": epochs, "learning_rate": rate}
        found[f"vanilla, lr {rate:.3g}"] = cell
        found[f"DualPatchNorm, lr {rate:.3g}"] = cell | NORMS["DualPatchNorm"]
    for rate in rates[::2]:
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
        tuning_arms(epochs, STEPS[data]),
        small,
        VIT_SMOKE | SMOKE_VALIDATION | {"image_size": 32, "crop_padding": 4},
        small_seeds=2,
        first_seed=TUNING_SEED,
        finalists=FINALISTS,
    )


TUNINGS = {
    "evidence_tuning_cifar10": tuning("CIFAR-10", "cifar10_vit.yaml", TUNING_EPOCHS, VIT_SMALL | VALIDATION),
    "evidence_tuning_flowers": tuning("flowers", "flowers_vit.yaml", 267, FLOWERS_SMALL | FLOWERS_VALIDATION),
}

FINAL = {
    "evidence_cifar10": final_runs(
        "E1: in time, CIFAR-10",
        "evidence_tuning_cifar10",
        TUNINGS["evidence_tuning_cifar10"],
        VIT_SMALL,
        SEEDS,
        SHARES,
    ),
    "evidence_flowers": final_runs(
        "E1: in time, flowers",
        "evidence_tuning_flowers",
        TUNINGS["evidence_tuning_flowers"],
        FLOWERS_SMALL,
        SEEDS,
        SHARES,
    ),
}
TIME_EVIDENCE = TUNINGS | known(FINAL)
