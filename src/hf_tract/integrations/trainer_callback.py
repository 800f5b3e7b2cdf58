"""`TrActCallback`: TrAct in `transformers.Trainer`, by one line."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from accelerate.utils import send_to_device
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from hf_tract.apply import UNUSED_PARAMETERS, TrActHandle, apply_tract, remove_tract
from hf_tract.config import Scope, TrActConfig, TrActError
from hf_tract.core.weights import is_frozen
from hf_tract.discovery.first_layer import LayerSelection
from hf_tract.integrations.model_card import CONFIG_FILE, TAGS
from hf_tract.integrations.trainer_record import save_trainer_card
from hf_tract.whitening.batches import first_batches
from hf_tract.whitening.whiten import mark_as_whitened, were_whitened, whiten_first_layer

logger = logging.getLogger(__name__)


class TrActCallback(TrainerCallback):
    """Trains the first layer by TrAct: `Trainer(..., callbacks=[TrActCallback(lam=0.1)])`.

    TrAct is on from the start of `train()` to its end, so that what is saved, evaluated and pushed is the ordinary model.
    Trainer's logs get `tract/grad_norm_raw`, `tract/grad_norm`, `tract/condition` and `tract/mean_eigenvalue` (see
    `TrActHandle.stats`), and each checkpoint folder the settings as `tract_config.json`. What Trainer saves and pushes is
    tagged `tract` and has these settings and a card beside it; `use_model_card` lets the card that Trainer writes last be
    this one too. There is no training state, so nothing needs to be restored. One callback may serve several Trainers, also
    one that runs inside another.

    Trainer's `max_grad_norm` (1.0 by default) sees the preconditioned gradient, as in the paper's code.

    Args:
        lam: damping, in the units of C's eigenvalues: 0.1 for standardised pixels (see docs/usage.md).
        layers: "auto", or names, glob patterns or modules.
        scope: "global" for one second moment per optimizer step, whatever the accumulation and the number of ranks;
            "local" for one per forward call.
        whiten_init: for training from scratch: start the first layer as W0 (C + lam I)^-1/2, C from the first batches of
            Trainer's own loader (see `hf_tract.whiten_first_layer`). A resumed run has it already.

    Raises:
        TrActError: for a setting that is none; when training begins, for layers that match nothing or are frozen, and with
            `whiten_init` for weights that have been trained.

    Source:
        Petersen, Borgelt, Ermon: TrAct, NeurIPS 2024, arXiv 2410.23970.
    """

    def __init__(
        self,
        lam: float = 0.1,
        layers: LayerSelection = "auto",
        scope: Scope = "global",
        *,
        whiten_init: bool = False,
    ) -> None:
        self.whiten_init = whiten_init
        self.layers = layers  # which may hold modules, and those are no settings
        self.config = TrActConfig(lam=lam, scope=scope)
        self._handles: list[TrActHandle] = []  # one for each model, also after its training

    def handle_of(self, model: nn.Module | None) -> TrActHandle | None:
        """Returns the handle of the training of `model`, under way or ended; None where TrAct had nothing to act on."""
        return next((handle for handle in self._handles if model is not None and handle.model is model), None)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """What a card tells beside the settings of `TrActConfig`."""
        return {"whiten_init": True} if self.whiten_init else {}

    def on_push_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes the settings and a card into what is about to be pushed."""
        self._write_card(args, state, model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Applies TrAct: here, because `model_init` makes a new model for each `train()`."""
        assert model is not None
        self._forget(model)  # an exception in the last `train()` skips its end
        try:
            handle = apply_tract(model, self.config.lam, self.layers, self.config.scope)
        except TrActError as error:
            if not (isinstance(self.layers, str) and self.layers == "auto"):
                raise
            logger.warning("TrAct is off: %s", error)
            return
        if all(is_frozen(layer.module) for layer in handle.layers):
            return
        self._handles.append(handle)
        if isinstance(model, PreTrainedModel):
            model.add_model_tags(list(TAGS))  # which Trainer puts into its own card
        if self.whiten_init:
            self._whiten(args, state, model, handle, train_dataloader)
        if args.ddp_find_unused_parameters:
            logger.warning(UNUSED_PARAMETERS)
        if state.is_world_process_zero:
            if args.get_process_log_level() <= logging.WARNING:
                tqdm.write(handle.summary())  # beside the progress bar, where Trainer's own logs are
            folder = _checkpoint(args, state) if state.global_step else None
            if folder is not None:
                _compare(folder, handle.config)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Looks once whether the first step was preconditioned: DeepSpeed's optimizers hold none of the model's parameters."""
        handle = self.handle_of(model)
        if handle is not None and handle.first_step is not None:
            handle.first_step.look()

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Removes TrAct; where something was saved, writes the settings and a card beside it."""
        if model is not None:
            self._take_off(model)
        if args.save_strategy != SaveStrategy.NO:
            self._write_card(args, state, model)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the figures of the last step to a training log and to the log history."""
        handle = self.handle_of(model)
        if handle is None or logs is None or "loss" not in logs or not state.is_world_process_zero:
            return
        stats = handle.stats()
        for name, figures in stats.items():
            prefix = "tract" if len(stats) == 1 else f"tract/{name}"
            figures = {f"{prefix}/{figure}": value for figure, value in figures.items()}
            logs.update(figures)
            state.log_history[-1].update(figures)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes the settings into the checkpoint folder."""
        handle = self.handle_of(model)
        if handle is None or not args.should_save:
            return
        if folder := _checkpoint(args, state):
            handle.config.to_json_file(folder / CONFIG_FILE)

    def _whiten(
        self, args: TrainingArguments, state: TrainerState, model: nn.Module, handle: TrActHandle, loader: Any
    ) -> None:
        layers = [layer.module for layer in handle.layers]
        if state.global_step:  # the checkpoint that is resumed has whitened weights
            mark_as_whitened(layers)
            return
        if were_whitened(model, layers):  # `train()` again, or by `auto_find_batch_size`
            logger.info("TrAct: the first layer was whitened before and goes on from there.")
            return
        try:
            batches = send_to_device(first_batches(loader), args.device)
            whiten_first_layer(model, batches, self.config.lam, layers)
        except BaseException:  # also an error of the model's own
            self._forget(model)
            raise

    def _write_card(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None) -> None:
        handle = self.handle_of(model)
        if handle is not None and model is not None and state.is_world_process_zero:
            layers = [layer.name for layer in handle.layers]
            save_trainer_card(
                args, state, model, handle.config, layers, model_id=args.hub_model_id, more=self.hyperparameters
            )

    def _take_off(self, model: nn.Module) -> None:
        """Removes TrAct; from a model whose first layer is frozen too, which has no handle here."""
        handle = self.handle_of(model)
        if handle is None:
            remove_tract(model)
        else:
            handle.remove()

    def _forget(self, model: nn.Module) -> None:
        """Takes TrAct off `model`, and its handle out of the list, with those of models that are gone."""
        self._take_off(model)
        self._handles = [each for each in self._handles if each.model is not None and each.model is not model]


def _compare(folder: Path, now: TrActConfig) -> None:
    """Warns where a run is resumed under other settings than its checkpoint's."""
    path = folder / CONFIG_FILE
    then = TrActConfig.from_json_file(path) if path.exists() else None
    if then != now:
        logger.warning(RESUMED, folder, "no TrAct" if then is None else then.to_dict(), now.to_dict())


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path | None:
    """The folder of the present step's checkpoint, if it is where Trainer puts or was told to find it."""
    name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    output = Path(args.output_dir or ".")
    # A trial of a hyperparameter search has a folder of its own, whose name callbacks are not told.
    trials = sorted(output.glob(f"*/{name}"), key=lambda path: path.stat().st_mtime, reverse=True)
    given = [Path(args.resume_from_checkpoint)] if isinstance(args.resume_from_checkpoint, str) else []
    folders = trials if state.is_hyper_param_search else [output / name, *given]
    return next((folder for folder in folders if folder.is_dir()), None)


RESUMED = "TrAct: this run resumes from %s, which was trained with other settings: %s then, %s now."

TrActTrainerCallback = TrActCallback
