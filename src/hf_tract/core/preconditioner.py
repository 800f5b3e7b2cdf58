"""Preconditions the gradient of one layer's weight: see "Return what is missing" in README.md beside this file."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_tract.config import TrActConfig
from hf_tract.core import accumulation
from hf_tract.core.delayed import DelayedFlag
from hf_tract.core.moments import PatchSums, patch_sums
from hf_tract.core.notices import warn_if_unsolved, warn_of_failure, warn_of_other_uses
from hf_tract.core.optimizer_hook import call_after_steps, held_by
from hf_tract.core.patches import PatchSpec
from hf_tract.core.solve import DampedInverse, on_host, widest_dtype
from hf_tract.core.step import ForwardCall, Step, masked
from hf_tract.core.weights import weight_parameters

_keys = itertools.count()
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
        self.key = next(_keys)
        self.config = config
        self.process_group = process_group
        self.active = True
        # Optimizer steps begun.
        self.steps = 0
        # How many `TrActHandle.no_sync()` contexts are open.
        self.open_no_syncs = 0
        self.warned: set[str] = set()
        self.last_step: Step | None = None
        # On an accelerator the first backward chooses the precision of the sums by their values, and that of the
        # factor by its outcome; later ones reuse them, so that the host need not wait.
        self.sums_dtype: torch.dtype | None = None
        self.factor_dtype: torch.dtype | None = None
        self._failure = DelayedFlag()
        # The factorisation whose outcome has been sent to the host.
        self._watched: DampedInverse | None = None
        self._layer = ref(layer)
        # FSDP2 empties `.grad` after a micro-step, in whose backward the weight looks like an ordinary parameter.
        self.has_engine = False
        self.look_for_engine()
        self._step: Step | None = None
        # The step of `torch.autograd.grad`, which returns gradients and adds nothing to `.grad`.
        self._returned_step: Step | None = None
        # DataParallel's replicas share this object.
        self._lock = threading.RLock()
        PRECONDITIONERS[self.key] = self
        call_after_steps(_after_step)

    def look_for_engine(self) -> None:
        """Look whether an engine keeps the gradients; in its forward and backward the parameters do not show it."""
        self.has_engine = self.has_engine or accumulation.has_engine(weight_parameters(self._layer()))

    def after_step(self, optimizer: Optimizer) -> None:
        """Remember what `.grad` of the weight holds if `optimizer` has just used it."""
        self.look_for_engine()
        parameters = held_by(optimizer, weight_parameters(self._layer()))
        if self._step is not None and accumulation.lives_in_grad(parameters):
            self._step.seen_grads = accumulation.SeenGrads(parameters)

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
        backward_pass = _backward_pass_of(call)
        parameters = self._parameters(call)
        in_grad = accumulation.lives_in_grad(parameters)
        with self._lock:
            step = self._find_step(backward_pass, parameters, in_grad)
            self.last_step = step
            with step.undone_on_error():
                keep = None
                if step.backward_pass != backward_pass:
                    step.backward_pass = backward_pass
                    keep = _mask(step, parameters) if in_grad else None
                if in_grad:
                    self._look_at_grads(step, parameters, call)
                returned = step.returned(keep)
                new = self._uncounted_sums(step, call, x, spec, keep)
                dtype = torch.promote_types(grad.dtype, torch.float32)
                step.add(grad.detach().to(dtype), new, keep)
                step.closed = not (self.open_no_syncs or accumulation.engine_accumulates())
                if step.inverse is None and self.steps == 1 and self._is_sole_source(call, parameters):
                    warn_of_other_uses(self.warned, parameters[0], step.returned)
                return self._missing(step, grad, returned)

    def stats(self) -> dict[str, float]:
        """Return the figures of `TrActHandle.stats` as of the last backward."""
        with self._lock:
            step = self.last_step
            if step is None or step.grad is None or step.inverse is None:
                return {}
            warn_if_unsolved(self.warned, step.inverse, self.config.lam)
            return {
                "grad_norm_raw": step.grad.norm().item(),
                "grad_norm": step.inverse(step.grad).norm().item(),
                "condition": step.inverse.condition(),
                "mean_eigenvalue": step.inverse.mean_eigenvalue,
            }

    def _parameters(self, call: ForwardCall | None) -> Sequence[Tensor]:
        """Return the parameters that the weight consists of, or is computed from.

        This is the parameter that the forward call used, since the layer may have another one by now. Where an engine
        keeps gradients outside of `.grad`, it is the layer's own parameters, as only these show that.
        """
        layer = self._layer()
        weight = layer._parameters.get("weight") if layer else None
        if call is not None and weight is not None and call.leaf is weight:
            return [weight]
        parameters = weight_parameters(layer)
        if call is None or call.leaf is None:
            return parameters
        if parameters and not accumulation.lives_in_grad(parameters):
            return parameters
        return [call.leaf]

    def _find_step(self, backward_pass: int, parameters: Sequence[Tensor], in_grad: bool) -> Step:
        """Return the step that this backward belongs to, a new one if it begins one."""
        if in_grad and not accumulation.adds_to_grad(parameters):
            step = self._returned_step
            if step is None or step.backward_pass != backward_pass or self.config.scope == "local":
                step = self._returned_step = Step(backward_pass)
            return step
        step = self._step
        if step is None or self._is_over(step, backward_pass, parameters, in_grad):
            step = self._step = Step(backward_pass, began_empty=not accumulation.has_grad(parameters))
            self.steps += 1
        return step

    def _is_over(self, step: Step, backward_pass: int, parameters: Sequence[Tensor], in_grad: bool) -> bool:
        if self.config.scope == "local":
            return True
        if step.backward_pass == backward_pass:
            return False
        if not in_grad:
            return step.closed
        if step.seen_grads is not None and step.seen_grads.were_replaced():
            return True
        if not accumulation.was_emptied(parameters):
            return False
        if self.has_engine and not step.closed:
            return False
        are_own_zeros = step.began_empty and accumulation.has_grad(parameters) and step.adds_up_to_zero()
        return not are_own_zeros

    def _look_at_grads(self, step: Step, parameters: Sequence[Tensor], call: ForwardCall | None) -> None:
        if call is not None and call.creates_graph:
            # Autograd makes a new tensor then, where it would else add to the old one.
            step.seen_grads = None
        # DDP moves `.grad` to other buckets after the first backward.
        elif not accumulation.has_process_group() and accumulation.has_grad(parameters):
            step.seen_grads = accumulation.SeenGrads(parameters)

    def _uncounted_sums(
        self, step: Step, call: ForwardCall | None, x: Tensor, spec: PatchSpec, keep: Tensor | None
    ) -> PatchSums | None:
        """Return the sums over the patches of this backward on all ranks; None if the step has them already."""
        is_counted = call is not None and call.number in step.counted_calls
        if is_counted and keep is None:
            return None
        self._hear_of_failure(x.device)
        new = patch_sums(x, spec, self.config.lam, self.sums_dtype)
        if not on_host(new.sums):
            self.sums_dtype = new.sums.dtype
        if self.config.scope == "global":
            new = accumulation.sum_over_ranks(new, self.process_group)
        if call is not None:
            step.counted_calls.add(call.number)
        if is_counted and keep is not None:
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
            missing, inverse = step.precondition(self.config.lam)
            warn_if_unsolved(self.warned, inverse, self.config.lam)
        else:
            missing = self._on_accelerator(step)
        if returned is not None:
            missing = missing - returned.to(missing.device)
        return missing.to(grad.dtype).contiguous()

    def _hear_of_failure(self, device: torch.device) -> None:
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

    def _on_accelerator(self, step: Step) -> Tensor:
        """Return the step's preconditioned gradient; after the first time, without waiting for the device.

        Then a factorisation that fails in float32 leaves that step its ordinary gradient. Once the host has heard of
        it, or that float32 loses lam, usually in the next step, it chooses float64.
        """
        assert step.total is not None
        lam = self.config.lam
        widest = widest_dtype(step.total.sums.device)
        if self.factor_dtype is None:
            missing, inverse = step.precondition(lam, self.sums_dtype)
            self.factor_dtype = self.sums_dtype
            if inverse.failed and inverse.finite:
                self.factor_dtype = widest
                missing, inverse = step.precondition(lam, self.factor_dtype)
                warn_if_unsolved(self.warned, inverse, lam)
            return missing
        missing, inverse = step.precondition(lam, self.factor_dtype)
        flag = inverse.failed if self.factor_dtype == widest else inverse.needs_float64
        if self._failure.send(flag):
            self._watched = inverse
        return missing


def _after_step(optimizer: Optimizer) -> None:
    for preconditioner in list(PRECONDITIONERS.values()):
        preconditioner.after_step(optimizer)


def _mask(step: Step, parameters: Sequence[Tensor]) -> Tensor | None:
    """Return whether the step's totals still count; None if they do, and not only the device knows.

    `zero_grad(set_to_none=False)` begins a step too, and on an accelerator the host cannot see that without waiting.
    """
    keep = accumulation.holds_gradient(parameters)
    if keep is None or step.grad is None or not step.began_empty:
        return keep
    # Zeros may be what the step has added up.
    return keep | ~step.grad.any().to(keep.device)


def _backward_pass_of(call: ForwardCall | None) -> int:
    """Return autograd's number of the running backward pass; in a reentrant checkpoint, that of the outer pass."""
    if call is not None and call.backward_pass >= 0:
        return call.backward_pass
    return torch._C._current_graph_task_id()
