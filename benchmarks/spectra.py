"""Trains a PatchTST on Raman spectra with and without TrAct: pixels that are no image's, E6 of docs/results/plan.md.

    uv run --group bench python -m benchmarks.spectra --tune    # vanilla at each rate, on the validation blocks
    uv run --group bench python -m benchmarks.spectra           # all arms at the chosen rate, on the test blocks

Both add runs to --results. The spectra are those of chemotools: one fermentation, a spectrum every 1.25 minutes, and
what five concentrations were at 34 times, between which they are interpolated. An error is the root of the mean square
over spectra and targets, in units of the targets' deviations.
"""

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from chemotools.datasets import load_fermentation_test
from rich.progress import track
from sklearn.cross_decomposition import PLSRegression
from transformers import (
    PatchTSTConfig,
    PatchTSTForRegression,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from benchmarks import ROOT
from benchmarks.common.options import new_parser
from benchmarks.common.records import RunRecord, add_record, command, environment, key_of, read_records
from hf_tract import whiten_first_layer
from hf_tract.integrations import TrActCallback

RESULTS = ROOT / "docs" / "results" / "spectra.jsonl"
# Spectra of a block, and what every fifth block is for.
BLOCK = 30
PARTS = {"train": (0, 2, 4), "validation": (1,), "test": (3,)}
VANILLA = "vanilla"
PLS = "partial least squares"
ARMS: dict[str, dict[str, bool]] = {
    VANILLA: {},
    "TrAct": {"tract": True},
    "matched start": {"whiten": True},
    "matched start, TrAct": {"tract": True, "whiten": True},
}
LAM = 0.1
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
# Vanilla's best of RATES on the validation blocks; None until it is chosen.
CHOSEN_RATE: float | None = 4e-3
TUNING_SEEDS = (50, 51, 52)
FIRST_SEED = 100
EPOCHS = 40
BATCH = 32
CLIP = 0.0
MOST_COMPONENTS = 30
MODEL: dict[str, Any] = {
    "d_model": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "ffn_dim": 96,
    "patch_length": 16,
}


class Part(NamedTuple):
    """Holds spectra (N, wavelengths) and concentrations (N, targets), both standardised."""

    spectra: np.ndarray
    targets: np.ndarray


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Gives a part's rows as PatchTST wants them."""

    def __init__(self, part: Part) -> None:
        self.spectra = torch.tensor(part.spectra, dtype=torch.float32)[..., None]
        self.targets = torch.tensor(part.targets, dtype=torch.float32)

    def __len__(self) -> int:
        return len(self.spectra)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"past_values": self.spectra[index], "target_values": self.targets[index]}


class Clock(TrainerCallback):
    """Measures the process time of training until the end of each epoch, without the tests between."""

    def __init__(self, before: float) -> None:
        self.total = before
        self.begin = 0.0
        self.seconds: list[float] = []

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start."""
        self.begin = time.process_time()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """Add an epoch."""
        self.total += time.process_time() - self.begin
        self.seconds.append(round(self.total, 3))


def main() -> None:
    """Run what is not stored yet."""
    args = parse()
    if CHOSEN_RATE is None and not args.tune:
        raise SystemExit("The rate is not chosen yet: run --tune, and set CHOSEN_RATE to the best.")
    # Process time counts threads that wait for each other.
    torch.set_num_threads(1)
    parts = load_parts()
    have = read_records(args.results)
    for arm, settings, seed in track(wanted(args), "runs"):
        key = key_of("spectra", arm, settings, seed)
        if key in have:
            continue
        if arm == PLS:
            curve, seconds = fit_pls(parts)
        else:
            curve, seconds = train(arm, settings, seed, parts)
        add_record(args.results, RunRecord(key, arm, settings, seed, curve, seconds, "", command(), **environment()))


def wanted(args: argparse.Namespace) -> list[tuple[str, dict[str, Any], int]]:
    """List arms, settings and seeds of the runs."""
    runs: list[tuple[str, dict[str, Any], int]] = []
    if args.tune:
        for seed in TUNING_SEEDS:
            for rate in RATES:
                runs.append((VANILLA, settings_of(rate, args.epochs, "validation"), seed))
        return runs
    assert CHOSEN_RATE is not None
    settings = settings_of(CHOSEN_RATE, args.epochs, "test")
    for seed in range(FIRST_SEED, FIRST_SEED + args.seeds):
        for arm in ARMS:
            runs.append((arm, settings, seed))
    runs.append((PLS, {"part": "test"}, 0))
    return runs


def settings_of(rate: float, epochs: int, part: str) -> dict[str, Any]:
    """Return what tells runs apart beside arm and seed."""
    return {"rate": rate, "epochs": epochs, "part": part, "clip": CLIP}


def load_parts() -> dict[str, Part]:
    """Return the spectra for training, for choices, and for testing, in blocks of time that alternate."""
    frame, measured = load_fermentation_test()
    spectra = frame.to_numpy(dtype=np.float64)
    hours = np.linspace(0, measured["time"].iloc[-1], len(spectra))
    columns = []
    for name in measured.columns[1:]:
        columns.append(np.interp(hours, measured["time"], measured[name]))
    targets = np.stack(columns, axis=1)
    place = np.arange(len(spectra)) // BLOCK % 5
    train = np.isin(place, PARTS["train"])
    spectra = (spectra - spectra[train].mean()) / spectra[train].std()
    targets = (targets - targets[train].mean(0)) / targets[train].std(0)
    parts = {}
    for name, blocks in PARTS.items():
        chosen = np.isin(place, blocks)
        parts[name] = Part(spectra[chosen], targets[chosen])
    return parts


def train(
    arm: str, settings: Mapping[str, Any], seed: int, parts: Mapping[str, Part]
) -> tuple[dict[str, list[float]], list[float]]:
    """Return an arm's error and the seconds of training, both after each epoch."""
    set_seed(seed)
    rows = Rows(parts["train"])
    model = new_model(rows)
    start = time.process_time()
    if ARMS[arm].get("whiten"):
        whiten_first_layer(model, {"past_values": rows.spectra}, LAM)
    clock = Clock(time.process_time() - start)
    callbacks: list[TrainerCallback] = [clock]
    if ARMS[arm].get("tract"):
        callbacks.append(TrActCallback(lam=LAM))
    trainer = Trainer(
        model,
        training_arguments(settings, seed),
        train_dataset=rows,
        eval_dataset=Rows(parts[settings["part"]]),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    errors = []
    for entry in trainer.state.log_history:
        if "eval_loss" in entry:
            errors.append(entry["eval_loss"] ** 0.5)
    return {"error": errors}, clock.seconds


def new_model(rows: Rows) -> PatchTSTForRegression:
    """Return a PatchTST of random weights for these rows."""
    config = PatchTSTConfig(
        num_input_channels=1,
        context_length=rows.spectra.shape[1],
        num_targets=rows.targets.shape[1],
        patch_stride=MODEL["patch_length"],
        scaling=None,
        loss="mse",
        **MODEL,
    )
    return PatchTSTForRegression(config)


def training_arguments(settings: Mapping[str, Any], seed: int) -> TrainingArguments:
    """Return what Trainer is told of a run."""
    return TrainingArguments(
        output_dir="outputs/spectra",
        num_train_epochs=settings["epochs"],
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=8 * BATCH,
        learning_rate=settings["rate"],
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        # Trainer's 1.0 would clip arms with TrAct by another gradient.
        max_grad_norm=CLIP,
        label_names=["target_values"],
        eval_strategy="epoch",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=seed,
    )


def fit_pls(parts: Mapping[str, Part]) -> tuple[dict[str, list[float]], list[float]]:
    """Return the test error of partial least squares, whose number of components the validation blocks choose."""
    start = time.process_time()
    errors = []
    for count in range(1, MOST_COMPONENTS + 1):
        errors.append(_pls_error(count, parts, "validation"))
    best = int(np.argmin(errors)) + 1
    error = _pls_error(best, parts, "test")
    return {"error": [error], "components": [best]}, [round(time.process_time() - start, 3)]


def _pls_error(components: int, parts: Mapping[str, Part], tested: str) -> float:
    fitted = PLSRegression(components, scale=False).fit(*parts["train"])
    wrong = fitted.predict(parts[tested].spectra) - parts[tested].targets
    return float(np.sqrt(np.mean(wrong**2)))


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--tune", action="store_true", help="run vanilla at each rate, tested on the validation blocks")
    add("--epochs", type=int, default=EPOCHS, help="of each run")
    add("--seeds", type=int, default=8, help=f"seeds {FIRST_SEED} and up")
    add("--results", type=Path, default=RESULTS, help="JSON lines")
    return parser.parse_args()


if __name__ == "__main__":
    main()
