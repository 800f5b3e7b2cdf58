"""One run of one arm of the paper's experiments: examples/pretrain_vit.py with what the paper compares TrAct with.

    python benchmarks/paper/train.py --recipe examples/recipes/cifar10_vit.yaml --variant patch_norm --no_tract

The options are those of pretrain_vit.py and two more. `python benchmarks/paper run` calls it.
"""

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState

from benchmarks.common.records import PACKAGES, RAN_ON
from benchmarks.paper.arms import VARIANTS, maker, optimizer_maker
from benchmarks.paper.emulated_bf16 import EmulatedBF16
from benchmarks.training.loop import train
from benchmarks.training.models import save_model
from benchmarks.training.recipe import parse
from hf_tract.integrations import provenance


@dataclass
class Arm:
    """What is done about the first layer beside TrAct or in its place."""

    variant: str = field(default="none", metadata={"help": "of the first layer", "choices": VARIANTS})
    emulate_bf16: bool = field(default=False, metadata={"help": "for a CPU without instructions for bfloat16"})
    first_learning_rate: float = field(default=0.08, metadata={"help": "of the first layer, for sgd_first"})


def main() -> None:
    """Runs it."""
    recipe, run, arm = parse(Arm)
    with EmulatedBF16() if arm.emulate_bf16 else contextlib.nullcontext():
        trained = train(recipe, run, maker(arm.variant), optimizer_maker(arm.variant, arm.first_learning_rate))
    if not PartialState().is_main_process:
        return
    ran_on = {"versions": provenance.versions(PACKAGES), "hardware": provenance.hardware()}
    Path(run.output_dir, RAN_ON).write_text(json.dumps(ran_on), encoding="utf-8")
    loadable = arm.variant in ("none", "sgd_first", "rounded") and not recipe.model.startswith("cifar_")
    if loadable:  # for what continues from it
        save_model(trained.model, Path(run.output_dir) / "model", trained.look, trained.splits.names)


if __name__ == "__main__":
    main()
