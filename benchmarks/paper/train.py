"""Trains one arm of one experiment from one seed; `python -m benchmarks.paper run` calls it.

    python -m benchmarks.paper.train --recipe RECIPE.yaml --output_dir FOLDER --variant patch_norm --no_tract

What is trained and how stands in the recipe. A run that was killed goes on after its last whole epoch.
"""

import argparse
import contextlib
import json
from pathlib import Path

from accelerate import PartialState

from benchmarks.common.records import environment
from benchmarks.paper.arms import VARIANTS, maker
from benchmarks.paper.emulated_bf16 import EmulatedBF16
from benchmarks.paper.optimizers import optimizer_maker
from benchmarks.paper.relative_damping import relative_damping
from benchmarks.training.loop import Options, train
from benchmarks.training.models import save_model
from benchmarks.training.recipe import read_recipe

# The file that a run leaves in its folder.
RUN_FILE = "run.json"


def main() -> None:
    """Train, and leave the figures."""
    args = parse()
    recipe = read_recipe(args.recipe)
    # Before the training, during which somebody may commit.
    about = environment()
    options = Options(args.output_dir, not args.no_tract, args.num_workers, args.layers or "auto")
    make_optimizer = optimizer_maker(args.variant, args.first_learning_rate, args.first_rate)
    with contextlib.ExitStack() as changes:
        if args.emulate_bf16:
            changes.enter_context(EmulatedBF16())
        if args.relative_lam:
            changes.enter_context(relative_damping())
        trained = train(recipe, options, maker(args.variant, args.donor), make_optimizer)
    if not PartialState().is_main_process:
        return
    if args.save_model:
        save_model(trained.model, args.output_dir / "model", trained.look)
    figures = dict(trained.figures)
    seconds = figures.pop("seconds")
    row = {"curve": figures, "seconds": seconds, "data": trained.data, **about}
    (args.output_dir / RUN_FILE).write_text(json.dumps(row), encoding="utf-8")


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--recipe", type=Path, required=True, help="a YAML file, as in benchmarks/training/recipes")
    add("--output_dir", type=Path, required=True, help="for checkpoints and figures")
    add("--no_tract", action="store_true", help="train without TrAct")
    add("--variant", choices=VARIANTS, default="none", help="of the first layer (default: none)")
    add("--first_learning_rate", type=float, default=0.08, help="of the first layer, for sgd_first (default: 0.08)")
    add("--first_rate", type=float, default=1.0, help="the first layer's learning rate over the others' (default: 1)")
    add("--layers", nargs="+", help="names or patterns of the layers that get TrAct (default: the first)")
    add("--relative_lam", action="store_true", help="take lam in units of the mean square of what a layer reads")
    add("--donor", type=Path, help="folder of a model whose first layer is the start, for oracle")
    add("--emulate_bf16", action="store_true", help="compute bfloat16 products in float32, on a slow CPU")
    add("--num_workers", type=int, default=0, help="processes that read images (default: 0)")
    add("--save_model", action="store_true", help="save the model, for a run that goes on from it")
    return parser.parse_args()


if __name__ == "__main__":
    main()
