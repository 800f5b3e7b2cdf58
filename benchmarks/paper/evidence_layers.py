"""Lists E4 of docs/results/plan.md: TrAct in deeper layers."""

from __future__ import annotations

from benchmarks.paper.choices import FINALISTS, final_runs, known
from benchmarks.paper.evidence import SMOKE_VALIDATION, TUNING_EPOCHS, TUNING_SEED, VALIDATION
from benchmarks.paper.experiment import Changes, Experiment
from benchmarks.paper.experiments import NO_TRACT, RESNET_SMALL, RESNET_SMOKE, VIT_SMALL, VIT_SMOKE

# Deeper layers read features of any size, so lam is in units of their mean square.
RELATIVE = {"relative_lam": True}
VIT_LAYERS: dict[str, Changes] = {
    "first layer": RELATIVE,
    "and first block": RELATIVE | {"layers": ["vit.embeddings.*", "vit.layers.0.*"]},
    "all layers": RELATIVE | {"layers": ["*"]},
}
RESNET_LAYERS: dict[str, Changes] = {
    "first layer": RELATIVE,
    "and first stage": RELATIVE | {"layers": ["conv1", "layer1.*"]},
    "all layers": RELATIVE | {"layers": ["*"]},
}
VIT_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
# Under 16 bits TrAct computes its layers' gradients in float32, and vanilla would not. Half of the images, since a
# step takes 2.3 times as long as the ViT's, and 2.4 times that with all layers.
RESNET_FLOAT32 = RESNET_SMALL | {"mixed_precision": "no", "train_samples": 10_000}
# With SGD the gradient's length counts too, so the range is wide.
RESNET_RATES = (0.02, 0.04, 0.08, 0.16, 0.32, 0.64)
LAMS = (0.1, 1.0)
SEEDS = range(300, 305)
# The lengths of whole runs, in per cent of the longest: 5, 10 and 15 epochs.
SHARES = (33, 67, 100)
# The longest alone, since the ViT has shown no saving of time, which would be needed on both.
RESNET_SHARES = (100,)


def cells(layers: dict[str, Changes], rates: tuple[float, ...]) -> dict[str, Changes]:
    """Return each choice of layers at each rate and damping, and as many cells without TrAct."""
    shorter: Changes = {"epochs": TUNING_EPOCHS}
    found: dict[str, Changes] = {}
    for rate in rates:
        for between in (rate, rate * 2**0.5):
            found[f"vanilla, lr {between:.3g}"] = NO_TRACT | shorter | {"learning_rate": between}
    for name, arm in layers.items():
        for rate in rates:
            for lam in LAMS:
                found[f"{name}, {lam:g}, lr {rate:g}"] = arm | shorter | {"lam": lam, "learning_rate": rate}
    return found


def tuning(model: str, recipe: str, arms: dict[str, Changes], small: Changes, smoke: Changes) -> Experiment:
    """Return the choice of a cell for each arm."""
    return Experiment(
        f"E4: rates and dampings of deeper layers, {model}, on the validation split",
        recipe,
        {"": {}},
        arms,
        small | VALIDATION,
        smoke | SMOKE_VALIDATION,
        small_seeds=2,
        first_seed=TUNING_SEED,
        finalists=FINALISTS,
    )


TUNINGS = {
    "evidence_tuning_vit_layers": tuning(
        "ViT", "cifar10_vit.yaml", cells(VIT_LAYERS, VIT_RATES), VIT_SMALL, VIT_SMOKE
    ),
    "evidence_tuning_resnet_layers": tuning(
        "ResNet-18", "cifar10_resnet18.yaml", cells(RESNET_LAYERS, RESNET_RATES), RESNET_FLOAT32, RESNET_SMOKE
    ),
}
FINAL = {
    "evidence_vit_layers": final_runs(
        "E4: deeper layers, ViT",
        "evidence_tuning_vit_layers",
        TUNINGS["evidence_tuning_vit_layers"],
        VIT_SMALL,
        SEEDS,
        SHARES,
    ),
    "evidence_resnet_layers": final_runs(
        "E4: deeper layers, ResNet-18",
        "evidence_tuning_resnet_layers",
        TUNINGS["evidence_tuning_resnet_layers"],
        RESNET_FLOAT32,
        SEEDS,
        RESNET_SHARES,
    ),
}
LAYER_EVIDENCE = TUNINGS | known(FINAL)
