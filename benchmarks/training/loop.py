"""Trains any transformers or timm vision model from a recipe, with or without TrAct, by accelerate."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed, tqdm
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn

from benchmarks.training.image_data import Splits, normalization
from benchmarks.training.loaders import make_loaders
from benchmarks.training.models import Preprocessing, logits_of, make_model
from benchmarks.training.progress import Progress, add_epoch, read_epochs, start
from benchmarks.training.recipe import Recipe, Run
from hf_tract import TrActHandle, apply_tract, whiten_first_layer
from hf_tract.integrations import stats_to_log
from hf_tract.metrics import TopK


class Trained(NamedTuple):
    """What a run leaves: the model to save, TrAct's handle, how images are seen, the figures of each epoch."""

    model: nn.Module
    handle: TrActHandle | None
    look: Preprocessing
    splits: Splits
    history: list[dict[str, Any]]


def ready_made(recipe: Recipe, splits: Splits, look: Preprocessing) -> nn.Module:
    """The model that a recipe names."""
    return make_model(recipe.model, json.loads(recipe.model_config), recipe.image_size, splits.names)


def usual_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that a recipe names."""
    made: torch.optim.Optimizer = create_optimizer_v2(
        model, recipe.optimizer, recipe.learning_rate, recipe.weight_decay, filter_bias_and_bn=not recipe.decay_all
    )
    return made


def train(
    recipe: Recipe,
    run: Run,
    make: Callable[[Recipe, Splits, Preprocessing], nn.Module] = ready_made,
    make_optimizer: Callable[[Recipe, nn.Module], torch.optim.Optimizer] = usual_optimizer,
) -> Trained:
    """The whole run, from the data set to the last epoch's test.

    Args:
        recipe: what is trained and how.
        run: where it goes and how it is watched.
        make: the model, from the recipe, the data and how images are seen.
        make_optimizer: the optimizer of that model.
    """
    project = ProjectConfiguration(run.output_dir, automatic_checkpoint_naming=True, total_limit=2)
    accelerator = Accelerator(
        cpu=run.cpu
        or not torch.accelerator.is_available(),  # else torchrun's processes would not find each other on CPU
        mixed_precision=recipe.mixed_precision,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        log_with=run.report_to,
        project_config=project,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=recipe.seed),
        step_scheduler_with_optimizer=False,
    )
    set_seed(recipe.seed)
    with accelerator.main_process_first():
        splits = recipe.load()
    measured = ([], []) if recipe.mean and recipe.std else normalization(splits, recipe.image_size)
    look = Preprocessing(recipe.image_size, recipe.mean or measured[0], recipe.std or measured[1])
    train_loader, test_loader, images = make_loaders(splits, recipe, run, look, accelerator)
    if not len(train_loader):
        raise SystemExit(
            f"--batch_size {recipe.batch_size} is more than the {len(splits.train)} training images of a process."
        )
    model = make(recipe, splits, look)
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if recipe.whiten_init:
        whiten_first_layer(model, train_loader, recipe.lam, match_scale=not recipe.whiten_unscaled)
    set_seed(recipe.seed, device_specific=True)  # the same weights on every rank, and other draws of dropout and mixup
    optimizer = make_optimizer(recipe, model)
    handle = None
    if not run.no_tract:
        handle = apply_tract(model, recipe.lam, scope=recipe.scope)  # type: ignore[arg-type]
        accelerator.print(handle)
    model, optimizer, test_loader = accelerator.prepare(model, optimizer, test_loader)
    if not recipe.repeated_augmentation:
        train_loader = accelerator.prepare(train_loader)
    steps_per_epoch = -(-len(train_loader) // recipe.gradient_accumulation_steps)
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
    ema = ModelEmaV3(accelerator.unwrap_model(model), decay=recipe.ema_decay) if recipe.ema_decay else None
    progress = Progress()
    kept = [each for each in (ema, progress) if each]
    accelerator.register_for_checkpointing(*kept)
    history = Path(run.output_dir) / "history.jsonl"
    start(accelerator, run.resume_from_checkpoint, len(kept), history, progress)
    if run.report_to:
        accelerator.init_trackers(
            "pretrain_vit", {key: str(value) for key, value in dataclasses.asdict(recipe).items()}
        )

    criterion, mixup = make_loss(recipe, len(splits.names))
    bar = tqdm(
        total=recipe.epochs * steps_per_epoch,
        initial=progress.step,
        desc="training",
        disable=not accelerator.is_main_process,
    )
    schedule.step_update(progress.step)
    figures: dict[str, float] = {}
    clock = time.perf_counter if torch.accelerator.is_available() and not run.cpu else time.process_time
    for epoch in range(progress.epoch, recipe.epochs):
        began = clock() - progress.seconds
        progress.epoch = epoch
        images.set_epoch(epoch)
        model.train()
        for pixels, labels in batches_left(train_loader, epoch, progress.batch):
            with accelerator.accumulate(model):
                if mixup:
                    pixels, labels = mixup(pixels, labels)
                loss = criterion(logits_of(model(pixels)), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients and recipe.clip_grad_norm:
                    accelerator.clip_grad_norm_(model.parameters(), recipe.clip_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            progress.batch, progress.loss = progress.batch + 1, loss.detach()
            if accelerator.sync_gradients:
                progress.step += 1
                schedule.step_update(progress.step)
                if ema:
                    ema.update(accelerator.unwrap_model(model), step=progress.step)
                bar.update()
                if progress.step % 10 == 0:
                    logged = {"train/loss": loss.item(), "train/lr": optimizer.param_groups[0]["lr"]}
                    if handle and run.report_to:  # without a tracker they would be computed for nobody
                        logged |= {f"train/{name}": value for name, value in stats_to_log(handle).items()}
                    accelerator.log(logged, step=progress.step)
                if run.checkpointing_steps.isdigit() and progress.step % int(run.checkpointing_steps) == 0:
                    progress.seconds = clock() - began
                    accelerator.save_state()
        figures = {"epoch": epoch + 1, "step": progress.step, "loss": float(progress.loss)}
        progress.epoch, progress.batch, progress.seconds = epoch + 1, 0, clock() - began
        figures |= {
            "seconds": round(progress.seconds, 3),
            **evaluate(ema.module if ema else model, test_loader, accelerator),
        }
        accelerator.log({f"test/{key}": value for key, value in figures.items()}, step=progress.step)
        bar.set_postfix(
            {key: f"{value:.3f}" for key, value in figures.items() if key not in ("epoch", "step", "seconds")}
        )
        add_epoch(history, {**figures, "tract": not run.no_tract}, accelerator)
        if run.checkpointing_steps == "epoch":
            accelerator.save_state()
    bar.close()
    figures = figures or evaluate(ema.module if ema else model, test_loader, accelerator)  # a finished run, resumed
    accelerator.print(f"top-1 {100 * figures['top1']:.1f} %, top-5 {100 * figures['top5']:.1f} %")
    accelerator.end_training()
    best = ema.module if ema else accelerator.unwrap_model(model)
    if recipe.channels_last:
        best = best.to(memory_format=torch.contiguous_format)  # which is what safetensors saves
    return Trained(best, handle, look, splits, read_epochs(history))


def batches_left(loader: Any, epoch: int, done: int) -> Any:
    """The batches of an epoch after the first `done`; none where a checkpoint was made after the last one."""
    if done >= len(loader):
        return []
    if done:
        loader = skip_first_batches(loader, done)
    loader.set_epoch(epoch)
    return loader


def make_loss(recipe: Recipe, classes: int) -> tuple[nn.Module, Mixup | None]:
    """The loss, and what mixes images and labels, if anything does."""
    if recipe.mixup or recipe.cutmix:
        mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=classes)
        return (BinaryCrossEntropy() if recipe.bce_loss else SoftTargetCrossEntropy()), mixup
    if recipe.bce_loss:
        return BinaryCrossEntropy(smoothing=recipe.label_smoothing), None
    return nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing), None


@torch.no_grad()
def evaluate(model: nn.Module, loader: Any, accelerator: Accelerator) -> dict[str, float]:
    """Top-1 and top-5 over all processes."""
    model.eval()
    metric = TopK()
    for pixels, labels in loader:
        scores, labels = accelerator.gather_for_metrics((logits_of(model(pixels)).float(), labels))
        metric.add_batch(predictions=scores.cpu().numpy(), references=labels.cpu().numpy())
    return metric.compute() or {}
