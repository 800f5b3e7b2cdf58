"""What one layer has gathered in an optimizer step, and what it hands on.

A step holds three things: the sums of p p^T over its patches with their count, its ordinary gradient, and the inverse by
which that gradient was last handed on. Each backward of the layer adds to the first two and hands on what is missing:
the whole gradient times the new inverse, less the same with the old ones. So the parts telescope, and whatever
accumulates them ends with the rule.

Shape letters as in `moments`: g groups, m rows of the weight, n columns of `weight.flatten(1)`.
"""

from __future__ import annotations

import itertools
import math
import threading
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor, nn

from hf_tract.config import TrActConfig
from hf_tract.core import accumulation
from hf_tract.core.forward_call import ForwardCall
from hf_tract.core.moments import patch_sums
from hf_tract.core.notices import look_for_other_uses, tell_unsolved
from hf_tract.core.patches import PatchSpec
from hf_tract.core.solve import DampedInverse, on_host
from hf_tract.core.weights import weight_parameters

_keys = itertools.count()
PRECONDITIONERS: WeakValueDictionary[int, LayerPreconditioner] = WeakValueDictionary()


class _Step:
    """The optimizer step that a layer is in: its patches' sums, its gradient, and the inverse that was last used."""

    def __init__(self, task: int) -> None:
        """Begins a step in the backward pass `task`."""
        self.task = task
        self.calls: set[int] = set()  # whose patches are in the sums
        self.closed = False  # by an engine that keeps gradients outside of `.grad`
        self.sums: Tensor | None = None  # (g * n * n + 1,)
        self.grad: Tensor | None = None  # (m, ...), the ordinary gradient
        self.inverse: DampedInverse | None = None

    def handed_on(self, keep: Tensor | None = None) -> Tensor | None:
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
        self.open_no_syncs = 0  # the user's word, where `.grad` does not tell which backward is the step's last
        self.told: set[str] = set()
        self.last_step: _Step | None = None
        self.sums_dtype: torch.dtype | None = (
            None  # on an accelerator, as chosen in the first backward, which waits for it
        )
        self._layer = ref(layer)
        self._step: _Step | None = None
        self._aside: _Step | None = None  # of a pass that does not add to `.grad`
        self._lock = threading.RLock()  # DataParallel's replicas share this object
        PRECONDITIONERS[self.key] = self

    def precondition(self, grad: Tensor, x: Tensor, spec: PatchSpec, call: ForwardCall | None = None) -> Tensor:
        """Returns what the weight's gradient lacks of the rule after one more backward.

        Args:
            grad: the ordinary gradient of this backward, (m, ...).
            x: what the layer's operation read.
            spec: the patches that it cut out of `x`.
            call: the forward call, so that a graph that is run again counts its patches once; None in a compiled graph.

        Returns:
            (m, ...) in the gradient's dtype, contiguous.
        """
        if not self.active:
            return grad.clone()
        task = call.task if call is not None and call.task >= 0 else torch._C._current_graph_task_id()
        parameters = self._parameters(call)
        with self._lock:
            step = self.last_step = self._step_of(task, parameters)
            keep = None
            if step.task != task:
                step.task, keep = task, accumulation.holds_gradient(parameters)
            handed_on = step.handed_on(keep)
            sums = self._new_sums(step, call, x, spec, keep)
            step.add(grad.detach().to(torch.promote_types(grad.dtype, torch.float32)), sums, keep)
            step.closed = step.closed or not (self.open_no_syncs or accumulation.engine_accumulates())
            if self.steps == 1 and step.inverse is None and self._is_alone(call, parameters):
                look_for_other_uses(self.told, parameters[0], step.handed_on)
            return self._hand_on(step, grad, handed_on)

    def stats(self) -> dict[str, float]:
        """Returns the gradient's norm before and after, and figures of C, as of the last backward."""
        with self._lock:
            step = self.last_step
            if step is None or step.grad is None or step.inverse is None:
                return {}
            tell_unsolved(self.told, step.inverse, self.config.lam)
            norms = {"grad_norm_raw": step.grad.norm().item(), "grad_norm": step.inverse(step.grad).norm().item()}
            return {**norms, "condition": step.inverse.condition(), "mean_eigenvalue": step.inverse.mean_eigenvalue}

    def _parameters(self, call: ForwardCall | None) -> list[nn.Parameter]:
        """Returns what the weight is made of: in the call's own graph, if it is one leaf that no engine manages."""
        parameters = weight_parameters(self._layer())
        if call is not None and isinstance(call.leaf, nn.Parameter):
            return [call.leaf] if not parameters or accumulation.lives_in_grad(parameters) else parameters
        return parameters

    def _is_alone(self, call: ForwardCall | None, parameters: list[nn.Parameter]) -> bool:
        """Says whether `.grad` is to be just what this layer of this process hands on."""
        if call is None or call.leaf is None or parameters[0] is not call.leaf or parameters[0].grad is not None:
            return False
        return self.config.scope == "global" and accumulation.ranks_of(self.process_group) == 1

    def _step_of(self, task: int, parameters: list[nn.Parameter]) -> _Step:
        """Returns the step that the backward pass `task` belongs to."""
        in_grad, local = accumulation.lives_in_grad(parameters), self.config.scope == "local"
        if in_grad and not accumulation.adds_to_grad(parameters):
            if self._aside is None or self._aside.task != task or local:
                self._aside = _Step(task)
            return self._aside
        step, is_over = self._step, local
        if step is not None and step.task != task and not local:
            is_over = accumulation.was_emptied(parameters) if in_grad else step.closed
        if step is None or is_over:
            step = self._step = _Step(task)
            self.steps += 1
        return step

    def _new_sums(
        self, step: _Step, call: ForwardCall | None, x: Tensor, spec: PatchSpec, keep: Tensor | None
    ) -> Tensor:
        """Returns the sums that a backward adds: those of its patches, on all ranks, unless they are in already."""
        counted = call is not None and call.number in step.calls
        if call is not None:
            step.calls.add(call.number)
        if counted and keep is None and step.sums is not None:
            return torch.zeros_like(step.sums)
        sums = patch_sums(x, spec, self.config.lam, self.sums_dtype)
        if not on_host(sums):
            self.sums_dtype = sums.dtype
        if self.config.scope == "global":
            sums = accumulation.sum_over_ranks(sums, self.process_group)
        return _where(~keep, sums) if counted and keep is not None else sums

    def _hand_on(self, step: _Step, grad: Tensor, handed_on: Tensor | None) -> Tensor:
        assert step.sums is not None and step.grad is not None  # noqa: PT018 both are there after `add`
        n = math.prod(grad.shape[1:])
        moment = (step.sums[:-1] / step.sums[-1].clamp(min=1)).view(-1, n, n)
        step.inverse = DampedInverse(moment, self.config.lam)
        if on_host(grad):
            tell_unsolved(self.told, step.inverse, self.config.lam)
        missing = step.inverse(step.grad)
        if handed_on is not None:
            missing = missing - handed_on.to(missing.device)
        out = missing.to(grad.dtype).contiguous()
        return out.clone() if out is step.grad or out is grad else out
