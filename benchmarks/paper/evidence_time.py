"""Lists E1 of docs/results/plan.md: what TrAct saves in time."""

from __future__ import annotations

import dataclasses
import math

from benchmarks.paper.beyond import MATCHED
from benchmarks.paper.choices import FINALISTS, final_runs, known, name_at, read
from benchmarks.paper.evidence import SMOKE_VALIDATION, TUNING_EPOCHS, TUNING_SEED, VALIDATION
from benchmarks.paper.experiment import Changes, Experiment
from benchmarks.paper.experiments import NO_TRACT, NORMS, VIT_SMALL, VIT_SMOKE

# The rates of vanilla, in half octaves above .001; TrAct has every second one. An edge extends its own data set's
# by a factor of two, such as range(12) or range(-2, 10).
STEPS = {"CIFAR-10": range(10), "flowers": range(12)}
LOWEST = 1e-3
# The same around vanilla's chosen rate, for its longest runs.
GOAL_STEPS = {"CIFAR-10": range(-2, 3), "flowers": range(-2, 3)}
VANILLA = "vanilla"
# Vanilla's shorter runs at the rate of its longest, where that is not its usual rate.
AT_GOALS_RATE = "vanilla at its rate for the longest"
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


def rate_at(step: int) -> float:
    """Return a rate of the grid."""
    return LOWEST * 2 ** (step / 2)


def tuning_arms(epochs: int, steps: range) -> dict[str, Changes]:
    """Return as many cells of each arm: rates, or half as many rates and two dampings."""
    rates = list(map(rate_at, steps))
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
        f"E1: {len(STEPS[data])} cells of each arm, {data}, on the validation split",
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


def goal(data: str, name: str, small: Changes) -> Experiment | None:
    """Return the choice of vanilla's rate for its longest runs, which set the goal; None before E1's choice."""
    tuned = TUNINGS[name]
    chosen = tuned.arms.get(read().get(name, {}).get(VANILLA, ""))
    if not chosen:
        return None
    middle = round(2 * math.log2(chosen["learning_rate"] / LOWEST))
    arms = {}
    for step in GOAL_STEPS[data]:
        rate = rate_at(middle + step)
        arms[f"vanilla, lr {rate:.3g}"] = NO_TRACT | {"learning_rate": rate}
    return Experiment(
        f"E1: vanilla's rate for the longest runs, {data}, on the validation split",
        tuned.recipe,
        {"": {}},
        arms,
        small,
        tuned.smoke,
        small_seeds=2,
        first_seed=TUNING_SEED,
        # Both seeds try all of them.
        finalists=len(arms),
    )


GOALS = {
    "evidence_goal_cifar10": goal("CIFAR-10", "evidence_tuning_cifar10", VIT_SMALL | VALIDATION),
    "evidence_goal_flowers": goal("flowers", "evidence_tuning_flowers", FLOWERS_SMALL | FLOWERS_VALIDATION),
}


def final(data: str, name: str, goal_name: str, small: Changes) -> Experiment | None:
    """Return E1's final runs; None before both choices are made."""
    goal_choice = GOALS[goal_name]
    cell = read().get(goal_name, {}).get(VANILLA, "")
    if not goal_choice or cell not in goal_choice.arms:
        return None
    made = final_runs(f"E1: in time, {data}", name, TUNINGS[name], small, SEEDS, SHARES)
    if made is None:
        return None
    arms = dict(made.arms)
    changes = goal_choice.arms[cell]
    longest = name_at(VANILLA, SHARES[-1])
    if arms[longest]["learning_rate"] != changes["learning_rate"]:
        for share in reversed(SHARES[:-1]):
            arms[name_at(AT_GOALS_RATE, share)] = arms[name_at(VANILLA, share)] | changes
        arms[longest] = arms[longest] | changes
    return dataclasses.replace(made, arms=arms)


FINAL = {
    "evidence_cifar10": final("CIFAR-10", "evidence_tuning_cifar10", "evidence_goal_cifar10", VIT_SMALL),
    "evidence_flowers": final("flowers", "evidence_tuning_flowers", "evidence_goal_flowers", FLOWERS_SMALL),
}
TIME_EVIDENCE = TUNINGS | known(GOALS) | known(FINAL)
