"""What goes beyond the paper, as experiments: a whitened start and other rules, on two data sets, alone and together."""

from __future__ import annotations

from experiments import (
    EXPERIMENTS,
    NO_TRACT,
    RESNET_SMALL,
    RESNET_SMOKE,
    VANILLA,
    VIT_SMALL,
    VIT_SMOKE,
    Changes,
    Experiment,
    epochs,
    tract,
)


def rule(variant: str) -> Changes:
    """An arm by another rule than the paper's."""
    return NO_TRACT | {"variant": variant, "lam": 0.1}


START = {"whiten_init": True, "lam": 0.1}
MATCHED = START | {"whiten_match_scale": True}
ALONE = {
    "relative": rule("relative"),
    "power 1/2": rule("power"),
    "center": rule("center"),
    "start alone": NO_TRACT | START,
}
TOGETHER = {
    "relative, center": rule("relative_center"),
    "start, TrAct 0.1": START,
    "start, power 1/2": rule("power") | START,
    "start, relative, center": rule("relative_center") | START,
    "matched start, TrAct 0.1": MATCHED,
}
CROPS = {"in_memory": True, "color_jitter": 0.0, "epochs": 6}
CROPS_SMOKE = VIT_SMOKE | {"in_memory": True}

BEYOND = {
    "beyond_crops": Experiment(
        "Photo crops, ViT: a whitened start and other rules", "photo_crops.yaml",
        {"AdamW; 6 epochs": {}, "SGD; 6 epochs": {"optimizer": "momentum", "learning_rate": 3e-2}},
        VANILLA | tract(0.1) | ALONE | TOGETHER, CROPS, CROPS_SMOKE,
    ),
    "beyond_vit": Experiment(
        "CIFAR-10, ViT: a whitened start and other rules", "cifar10_vit.yaml", epochs(e100=1e-3),
        VANILLA | tract(0.1) | ALONE | TOGETHER, VIT_SMALL, VIT_SMOKE,
    ),
    "beyond_resnet": Experiment(
        "CIFAR-10, ResNet-18, SGD: a whitened start and other rules", "cifar10_resnet18.yaml", epochs(e100=0.08),
        VANILLA | tract(0.1) | {name: TOGETHER[name] for name in ("start, TrAct 0.1",)}, RESNET_SMALL, RESNET_SMOKE,
    ),
}  # fmt: skip
ALL = EXPERIMENTS | BEYOND
