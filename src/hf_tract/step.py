"""What one optimizer step gathers for one layer: moments over calls, micro-steps and ranks, and gradients held back.

A forward call opens with its payload and its backward closes with the same one: the sums of `patch_moments` and their
count, flat, g * n * n + 1. The autograd graph owns it, so a forward whose graph is dropped without a backward leaves
nothing behind.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from hf_tract.average import KeptMoment
from hf_tract.config import TrActConfig
from hf_tract.precondition import DampedInverse

logger = logging.getLogger(__name__)


class _Call:
    """One forward call whose gradient is still to come."""

    def __init__(self, payload: Tensor, step: _Step) -> None:
        self.ref = TensorWeakRef(payload)  # dead once the call's graph is gone
        self.step = step
        self.reduced: Tensor | None = None  # the payload summed over ranks, once `work` is done
        self.work: Any = None
        self.has_held = False  # whether `reduced` brings the moments of earlier micro-steps too


class _Step:
    """The calls that share one second moment; sealed by the first gradient that is released."""

    def __init__(self, inverses: dict[torch.device, DampedInverse] | None = None) -> None:
        """With the `inverses` of an earlier step it takes no moment of its own."""
        self.fresh = inverses is None
        self.inverses = {} if inverses is None else inverses
        self.finite: Tensor | None = None  # where a kept moment stands in for a non-finite one
        self.raw: Tensor | None = None
        self.sealed = False


class LayerStep:
    """One tapped layer's settings and the optimizer step that it is in.

    Nothing outlives that step but, where the settings ask for it, `kept` and the number of steps.
    """

    def __init__(self, config: TrActConfig, process_group: Any = None) -> None:
        """Starts with nothing gathered.

        Args:
            config: the settings; its `layers` are not looked at.
            process_group: the data-parallel ranks; the default group where None.
        """
        self.key = next(_keys)
        self.calls = torch.zeros((), dtype=torch.int64)
        self.held_back = 0  # how many `no_sync` are open
        self._lock = threading.RLock()  # DataParallel replicas share this object
        self._warned = False
        LAYERS[self.key] = self
        self.configure(config, process_group)

    def configure(self, config: TrActConfig, process_group: Any = None) -> None:
        """Starts anew under these settings."""
        with self._lock:
            self.config, self.process_group = config, process_group
            self.kept, self.steps = KeptMoment(config.ema, config.lam), 0
            self.reset()

    def reset(self) -> None:
        """Forgets what the present step has gathered."""
        with self._lock:
            self._calls: list[_Call] = []
            self._step = self.last = self._new_step({})
            self._held: Tensor | None = None
            self._held_grad: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerStep:
        """A copy for a copied layer: the same settings, a step of its own."""
        return LayerStep(self.config, self.process_group)

    def __reduce__(self) -> tuple[Any, ...]:
        """Process groups do not pickle: what is loaded uses the default one."""
        return LayerStep, (self.config,)

    def state_dict(self) -> dict[str, Any]:
        """What outlives a step: empty unless the settings keep a moment, or before the first step."""
        return {} if self.kept.sums is None else {"kept": self.kept.sums.cpu(), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Goes on from what `state_dict` gave, or anew."""
        with self._lock:
            self.configure(self.config, self.process_group)
            if state:
                self.kept.sums, self.steps = state["kept"].clone(), state["steps"]
                self.reset()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients are held back while this is open, as accelerate's `accumulate` does by itself."""
        self.held_back += 1
        try:
            yield
        finally:
            self.held_back -= 1

    def accumulating(self) -> bool:
        """Whether another micro-step follows before the optimizer steps."""
        state = sys.modules.get("accelerate.state")  # also set by Trainer; not imported: nothing to ask
        return self.held_back > 0 or (state is not None and not state.GradientState().sync_gradients)

    def takes_moment(self) -> bool:
        """Whether the forward call that begins is to compute its payload."""
        with self._lock:
            if self._step.sealed:
                self._step = self._new_step(self.last.inverses)
            return self._step.fresh

    def open(self, payload: Tensor) -> None:
        """Enters a forward call and, on the micro-step that synchronises, starts its sum over ranks."""
        if self.config.scope == "local":
            return
        with self._lock:
            call = self._enter(payload)
            if call.step.fresh and not self.accumulating() and self._ranks() > 1:
                self._reduce(call, payload)

    def close(self, grad: Tensor, payload: Tensor) -> Tensor:
        """The gradient to hand on: preconditioned, or zero while gradients are held back.

        Args:
            grad: the ordinary gradient of the weight, (m, ...).
            payload: the call's own, (g * n * n + 1).
        """
        with self._lock:
            if self.config.scope == "local":
                step = _Step()
                step.inverses[grad.device] = self._inverse(step, payload, grad)
                return self._finish(step, grad)
            # A payload that autograd recomputed or moved (checkpointing, offload) has lost its call: enter it again.
            call = next((c for c in self._calls if c.ref() is payload), None) or self._enter(payload)
            if self.accumulating():
                self._calls.remove(call)
                self._held = payload.clone() if self._held is None else self._held + payload
                raw = grad.to(payload.dtype)
                self._held_grad = raw.clone() if self._held_grad is None else self._held_grad + raw
                return torch.zeros_like(grad)
            step = call.step
            if grad.device not in step.inverses:
                taken = step.fresh and not (step.sealed and self.config.keeps_moment)
                step.inverses[grad.device] = self._inverse(step, self._total(step, payload.device) if taken else None, grad)
            held, self._held, self._held_grad = self._held_grad, None, None
            return self._finish(step, grad, held)

    def stats(self) -> dict[str, float]:
        """Gradient norm before and after, and condition number, of the last step that handed on a gradient."""
        with self._lock:
            if self.last.raw is None:
                return {}
            raw = self.last.raw
            inverse = self.last.inverses[raw.device]
            norms = {"grad_norm_raw": raw.norm().item(), "grad_norm": inverse(raw).norm().item()}
            return {**norms, "condition": inverse.condition()}

    def _enter(self, payload: Tensor) -> _Call:
        self._calls = [c for c in self._calls if c.ref() is not None]
        call = _Call(payload, self._step)
        self._calls.append(call)
        return call

    def _ranks(self) -> int:
        return dist.get_world_size(self.process_group) if dist.is_available() and dist.is_initialized() else 1

    def _all_reduce(self, payload: Tensor) -> Any:
        return dist.all_reduce(payload, group=self.process_group, async_op=True)

    def _reduce(self, call: _Call, payload: Tensor) -> None:
        """Starts the all-reduce of a call; the first one of a step carries what earlier micro-steps gathered."""
        call.reduced = payload.clone()
        if self._held is not None and not any(peer.has_held for peer in self._peers(call.step)):
            call.has_held = True
            call.reduced += self._held
        call.work = self._all_reduce(call.reduced)

    def _peers(self, step: _Step) -> list[_Call]:
        return [c for c in self._calls if c.step is step and c.ref() is not None]

    def _total(self, step: _Step, device: torch.device) -> Tensor:
        """The payload of the whole step: every live call of it, every micro-step, every rank."""
        parts, peers, distributed = [], self._peers(step), self._ranks() > 1
        for call in peers:
            payload = call.ref()
            if distributed and call.reduced is None:
                self._reduce(call, payload)
            if call.work is not None:
                call.work.wait()
                call.work = None
            parts.append(payload if call.reduced is None else call.reduced)
        if self._held is not None and not any(call.has_held for call in peers):  # its carrier was dropped, or one process
            if distributed:
                self._all_reduce(self._held).wait()
            parts.append(self._held)
        return functools.reduce(torch.add, (part.to(device) for part in parts))

    def _inverse(self, step: _Step, total: Tensor | None, grad: Tensor) -> DampedInverse:
        """Of the step's `total` payload, or of what was kept."""
        n = math.prod(grad.shape[1:])
        if total is None:
            moment = self.kept.mean(grad.device, n)
        else:
            moment = (total[:-1] / total[-1].clamp(min=1)).view(-1, n, n)
            if self.config.keeps_moment:
                step.finite = self.kept.update(moment, total[-1])
                moment = self.kept.mean(grad.device, n)
        return DampedInverse(moment, self.config.lam)

    def _finish(self, step: _Step, grad: Tensor, held: Tensor | None = None) -> Tensor:
        """Preconditions one gradient and what was held back of it."""
        inverse = step.inverses[grad.device]
        raw = grad if held is None else grad + held.to(grad.device)
        step.raw = raw if step.raw is None else step.raw + raw.to(step.raw.device)
        self.last = step
        if not step.sealed:
            step.sealed = True
            self.steps += 1
        if raw.is_cpu and inverse.finite and not inverse.solved and not self._warned:
            self._warned = True
            logger.warning(UNSOLVED, self.config.lam)
        out = inverse(raw).to(grad.dtype)
        return out if step.finite is None else torch.where(step.finite.to(out.device), out, torch.nan)

    def _new_step(self, inverses: dict[torch.device, DampedInverse]) -> _Step:
        """The step that follows, on the `inverses` of the last one if it is not its turn to take a moment."""
        return _Step() if self.steps % self.config.every == 0 else _Step(inverses)


UNSOLVED = (
    "TrAct: C + lam I (lam=%g) could not be factorised, in float64 neither: the first layer keeps its ordinary gradient "
    "in such steps. Normalise the pixels or raise lam. This is said once."
)
_keys = itertools.count()
LAYERS: WeakValueDictionary[int, LayerStep] = WeakValueDictionary()
