"""Lists every experiment of the paper that trains a classifier: recipe, settings, arms, and how it shrinks."""

from typing import Any

from benchmarks.paper.experiment import Changes, Experiment

VANILLA: dict[str, Changes] = {"vanilla": {"no_tract": True}}
NO_TRACT = {"no_tract": True}
NORMS = {
    "PatchNorm": NO_TRACT | {"variant": "patch_norm"},
    "DualPatchNorm": NO_TRACT | {"variant": "dual_patch_norm"},
}
STEM = {"whitening stem": NO_TRACT | {"variant": "whitening"}}


def tract(*lams: float) -> dict[str, Changes]:
    """Return arms of these dampings."""
    return {f"TrAct {lam:g}": {"lam": lam} for lam in lams}


def epochs(**by_number: float) -> dict[str, Changes]:
    """Return a setting for each of e100=1e-3, ...: that many epochs at that learning rate."""
    return {
        f"{name[1:]} epochs": {"epochs": int(name[1:]), "learning_rate": float(rate)}
        for name, rate in by_number.items()
    }


TINY = {
    "dataset": "photo_crops",
    "label_column": None,
    "train_samples": 96,
    "test_samples": 64,
    "epochs": 2,
    "batch_size": 32,
    "warmup_epochs": 0,
    "learning_rate": 1e-3,
}
SMALL = {"train_samples": 20_000, "epochs": 15}
# Otherwise half of the time would go into the images.
IN_MEMORY = SMALL | {"in_memory": True, "auto_augment": None}
VIT_SMALL: Changes = IN_MEMORY | {
    "warmup_epochs": 1,
    "learning_rate": 4e-3,
    "model_config": {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 96,
        "patch_size": 4,
    },
}
VIT_SMOKE = TINY | {
    "model_config": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "patch_size": 4,
    },
}
RESNET_SMALL = IN_MEMORY | {
    "mixed_precision": "bf16",
    "channels_last": True,
    "model_config": {"channels": [16, 32, 64, 128]},
}
ADAM_SMALL = RESNET_SMALL | {"learning_rate": 1e-2}
RESNET_SMOKE = TINY | {"model_config": {"channels": [4, 4, 8, 8]}}
MULTISTEP_SMOKE = RESNET_SMOKE | {"decay_milestones": [1], "mixed_precision": "no"}
DEIT_SMOKE = TINY | {
    "image_size": 32,
    "mixed_precision": "no",
    "model_config": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
}

VIT_EPOCHS = epochs(e100=1e-3, e200=10**-3.2, e400=10**-3.5, e800=10**-3.5)
ADAM_EPOCHS = {
    name: {**values, "optimizer": "adam"}
    for name, values in epochs(e100=1e-2, e200=1e-2, e400=1e-3, e800=1e-3).items()
}
LEARNING_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
LAMBDAS = (0.05, 0.1, 0.2)
SWEEP = (0.00625, 0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)


def cifar100(name: str, **config: Any) -> Changes:
    """Return the setting of one of the 36 models that timm has, with the stem of a small image."""
    return {"model": f"cifar_{name}", "model_config": config}


CIFAR100 = {
    "DenseNet121": cifar100("densenet121"),
    "DenseNet161": cifar100("densenet161"),
    "DenseNet201": cifar100("densenet201"),
    **{f"ResNet{depth}": cifar100(f"resnet{depth}") for depth in (18, 34, 50, 101, 152)},
    "ResNeXt50": cifar100("resnext50_32x4d"),
    "ResNeXt101": cifar100("resnext101_32x4d"),
    "ResNeXt152": cifar100("resnet152", cardinality=32, base_width=4),
    **{f"SE-ResNet{depth}": cifar100(f"seresnet{depth}") for depth in (18, 34, 50, 101, 152)},
    **{f"StochD-RN-{depth}": cifar100(f"resnet{depth}", drop_path_rate=0.5) for depth in (18, 34, 50, 101)},
}
# The milestones of 200 epochs, in proportion.
SHORT = {"epochs": 133, "decay_milestones": [40, 80, 107]}

EXPERIMENTS = {
    "cifar10_resnet18_sgd": Experiment(
        "CIFAR-10, ResNet-18, SGD (figure 3)",
        "cifar10_resnet18.yaml",
        epochs(e100=0.08, e200=0.08, e400=0.08, e800=0.08),
        VANILLA | tract(*LAMBDAS),
        RESNET_SMALL,
        RESNET_SMOKE,
        left_out=("TrAct 0.05", "TrAct 0.2"),
    ),
    "cifar10_resnet18_adam": Experiment(
        "CIFAR-10, ResNet-18, Adam (figure 3)",
        "cifar10_resnet18.yaml",
        ADAM_EPOCHS,
        VANILLA | tract(*LAMBDAS),
        ADAM_SMALL,
        RESNET_SMOKE,
    ),
    "cifar10_vit": Experiment(
        "CIFAR-10, ViT (figure 4)", "cifar10_vit.yaml", VIT_EPOCHS, VANILLA | tract(*LAMBDAS), VIT_SMALL, VIT_SMOKE
    ),
    "learning_rate": Experiment(
        "CIFAR-10, ViT: is the baseline's learning rate the best for it?",
        "cifar10_vit.yaml",
        VIT_EPOCHS,
        {f"vanilla, lr {rate:g}": NO_TRACT | {"learning_rate": rate} for rate in LEARNING_RATES},
        VIT_SMALL,
        VIT_SMOKE,
        full_seeds=1,
    ),
    "speed_up": Experiment(
        "CIFAR-10, ViT: TrAct in 4/5 and 2/3 of the epochs",
        "cifar10_vit.yaml",
        epochs(e200=10**-3.2),
        VANILLA
        | {
            "TrAct 0.1 in 4/5": {"lam": 0.1, "epochs": 160},
            "TrAct 0.1 in 2/3": {"lam": 0.1, "epochs": 133},
        },
        VIT_SMALL,
        VIT_SMOKE,
        left_out=("TrAct 0.1 in 4/5",),
    ),
    "lambda_sweep": Experiment(
        "CIFAR-10, ViT: lambda (figure 6)",
        "cifar10_vit.yaml",
        epochs(e200=10**-3.2),
        VANILLA | tract(*SWEEP),
        VIT_SMALL,
        VIT_SMOKE,
        left_out=("TrAct 0.0125", "TrAct 0.025", "TrAct 0.4", "TrAct 0.8"),
    ),
    "patch_norm": Experiment(
        "CIFAR-10, ViT: PatchNorm and DualPatchNorm (figure 7)",
        "cifar10_vit.yaml",
        VIT_EPOCHS,
        VANILLA | tract(0.1) | NORMS,
        VIT_SMALL,
        VIT_SMOKE,
    ),
    "input_range": Experiment(
        "CIFAR-10, ViT: pixels that are not standardised (figure 8)",
        "cifar10_vit.yaml",
        {
            f"{label}; {name}": {**changes, **scaling}
            for name, changes in VIT_EPOCHS.items()
            for label, scaling in {
                "standardised": {},
                "[0, 1]": {"mean": [0.0] * 3, "std": [1.0] * 3},
                "[0, 255]": {"mean": [0.0] * 3, "std": [1 / 255] * 3},
            }.items()
        },
        VANILLA | tract(0.1),
        VIT_SMALL,
        VIT_SMOKE,
    ),
    "sgd_first_layer": Experiment(
        "CIFAR-10, ResNet-18: SGD for the first layer, Adam for the rest (figure 9)",
        "cifar10_resnet18.yaml",
        ADAM_EPOCHS,
        {
            "Adam": NO_TRACT,
            "SGD first": NO_TRACT | {"variant": "sgd_first"},
            "SGD first, TrAct 0.1": {"lam": 0.1, "variant": "sgd_first"},
        },
        ADAM_SMALL,
        RESNET_SMOKE,
    ),
    "baselines": Experiment(
        "CIFAR-10, ViT: a frozen whitening stem, and the paper's package",
        "cifar10_vit.yaml",
        VIT_EPOCHS,
        VANILLA | tract(0.1) | STEM | {"torch_tract 0.1": NO_TRACT | {"variant": "torch_tract", "lam": 0.1}},
        VIT_SMALL,
        VIT_SMOKE,
        at_most={"torch_tract 0.1": 1},
    ),
    "cifar100": Experiment(
        "CIFAR-100 (tables 1, 6 and 7)",
        "cifar100.yaml",
        CIFAR100,
        VANILLA | tract(0.1) | {"TrAct 0.1, 133 epochs": {"lam": 0.1, **SHORT}},
        SMALL | {"decay_milestones": [4, 9, 12]},
        MULTISTEP_SMOKE,
        few=("ResNet18", "StochD-RN-18"),
    ),
    "imagenet_resnet": Experiment(
        "ImageNet, ResNet (table 2; ResNet-18 and 34 by the same recipe)",
        "imagenet_resnet50.yaml",
        {
            f"ResNet-{depth}; {count} epochs": {
                "model": f"resnet{depth}",
                "epochs": count,
                "learning_rate": rate,
                "decay_milestones": [count // 3, 2 * count // 3],
            }
            for depth in (50, 34, 18)
            for count, rate in {30: 0.141, 60: 0.1, 90: 0.1}.items()
        },
        VANILLA | tract(0.1),
        SMALL | {"learning_rate": 0.1, "decay_milestones": [5, 10]},
        MULTISTEP_SMOKE,
        full_seeds=1,
        few=("ResNet-50; 30 epochs",),
    ),
    "imagenet_deit3": Experiment(
        "ImageNet, DeiT-III (table 3)",
        "deit3_small.yaml",
        {
            "ViT-S; 400 epochs": {},
            "ViT-S, long; 800 epochs": {"epochs": 800, "lam": 0.2},
            "ViT-B; 400 epochs": {
                "model": "deit3_base_patch16_224",
                "model_config": {"drop_path_rate": 0.2},
                "learning_rate": 3e-3,
            },
        },
        VANILLA | {"TrAct": {}},
        SMALL | {"warmup_epochs": 1},
        DEIT_SMOKE,
        full_seeds=1,
        few=("ViT-S; 400 epochs",),
        then="deit3_finetune.yaml",
    ),
}
