"""Adds TrAct to transformers' Trainer, by one line."""

from __future__ import annotations

import contextlib
import logging
from typing import Any
from weakref import ref

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, send_to_device
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from hf_tract.apply import TrActHandle, apply_tract, remove_tract
from hf_tract.config import Scope, TrActConfig, TrActError
from hf_tract.core.notices import UNUSED_PARAMETERS
from hf_tract.core.weights import is_frozen
from hf_tract.discovery.first_layer import LayerSelection, find_first_layers
from hf_tract.discovery.wrappers import unwrap
from hf_tract.integrations.checkpoints import checkpoint_folder, compare_with_checkpoint, remember_settings
from hf_tract.integrations.model_card import TAGS
from hf_tract.integrations.trackers import Trackers, stats_to_log
from hf_tract.integrations.trainer_card import replace_card, write_card
from hf_tract.integrations.training_record import CONFIG_FILE
from hf_tract.whitening.batches import first_batches
from hf_tract.whitening.fresh import mark_as_whitened, were_whitened
from hf_tract.whitening.whiten import whiten_first_layer

logger = logging.getLogger(__name__)
# Ways of training in which Trainer shards the model before it calls `on_train_begin`.
SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED)
WHITENED_BEFORE = "TrAct: the first layer was whitened before and goes on from there. A fresh start needs a new model."


class TrActCallback(TrainerCallback):
    """Trains the first layer by TrAct: `Trainer(..., callbacks=[TrActCallback(lam=0.1)])`.

    TrAct is on from the start of `train()` to its end, so that what is saved, evaluated and pushed is the ordinary
    model. `max_grad_norm` (1.0 by default) clips the preconditioned gradient, as in the paper's code. Trainer's logs
    and trackers get the figures of `TrActHandle.stats` as `tract/grad_norm_raw` and so on. There is no training state
    to restore. One callback may serve several Trainers, also one that runs inside another.

    Each checkpoint folder gets the settings as `tract_config.json`. What Trainer saves and pushes is tagged `tract`
    and has the settings and a card beside it; a README.md that somebody wrote stays. Trainer may write its own card
    last; `use_model_card` replaces that one.

    Args:
        lam: as in `TrActConfig`.
        layers: as in `TrActConfig`, or modules. Where "auto" finds none, a warning says "TrAct is off".
        scope: as in `TrActConfig`.
        whiten_init: for training from scratch, start with the first layer as `whiten_first_layer` makes it from the
            first batches of Trainer's own loader. A resumed run has whitened weights already.

    Raises:
        TrActError: for a wrong setting; when training begins, for layers that match nothing or are frozen, and with
            `whiten_init` for weights that are not fresh.

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
        self.layers = layers  # Not in the config, which is written to files: these may be modules.
        self.config = TrActConfig(lam=lam, scope=scope)
        self._handles: list[TrActHandle] = []  # one for each model, also after its training
        self._trackers: dict[TrActHandle, Trackers] = {}  # of those in training
        self._found: tuple[ref[nn.Module], list[str]] | None = None  # a model to be sharded, and its layers' names

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this process: Ray pickles a Trainer with its callbacks."""
        return {**vars(self), "_handles": [], "_trackers": {}, "_found": None}

    def handle_of(self, model: nn.Module | None) -> TrActHandle | None:
        """Return the handle on `model`, in training or after it; None if TrAct had nothing to act on."""
        for handle in self._handles:
            if model is not None and handle.model is model:
                return handle
        return None

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Return what a card lists beside the settings of `TrActConfig`."""
        return {"whiten_init": True} if self.whiten_init else {}

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Find the layers if FSDP or DeepSpeed is to shard the model, since a sharded model cannot be tried."""
        if model is None or self.layers != "auto" or AcceleratorState().distributed_type not in SHARDING:
            return
        with contextlib.suppress(TrActError):  # It comes again when training begins, and is told then.
            names = [layer.name for layer in find_first_layers(model) if not is_frozen(layer.module)]
            if names:
                self._found = ref(unwrap(model)), names

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Apply TrAct only now, because `model_init` makes a new model for each `train()`."""
        assert model is not None
        self._forget(model)  # An exception in the last `train()` may have skipped its end.
        handle = self._apply_tract(model)
        if handle is None:
            return
        self._handles.append(handle)
        if isinstance(model, PreTrainedModel):
            model.add_model_tags(list(TAGS))  # Trainer's own card gets these.
        if self.whiten_init:
            self._whiten(args, state, model, handle, kwargs.get("train_dataloader"))
        if args.ddp_find_unused_parameters and args.world_size > 1:
            logger.warning(UNUSED_PARAMETERS)
        settings = {**handle.config.to_dict(), **self.hyperparameters}
        if state.is_world_process_zero:
            self._trackers[handle] = Trackers(args)
            _tell(args, state, handle.summary())
            compare_with_checkpoint(state, settings)
        remember_settings(state, settings)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Check the first step here too, since DeepSpeed's optimizers hold no parameters of the model."""
        handle = self.handle_of(model)
        if handle is not None and handle.first_step is not None:
            handle.first_step.look()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the figures of the last step to a training log, to the log history and to the trackers."""
        handle = self.handle_of(model)
        if handle is None or logs is None or "loss" not in logs or not state.is_world_process_zero:
            return
        figures = stats_to_log(handle)
        logs.update(figures)
        state.log_history[-1].update(figures)
        if handle in self._trackers:
            self._trackers[handle].write(figures, state.global_step)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Write the settings into the checkpoint folder."""
        handle = self.handle_of(model)
        folder = checkpoint_folder(args, state)
        if handle is not None and folder is not None and args.should_save:
            handle.config.to_json_file(folder / CONFIG_FILE)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Write the settings and a card into the folder that is about to be pushed."""
        self._write_card(args, state, model)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Remove TrAct, and write the settings and a card beside what was saved."""
        if model is not None:
            self._remove_tract(model)
        if args.save_strategy != SaveStrategy.NO:
            self._write_card(args, state, model)
            if self.handle_of(model) is None and model is not None:
                replace_card(args, state, model)

    def _apply_tract(self, model: nn.Module) -> TrActHandle | None:
        layers = self.layers
        if self._found is not None and self._found[0]() is unwrap(model):
            layers = self._found[1]
        try:
            handle = apply_tract(model, self.config.lam, layers, self.config.scope)
        except TrActError as error:
            if self.layers != "auto":
                raise
            logger.warning("TrAct is off: %s", error)
            return None
        if all(is_frozen(layer.module) for layer in handle.layers):
            handle.remove()  # So it stays off if the layer is unfrozen later, as `apply_tract` has warned.
            return None
        if self.layers == "auto":
            handle.config = self.config  # without the names that were found before
        return handle

    def _whiten(
        self, args: TrainingArguments, state: TrainerState, model: nn.Module, handle: TrActHandle, loader: Any
    ) -> None:
        layers = [layer.module for layer in handle.layers]
        if state.global_step:
            for layer in layers:
                mark_as_whitened(layer)  # The checkpoint has whitened weights, but not this mark.
            return
        if were_whitened(model, layers):  # by an earlier `train()`, perhaps one that ran out of memory
            _tell(args, state, WHITENED_BEFORE)
            return
        try:
            batches = send_to_device(first_batches(loader), args.device)
            whiten_first_layer(model, batches, self.config.lam, layers)
        except BaseException:  # The model's forward may raise anything.
            self._forget(model)
            raise
        _tell(args, state, "TrAct: the first layer starts whitened, by the first batches of the training data.")

    def _write_card(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None) -> None:
        handle = self.handle_of(model)
        if model is None or not state.is_world_process_zero:
            return
        if handle is not None:
            write_card(args, state, model, handle, self.hyperparameters, is_trained=handle not in self._trackers)

    def _remove_tract(self, model: nn.Module) -> None:
        handle = self.handle_of(model)
        if handle is not None:
            handle.remove()
            if handle in self._trackers:
                self._trackers.pop(handle).close()
        else:
            remove_tract(model)

    def _forget(self, model: nn.Module) -> None:
        """Remove TrAct from `model` and drop its handle, and the handles of models that no longer exist."""
        self._remove_tract(model)
        self._handles = [handle for handle in self._handles if handle.model not in (None, model)]
        self._trackers = {handle: self._trackers[handle] for handle in self._handles if handle in self._trackers}


# One class by two names: scripts may import either.
TrActTrainerCallback = TrActCallback


def _tell(args: TrainingArguments, state: TrainerState, message: str) -> None:
    """Print a line beside the progress bar, where Trainer's own logs are, unless the user wants no warnings."""
    if state.is_world_process_zero and args.get_process_log_level() <= logging.WARNING:
        tqdm.write(message)
