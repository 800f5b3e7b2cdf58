"""Preconditions the gradient of one layer's weight: see "Return what is missing" in README.md beside this file."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from hf_tract.config import TrActConfig
from hf_tract.core import accumulation
from hf_tract.core.delayed import DelayedFlag
from hf_tract.core.moments import PatchSums, patch_sums
from hf_tract.core.notices import warn_if_unsolved, warn_of_failure, warn_of_other_uses
from hf_tract.core.patches import PatchSpec
from hf_tract.core.solve import DampedInverse, on_host, widest_dtype
from hf_tract.core.step import ForwardCall, Step, masked
from hf_tract.core.steps import StepSequence

_keys = itertools.count()
# A compiled graph holds the number as a constant, so a layer that gets TrAct again keeps its number.
_key_of_layer: Any = WeakIdKeyDictionary()
# An operator takes no Python objects, so it finds its preconditioner by number.
PRECONDITIONERS: WeakValueDictionary[int, LayerPreconditioner] = WeakValueDictionary()


class LayerPreconditioner:
    """Multiplies the gradient of one layer's weight by inv(C + lam I).

    C = (1/b) sum of p p^T over all b patches whose gradient is in the weight's `.grad`, on all ranks. With the "local"
    scope, C is that of each forward call of each process.

    Source:
        arXiv 2410.23970, section 3.
    """

    def __init__(self, layer: nn.Module, config: TrActConfig, process_group: Any = None) -> None:
        """Start without any patches or gradient.

        Args:
            layer: the layer whose weight gradient is preconditioned; only a weak reference to it is kept.
            config: the settings; `layers` is ignored.
            process_group: the ranks that share C; None for the default group.
        """
        self.key: int = _key_of_layer.setdefault(layer, next(_keys))
        self.config = config
        self.process_group = process_group
        self.active = True
        self.steps = StepSequence(layer)
        self.warned: set[str] = set()
        self.last_step: Step | None = None
        # On an accelerator the first backward chooses the precision of the sums by their values, and that of the
        # factor by its outcome; later ones reuse them, so that the host need not wait.
        self.sums_dtype: torch.dtype | None = None
        self.factor_dtype: torch.dtype | None = None
        self._failure = DelayedFlag()
        # The factorisation whose outcome has been sent to the host.
        self._watched: DampedInverse | None = None
        # DataParallel's replicas share this object.
        self._lock = threading.RLock()
        PRECONDITIONERS[self.key] = self

    @property
    def layer(self) -> nn.Module | None:
        """Return the layer, while something else keeps it."""
        return self.steps.layer

    def precondition(self, grad: Tensor, x: Tensor, spec: PatchSpec, call: ForwardCall | None = None) -> Tensor:
        """Add one backward to the step, and return what the weight still lacks of the step's preconditioned gradient.

        Args:
            grad: the ordinary gradient of this backward, (m, ...).
            x: the input of the layer's operation.
            spec: the patches that the operation reads from `x`.
            call: the forward call, so that a graph run backward twice counts its patches once; None in a compiled
                graph.

        Returns:
            A contiguous tensor like `grad`.
        """
        if not self.active:
            return grad.clone()
        backward = self.steps.backward_of(call, grad.shape)
        with self._lock:
            step = self.steps.step_of(backward, self.config.scope == "local")
            self.last_step = step
            with step.undone_on_error():
                keep = self.steps.enter(step, backward)
                returned = step.returned(keep)
                new = self._uncounted_sums(step, call, x, spec, keep)
                dtype = torch.promote_types(grad.dtype, torch.float32)
                step.add(grad.detach().to(dtype), new, keep)
                if step.inverse is None and self.steps.count == 1 and self._is_sole_source(call, backward.parameters):
                    warn_of_other_uses(self.warned, backward.parameters[0], step.returned)
                missing = self._missing(step, grad, returned)
                if call is not None:
                    step.counted_calls.add(call)
                return missing

    def stats(self) -> dict[str, float]:
        """Return the figures of `TrActHandle.stats` as of the last backward."""
        with self._lock:
            step = self.last_step
            if step is None or step.grad is None or step.inverse is None or self.steps.is_frozen():
                return {}
            warn_if_unsolved(self.warned, step.inverse, self.config.lam)
            return {
                "grad_norm_raw": step.grad.norm().item(),
                "grad_norm": step.inverse(step.grad).norm().item(),
                "condition": step.inverse.condition(),
                "mean_eigenvalue": step.inverse.mean_eigenvalue,
            }

    def _uncounted_sums(
        self, step: Step, call: ForwardCall | None, x: Tensor, spec: PatchSpec, keep: Tensor | None
    ) -> PatchSums | None:
        """Return the sums over the patches of this backward on all ranks; None if the step has them already."""
        is_counted = call is not None and call in step.counted_calls
        if is_counted and keep is None:
            return None
        self._use_float64_if_needed(x.device)
        new = patch_sums(x, spec, self.config.lam, self.sums_dtype)
        if not on_host(new.sums):
            self.sums_dtype = new.sums.dtype
        if self.config.scope == "global":
            new = accumulation.sum_over_ranks(new, self.process_group)
        if is_counted:
            assert keep is not None
            # If the device keeps the old totals, these sums are already among them.
            return masked(new, ~keep)
        return new

    def _is_sole_source(self, call: ForwardCall | None, parameters: Sequence[Tensor]) -> bool:
        """Return whether `.grad` will come from this layer alone, in this process."""
        if self.config.scope == "local" or accumulation.ranks_of(self.process_group) > 1:
            return False
        if call is None or call.leaf is None or not parameters:
            return False
        return parameters[0] is call.leaf and call.leaf.grad is None

    def _missing(self, step: Step, grad: Tensor, returned: Tensor | None) -> Tensor:
        assert step.total is not None
        if on_host(step.total.sums):
            inverse = step.factorise(self.config.lam)
            warn_if_unsolved(self.warned, inverse, self.config.lam)
        else:
            self._factorise_on_accelerator(step)
        missing = step.returned()
        assert missing is not None
        if returned is not None:
            missing = missing - returned.to(missing.device)
        return missing.to(grad.dtype).contiguous()

    def _use_float64_if_needed(self, device: torch.device) -> None:
        """Choose float64 if the host has heard that float32 was not enough in an earlier step."""
        if self._watched is None or self.factor_dtype is None or not self._failure.read():
            return
        # The watched step is over, so this does not wait long, and only in such a case.
        if self._watched.finite:
            widest = widest_dtype(device)
            if self._watched.failed:
                warn_of_failure(self.warned, self.config.lam, self.factor_dtype, widest)
            self.sums_dtype = self.factor_dtype = widest
        self._watched = None

    def _factorise_on_accelerator(self, step: Step) -> None:
        """Factorise the step's C + lam I; after the first time, without waiting for the device.

        Then a factorisation that fails in float32 leaves that step its ordinary gradient. Once the host has heard of
        it, or that float32 loses lam, usually in the next step, it chooses float64.
        """
        assert step.total is not None
        lam = self.config.lam
        widest = widest_dtype(step.total.sums.device)
        if self.factor_dtype is None:
            inverse = step.factorise(lam, self.sums_dtype)
            self.factor_dtype = self.sums_dtype
            if inverse.failed and inverse.finite:
                self.factor_dtype = widest
                inverse = step.factorise(lam, self.factor_dtype)
                warn_if_unsolved(self.warned, inverse, lam)
            return
        inverse = step.factorise(lam, self.factor_dtype)
        flag = inverse.failed if self.factor_dtype == widest else inverse.needs_float64
        if self._failure.send(flag):
            self._watched = inverse
