"""Lists the experiments beyond the paper: a whitened start and other rules, on two data sets, alone and together."""

from __future__ import annotations

from benchmarks.paper.experiment import Changes, Experiment
from benchmarks.paper.experiments import (
    NO_TRACT,
    NORMS,
    RESNET_SMALL,
    RESNET_SMOKE,
    STEM,
    VANILLA,
    VIT_SMALL,
    VIT_SMOKE,
    epochs,
    tract,
)


def rule(variant: str, lam: float = 0.1) -> Changes:
    """Return an arm by another rule than the paper's."""
    return NO_TRACT | {"variant": variant, "lam": lam}


MATCHED: Changes = {"whiten_init": True, "lam": 0.1}
WINNER = {"matched start, TrAct 0.1": MATCHED}
START = MATCHED | {"whiten_unscaled": True}
ALONE = {
    "relative": rule("relative"),
    "power 1/2": rule("power"),
    "center": rule("center"),
    "lam .8 to .1": rule("schedule_down", 0.8),
    "lam .1 to .8": rule("schedule_up"),
    "start alone": NO_TRACT | START,
}
TOGETHER = {
    "relative, center": rule("relative_center"),
    "start, TrAct 0.1": START,
    "start, power 1/2": rule("power") | START,
    "start, relative, center": rule("relative_center") | START,
    **WINNER,
}
LAMS = {f"matched start, TrAct {lam:g}": MATCHED | {"lam": lam} for lam in (0.2, 0.8)} | tract(0.8)
CROPS = {"in_memory": True, "color_jitter": 0.0, "epochs": 6}
CROPS_SMOKE = VIT_SMOKE | {"in_memory": True}
SGD = {"optimizer": "momentum"}
BF16 = {"mixed_precision": "bf16", "emulate_bf16": True}
VIT_SMALL_ANY_RATE = {name: value for name, value in VIT_SMALL.items() if name != "learning_rate"}


def rates(name: str, rates: tuple[float, ...], changes: Changes, epochs: int = 6) -> dict[str, Changes]:
    """Return a setting for each learning rate."""
    return {f"{name}, lr {rate:g}; {epochs} epochs": {**changes, "learning_rate": rate} for rate in rates}


BEYOND = {
    "beyond_crops_rate": Experiment(
        "Photo crops, ViT: the learning rate of the baseline",
        "photo_crops.yaml",
        rates("AdamW", (5e-4, 1e-3, 2e-3, 4e-3, 8e-3), {}) | rates("SGD", (1e-2, 3e-2, 6e-2, 0.12, 0.24), SGD),
        VANILLA,
        CROPS,
        CROPS_SMOKE,
        full_seeds=1,
    ),
    "beyond_crops": Experiment(
        "Photo crops, ViT: a whitened start and other rules",
        "photo_crops.yaml",
        rates("AdamW", (1e-3,), {}) | rates("SGD", (0.12,), SGD),
        VANILLA | tract(0.1) | ALONE | TOGETHER | LAMS | STEM,
        CROPS,
        CROPS_SMOKE,
        reference="TrAct 0.1",
        at_most={"matched start, TrAct 0.2": 1},
    ),
    "beyond_vit": Experiment(
        "CIFAR-10, ViT: a whitened start and other rules",
        "cifar10_vit.yaml",
        epochs(e100=1e-3),
        VANILLA | tract(0.1) | ALONE | TOGETHER | LAMS | STEM,
        VIT_SMALL,
        VIT_SMOKE,
        reference="TrAct 0.1",
        at_most=dict.fromkeys((ALONE | TOGETHER | LAMS).keys() - WINNER.keys(), 1)
        | {"start, relative, center": 2}
        | dict.fromkeys(("center", "start, TrAct 0.1", "TrAct 0.8", "matched start, TrAct 0.8"), 3)
        | {"vanilla": 5, "whitening stem": 5},
    ),
    "beyond_vit_rates": Experiment(
        "CIFAR-10, ViT: each arm at other learning rates",
        "cifar10_vit.yaml",
        rates("Adam", (2e-3, 4e-3), {}, 100),
        VANILLA | tract(0.1) | WINNER,
        VIT_SMALL_ANY_RATE,
        VIT_SMOKE,
        reference="TrAct 0.1",
    ),
    "beyond_resnet": Experiment(
        "CIFAR-10, ResNet-18, SGD: a whitened start",
        "cifar10_resnet18.yaml",
        epochs(e100=0.08),
        VANILLA | tract(0.1) | WINNER,
        RESNET_SMALL,
        RESNET_SMOKE,
        reference="TrAct 0.1",
    ),
    "bf16": Experiment(
        "CIFAR-10, ViT: what 16-bit autocast costs",
        "cifar10_vit.yaml",
        epochs(e100=1e-3),
        {
            "float32": NO_TRACT,
            "float32, TrAct 0.1": {"lam": 0.1},
            "bf16": NO_TRACT | BF16,
            "bf16, TrAct 0.1": BF16 | {"lam": 0.1},
            "bf16, TrAct 0.1 of the rounded gradient": BF16 | {"lam": 0.1, "variant": "rounded"},
        },
        VIT_SMALL | {"epochs": 4, "train_samples": 3000, "test_samples": 2000},
        VIT_SMOKE,
    ),
    "beyond_rates": Experiment(
        "Photo crops, ViT: each arm at three learning rates",
        "photo_crops.yaml",
        rates("AdamW", (5e-4, 1e-3, 2e-3), {}) | rates("SGD", (0.03, 0.06, 0.12), SGD),
        VANILLA | tract(0.1) | WINNER,
        CROPS,
        CROPS_SMOKE,
        reference="TrAct 0.1",
    ),
    "beyond_range": Experiment(
        "Photo crops, ViT: pixels that are not standardised",
        "photo_crops.yaml",
        {
            f"{label}; 6 epochs": {"mean": [0.0] * 3, "std": [std] * 3}
            for label, std in {"[0, 1]": 1.0, "[0, 255]": 1 / 255}.items()
        },
        VANILLA
        | tract(0.1)
        | {
            **{name: (ALONE | TOGETHER)[name] for name in ("relative", "relative, center")},
            **WINNER,
            "matched start, relative, center": rule("relative_center") | MATCHED,
        }
        | STEM
        | NORMS,
        CROPS,
        CROPS_SMOKE,
        reference="TrAct 0.1",
    ),
    "lam_units": Experiment(
        "Photo crops, ViT: should lam be in units of the mean eigenvalue of C?",
        "photo_crops.yaml",
        {
            "mean 0.5, std 0.5; 6 epochs": {"mean": [0.5] * 3, "std": [0.5] * 3},
            "reflectance (0 to 0.3); 6 epochs": {"mean": [0.0] * 3, "std": [1 / 0.3] * 3},
        },
        VANILLA | tract(0.1) | {"lam 0.1 tr(C) / n": rule("relative")},
        CROPS,
        CROPS_SMOKE,
        reference="TrAct 0.1",
    ),
}
