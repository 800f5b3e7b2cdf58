"""What one layer has gathered in an optimizer step, and what it hands on.

A step holds three things: the sums of p p^T over its patches with their count, its ordinary gradient, and the inverse by
which that gradient was last handed on. Each backward of the layer adds to the first two and hands on what is missing:
the whole gradient times the new inverse, less the same with the old ones. So the parts telescope, and whatever
accumulates them ends with the rule.

Shape letters as in `moments`: g groups, m rows of the weight, n columns of `weight.flatten(1)`.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import threading
from collections.abc import Iterator
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_tract.config import TrActConfig
from hf_tract.moments import Window, patch_sums
from hf_tract.precondition import DampedInverse
from hf_tract.sharding import engine_accumulates, lives_in_grad, weight_parameters

logger = logging.getLogger(__name__)

UNTRACKED = -1  # the forward call of a compiled graph, which cannot tell its runs apart
_keys = itertools.count()


class _Step:
    """The optimizer step that a layer is in: its patches' sums, its gradient, and the inverse that was last used."""

    def __init__(self, task: int) -> None:
        """Begins a step in the backward pass `task`."""
        self.task = task
        self.calls: set[int] = set()  # whose patches are in the sums
        self.closed = False  # only used where gradients do not live in `.grad`
        self.sums: Tensor | None = None  # (g * n * n + 1,)
        self.grad: Tensor | None = None  # (m, ...), the ordinary gradient
        self.inverse: DampedInverse | None = None

    def handed_on(self, keep: Tensor | None) -> Tensor | None:
        """Returns what the weight has got in this step so far: nothing where the device finds `keep` false."""
        if self.inverse is None or self.grad is None:
            return None
        return _where(keep, self.inverse(self.grad))

    def add(self, grad: Tensor, sums: Tensor, keep: Tensor | None = None) -> None:
        """Adds one backward to what is kept."""
        if self.grad is not None and self.sums is not None:
            grad = grad + _where(keep, self.grad).to(grad.device)
            sums = sums + _where(keep, self.sums).to(sums.device)
        self.grad, self.sums = grad, sums


def on_host(tensor: Tensor) -> bool:
    """Says whether looking at a value costs nothing."""
    return tensor.is_cpu


def _where(keep: Tensor | None, value: Tensor) -> Tensor:
    return value if keep is None else torch.where(keep.to(value.device), value, 0.0)


class LayerPreconditioner:
    """Multiplies the gradient of one layer's weight by inv(C + lam I).

    C = (1/b) sum of p p^T over all b patches whose gradient is in the weight's `.grad`, on all ranks. With the "local"
    scope C is that of each forward call of each process.

    Source:
        The rule: arXiv 2410.23970, section 3.
    """

    def __init__(self, layer: nn.Module, config: TrActConfig, process_group: Any = None) -> None:
        """Starts with nothing gathered.

        Args:
            layer: whose weight is preconditioned. It is not kept alive.
            config: the settings; its `layers` are not looked at.
            process_group: the ranks that share C; the default group where None.
        """
        self.key = next(_keys)
        self.config, self.process_group = config, process_group
        self.active = True  # false once TrAct was taken off
        self.steps = 0  # optimizer steps in which a gradient was handed on
        self.open_no_syncs = 0
        self.unsolved_was_told = self.second_order_was_told = False
        self._layer = ref(layer)
        self._step: _Step | None = None
        self._aside: _Step | None = None  # of a pass that does not add to `.grad`
        self._lock = threading.RLock()  # DataParallel's replicas share this object
        PRECONDITIONERS[self.key] = self

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Says that a backward inside is not the step's last, where `.grad` does not tell."""
        self.open_no_syncs += 1
        try:
            yield
        finally:
            self.open_no_syncs -= 1

    def precondition(
        self, grad: Tensor, x: Tensor, window: Window, call: int = UNTRACKED, task: int = -1, adds: bool = True
    ) -> Tensor:
        """Returns what the weight's gradient lacks of the rule after one more backward.

        Args:
            grad: the ordinary gradient of this backward, (m, ...).
            x: what the layer's operation read.
            window: the patches that it cut out of `x`.
            call: the forward call, so that a graph that is run again counts its patches once.
            task: the backward pass; the present graph task where -1.
            adds: whether the result ends in `.grad`; `torch.autograd.grad` returns it instead.

        Returns:
            (m, ...) in the gradient's dtype, contiguous.
        """
        if not self.active:
            return grad.clone()
        raw = grad.to(torch.promote_types(grad.dtype, torch.float32))
        if self.config.scope == "local":
            step = _Step(task)
            step.add(raw, patch_sums(x, window, self.config.lam))
            with self._lock:
                self._step = step
                self.steps += 1
                return self._hand_on(step, grad)
        with self._lock:
            task = torch._C._current_graph_task_id() if task < 0 else task
            step = self._step_of(task) if adds else self._step_aside(task)
            keep = self._still_accumulating(step, task)
            sums = self._new_sums(step, call, x, window, keep)
            handed_on = step.handed_on(keep)
            step.add(raw, sums, keep)
            step.closed = step.closed or not self._engine_accumulates()
            return self._hand_on(step, grad, handed_on)

    def stats(self) -> dict[str, float]:
        """Returns the gradient's norm before and after, and the condition number, as of the last backward."""
        with self._lock:
            step = self._step
            if step is None or step.grad is None or step.inverse is None:
                return {}
            self._tell_unsolved(step.inverse)
            norms = {"grad_norm_raw": step.grad.norm().item(), "grad_norm": step.inverse(step.grad).norm().item()}
            return {**norms, "condition": step.inverse.condition()}

    def last_inverse(self, adds: bool) -> DampedInverse:
        """Returns the inverse of the last backward: of one that adds to `.grad`, or of one that returns its gradient."""
        step = self._step if adds else self._aside
        assert step is not None
        assert step.inverse is not None
        return step.inverse

    def tell_second_order(self) -> None:
        """Warns once of a pass over a graph whose gradient was handed on differentiably before."""
        if not self.second_order_was_told:
            self.second_order_was_told = True
            logger.warning(
                "TrAct: a backward runs again over a forward whose weight gradient was taken with `create_graph=True`. What "
                "it gives the first layer is the exact derivative of that preconditioned gradient (C held fixed), and is not "
                "preconditioned again. If the loss itself shares this forward, give it a forward of its own. This is said "
                "once."
            )

    def _step_of(self, task: int) -> _Step:
        """Returns the step that the backward pass `task` belongs to."""
        step = self._step
        if step is None or (step.task != task and self._is_over(step)):
            step = self._step = _Step(task)
            self.steps += 1
        return step

    def _is_over(self, step: _Step) -> bool:
        """Says whether the step's gradient has been taken away, as far as the host can see."""
        parameters = self._parameters()
        if not lives_in_grad(parameters):
            return step.closed
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return not any(not on_host(grad) or bool(grad.any()) for grad in grads)

    def _still_accumulating(self, step: _Step, task: int) -> Tensor | None:
        """Returns whether `.grad` holds more than zeros, where a device must be asked; None where the host knows."""
        if step.task == task:
            return None
        step.task = task
        grads = [parameter.grad for parameter in self._parameters() if parameter.grad is not None]
        if not grads or all(on_host(grad) for grad in grads) or not lives_in_grad(self._parameters()):
            return None
        return torch.stack([grad.any().to(grads[0].device) for grad in grads]).any()

    def _step_aside(self, task: int) -> _Step:
        """Returns the step of a pass whose gradients are returned and not added to `.grad`."""
        if self._aside is None or self._aside.task != task:
            self._aside = _Step(task)
        return self._aside

    def _parameters(self) -> list[nn.Parameter]:
        layer = self._layer()
        return [] if layer is None else weight_parameters(layer)

    def _engine_accumulates(self) -> bool:
        return self.open_no_syncs > 0 or engine_accumulates()

    def _new_sums(self, step: _Step, call: int, x: Tensor, window: Window, keep: Tensor | None) -> Tensor:
        """Returns the sums that a backward adds: those of its patches, on all ranks, unless they are in already."""
        counted = call in step.calls
        if call != UNTRACKED:
            step.calls.add(call)
        if counted and keep is None and step.sums is not None:
            return torch.zeros_like(step.sums)
        sums = patch_sums(x, window, self.config.lam)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(self.process_group) > 1:
            sums = sums.double()  # of all ranks in one precision, which each chooses by its own patches
            dist.all_reduce(sums, group=self.process_group)
        if counted and keep is not None:
            sums = torch.where(keep.to(sums.device), 0.0, sums)
        return sums

    def _hand_on(self, step: _Step, grad: Tensor, handed_on: Tensor | None = None) -> Tensor:
        assert step.sums is not None
        assert step.grad is not None
        n = math.prod(grad.shape[1:])
        moment = (step.sums[:-1] / step.sums[-1].clamp(min=1)).view(-1, n, n)
        step.inverse = DampedInverse(moment, self.config.lam)
        if on_host(grad):
            self._tell_unsolved(step.inverse)
        missing = step.inverse(step.grad)
        if handed_on is not None:
            missing = missing - handed_on.to(missing.device)
        out = missing.to(grad.dtype).contiguous()
        return out.clone() if out is step.grad or out is grad else out

    def _tell_unsolved(self, inverse: DampedInverse) -> None:
        """Warns once of a step that could not be factorised; waits for the device."""
        if self.unsolved_was_told or bool(inverse.solved) or not bool(inverse.finite):
            return
        self.unsolved_was_told = True
        logger.warning(
            "TrAct: C + lam I (lam=%g) could not be factorised, in float64 neither: the first layer keeps its ordinary "
            "gradient in such steps. Normalise the pixels or raise lam. This is said once.",
            self.config.lam,
        )


PRECONDITIONERS: WeakValueDictionary[int, LayerPreconditioner] = WeakValueDictionary()
