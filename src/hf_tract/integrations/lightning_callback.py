"""Adds TrAct to Lightning's Trainer by one line, where Lightning is installed."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from hf_tract.apply import TrActHandle, apply_tract
from hf_tract.config import Scope, TrActConfig, TrActError
from hf_tract.discovery.first_layer import LayerSelection
from hf_tract.integrations.trackers import stats_to_log

if TYPE_CHECKING:
    Callback = object
else:
    try:
        from lightning.pytorch import Callback
    except ImportError:
        try:
            from pytorch_lightning import Callback
        except ImportError as error:
            raise ImportError("TrActLightningCallback needs Lightning: `pip install lightning`.") from error

logger = logging.getLogger(__name__)

SEARCHES = ("LearningRateFinder", "BatchSizeFinder")
SHARDED = ("DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy")


class TrActLightningCallback(Callback):
    """Trains the first layer by TrAct: `Trainer(callbacks=[TrActLightningCallback(lam=0.1)])`.

    TrAct is on from the start of `fit()` to its end, or to an exception. It has no training state to restore. The
    loggers get the figures of `TrActHandle.stats` as `tract/grad_norm_raw` and so on.

    Args:
        lam: as in `TrActConfig`.
        layers: as in `apply_tract`; name the layer where the LightningModule has no `forward`.
        scope: as in `TrActConfig`.

    Raises:
        TrActError: for a wrong setting; when `fit()` begins, for a layer that TrAct cannot act on, and for
            `accumulate_grad_batches` under FSDP or DeepSpeed, unless `scope` is "local".
    """

    def __init__(self, lam: float = 0.1, layers: LayerSelection = "auto", scope: Scope = "global") -> None:
        self.config = TrActConfig(lam=lam, scope=scope)
        self.layers = layers
        self.handle: TrActHandle | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Warn of searches that Lightning runs before `on_fit_start` of any other callback."""
        names = [type(callback).__name__ for callback in trainer.callbacks]
        searches = [name for name in names if name in SEARCHES]
        if searches:
            logger.warning(
                "TrAct: %s runs before TrAct is on, so it searches for a training without. To search with it, call "
                "`apply_tract(module)` before.",
                ", ".join(searches),
            )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Apply TrAct after the strategy has placed and wrapped the model."""
        strategy = type(trainer.strategy).__name__
        if strategy in SHARDED and trainer.accumulate_grad_batches > 1 and self.config.scope == "global":
            raise TrActError(
                "`accumulate_grad_batches` "
                f"(={trainer.accumulate_grad_batches}) must be 1 under "
                f"{strategy}, which hides where a step begins; use larger "
                "batches, or `scope='local'`."
            )
        self.handle = apply_tract(pl_module, self.config.lam, self.layers, self.config.scope)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Log the figures of the steps that Lightning logs."""
        interval = trainer.log_every_n_steps
        if self.handle is not None and trainer.loggers and interval and (trainer.global_step + 1) % interval == 0:
            pl_module.log_dict(stats_to_log(self.handle))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Remove TrAct, so that what is saved and tested is the ordinary model."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Remove TrAct here too, since an exception skips the end."""
        self.teardown(trainer, pl_module, "fit")
