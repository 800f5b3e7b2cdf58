"""Trains any transformers or timm vision model from a recipe, with or without TrAct, by accelerate."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed, tqdm
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

from benchmarks.training.checkpoints import History, restore, save
from benchmarks.training.data import Normalization, Splits, fingerprint, load_splits, normalization
from benchmarks.training.loaders import Loaders, make_loaders
from benchmarks.training.models import logits_of, make_model
from benchmarks.training.recipe import Recipe
from hf_tract import apply_tract, whiten_first_layer
from hf_tract.discovery.first_layer import LayerSelection
from hf_tract.metrics import TopK

MakeModel = Callable[[Recipe, Splits, Normalization], nn.Module]
MakeOptimizer = Callable[[Recipe, nn.Module], torch.optim.Optimizer]


class Options(NamedTuple):
    """Says where a run goes, and what is done beside the recipe."""

    output_dir: Path
    tract: bool = True
    num_workers: int = 0
    # Those that get TrAct, as in hf_tract.apply_tract.
    layers: LayerSelection = "auto"


class Trained(NamedTuple):
    """Holds what a run leaves: the model, how it sees images, the figures of each epoch, the data's fingerprint."""

    model: nn.Module
    look: Normalization
    figures: dict[str, list[float]]
    data: str


def usual_model(recipe: Recipe, splits: Splits, look: Normalization) -> nn.Module:
    """Return the model that a recipe names."""
    return make_model(recipe, splits.names)


def usual_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer that a recipe names."""
    made: torch.optim.Optimizer = create_optimizer_v2(
        model, recipe.optimizer, recipe.learning_rate, recipe.weight_decay, filter_bias_and_bn=not recipe.decay_all
    )
    return made


def train(
    recipe: Recipe,
    options: Options,
    make: MakeModel = usual_model,
    make_optimizer: MakeOptimizer = usual_optimizer,
) -> Trained:
    """Train from the data set to the last epoch's test; a run that was killed goes on after its last whole epoch.

    Args:
        recipe: what is trained and how.
        options: where it goes, and whether TrAct is on.
        make: the model, from the recipe, the data and how images are seen.
        make_optimizer: the optimizer of that model.
    """
    accelerator = _accelerator(recipe)
    set_seed(recipe.seed)
    with accelerator.main_process_first():
        splits = load_splits(recipe)
    look = normalization(recipe, splits)
    loaders = make_loaders(recipe, splits, look, accelerator, options.num_workers)
    if not len(loaders.train):
        raise SystemExit(f"batch_size {recipe.batch_size} is more than the {len(splits.train)} training images.")
    model = make(recipe, splits, look)
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)
    started = _clock()
    if recipe.whiten_init:
        whiten_first_layer(model, loaders.train, recipe.lam, match_scale=not recipe.whiten_unscaled)
    whitening_seconds = _clock() - started
    # Every rank has the same weights, and draws other numbers for dropout and mixup.
    set_seed(recipe.seed, device_specific=True)
    optimizer = make_optimizer(recipe, model)
    if options.tract:
        accelerator.print(apply_tract(model, recipe.lam, options.layers))
    training = _Training(recipe, accelerator, loaders, model, optimizer)
    training.make_loss(len(splits.names))
    training.history.seconds_before = whitening_seconds
    training.run(options.output_dir / "checkpoints")
    if recipe.channels_last:
        # safetensors saves this format.
        model = model.to(memory_format=torch.contiguous_format)
    return Trained(model, look, training.history.figures, fingerprint(splits))


def _accelerator(recipe: Recipe) -> Accelerator:
    return Accelerator(
        # Otherwise torchrun's processes would not find each other on CPU.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=recipe.mixed_precision,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=recipe.seed),
        step_scheduler_with_optimizer=False,
    )


def _clock() -> float:
    """Return seconds: of the clock on an accelerator; of the process on a CPU, which other processes share."""
    if torch.accelerator.is_available():
        return time.perf_counter()
    return time.process_time()


class _Training:
    """Runs the epochs."""

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        loaders: Loaders,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.recipe = recipe
        self.accelerator = accelerator
        self.images = loaders.images
        prepared = accelerator.prepare(model, optimizer, loaders.test)
        self.model, self.optimizer, self.test_loader = prepared
        self.train_loader = loaders.train
        if not recipe.repeated_augmentation:
            self.train_loader = accelerator.prepare(loaders.train)
        self.schedule = _schedule(recipe, self.optimizer, len(self.train_loader))
        self.history = History()
        accelerator.register_for_checkpointing(self.history)

    def make_loss(self, classes: int) -> None:
        """Make the loss, and what mixes images and labels, if anything does."""
        recipe = self.recipe
        self.mixup = None
        self.criterion: nn.Module = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
        if recipe.mixup or recipe.cutmix:
            self.criterion = SoftTargetCrossEntropy()
            smoothing = recipe.label_smoothing
            self.mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=smoothing, num_classes=classes)
        if recipe.bce_loss:
            self.criterion = BinaryCrossEntropy(smoothing=recipe.label_smoothing)

    def run(self, checkpoints: Path) -> None:
        """Train and test until the last epoch, and leave a checkpoint after each."""
        restore(self.accelerator, checkpoints)
        steps = len(self.train_loader)
        silent = not self.accelerator.is_main_process
        first = self.history.epochs
        bar = tqdm(total=self.recipe.epochs * steps, initial=first * steps, desc="training", disable=silent)
        self.schedule.step_update(first * steps)
        for epoch in range(first, self.recipe.epochs):
            start = _clock()
            loss = self._train_epoch(epoch, bar)
            seconds = self.history.seconds + _clock() - start
            self.optimizer.eval()
            scores = evaluate(self.model, self.test_loader, self.accelerator)
            self.history.add(loss=loss, seconds=round(seconds, 3), **scores)
            bar.set_postfix(loss=f"{loss:.3f}", top1=f"{scores['top1']:.3f}")
            save(self.accelerator, checkpoints, epoch + 1)
        bar.close()

    def _train_epoch(self, epoch: int, bar: Any) -> float:
        """Train for an epoch; return the loss of its last batch."""
        self.images.set_epoch(epoch)
        self.train_loader.set_epoch(epoch)
        self.model.train()
        # Schedule-free optimizers train other weights than they test.
        self.optimizer.train()
        loss = torch.zeros(())
        for number, (pixels, labels) in enumerate(self.train_loader, 1):
            loss = self._step(pixels, labels)
            self.schedule.step_update(epoch * len(self.train_loader) + number)
            bar.update()
        return float(loss)

    def _step(self, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.mixup:
            pixels, labels = self.mixup(pixels, labels)
        loss: torch.Tensor = self.criterion(logits_of(self.model(pixels)), labels)
        self.accelerator.backward(loss)
        if self.recipe.clip_grad_norm:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def _schedule(recipe: Recipe, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Any:
    schedule, _ = create_scheduler_v2(
        optimizer,
        recipe.schedule,
        recipe.epochs,
        warmup_epochs=recipe.warmup_epochs,
        warmup_lr=0.0,
        warmup_prefix=False,
        decay_milestones=recipe.decay_milestones,
        decay_rate=recipe.decay_rate,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    return schedule


@torch.no_grad()
def evaluate(model: nn.Module, loader: Any, accelerator: Accelerator) -> dict[str, float]:
    """Return top-1 and top-5 over all processes, from 0 to 1."""
    model.eval()
    metric = TopK()
    for pixels, labels in loader:
        scores = logits_of(model(pixels)).float()
        scores, labels = accelerator.gather_for_metrics((scores, labels))
        metric.add_batch(predictions=scores.cpu().numpy(), references=labels.cpu().numpy())
    return metric.compute() or {}
