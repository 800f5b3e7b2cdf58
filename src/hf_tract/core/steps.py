"""Decides which optimizer step a backward belongs to: see "What begins a step" in README.md beside this file."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_tract.core import accumulation
from hf_tract.core.optimizer_hook import call_after_steps, updated_by
from hf_tract.core.present import PresentSteps
from hf_tract.core.step import ForwardCall, Step
from hf_tract.core.weights import weight_parameters

_sequences: WeakSet[StepSequence] = WeakSet()


@dataclass(frozen=True, eq=False)
class Backward:
    """Describes a running backward of a layer."""

    # Autograd's number of the pass.
    number: int
    # Those that the weight consists of, or is computed from.
    parameters: Sequence[Tensor]
    # Whether their `.grad` holds what has been accumulated.
    lives_in_grad: bool
    call: ForwardCall | None
    # Of the gradient.
    shape: torch.Size
    # What the layer ran with where that is a leaf other than its own weight, as by `functional_call`.
    other_leaf: Tensor | None

    @functools.cached_property
    def was_emptied(self) -> bool:
        """Return whether `.grad` of the parameters is empty, as far as the host can see."""
        return accumulation.was_emptied(self.parameters)


class StepSequence:
    """Holds the present step of one layer, and begins the next one."""

    def __init__(self, layer: nn.Module) -> None:
        """Start without a step; only a weak reference to `layer` is kept."""
        # Steps begun.
        self.count = 0
        self._layer = ref(layer)
        self._present = PresentSteps()
        # How many contexts of `left_open` are entered.
        self._left_open = 0
        # FSDP2 empties `.grad` after a micro-step, in whose backward the weight looks like an ordinary parameter.
        self._has_engine = False
        self._look_for_engine()
        _sequences.add(self)
        call_after_steps(_after_step)

    @contextlib.contextmanager
    def left_open(self) -> Iterator[None]:
        """Mark the backwards inside as not the last of their step, for engines that keep gradients elsewhere."""
        self._look_for_engine()
        self._left_open += 1
        try:
            yield
        finally:
            self._left_open -= 1

    def after_step_of(self, optimizer: Optimizer) -> None:
        """Remember what `.grad` of the weight holds if `optimizer` has just used it."""
        for leaf, steps in self._present.by_leaf():
            if not steps:
                continue
            held: list[Tensor] = []
            if leaf is None:
                held += weight_parameters(self.layer)
            else:
                held.append(leaf)
            parameters = updated_by(optimizer, held)
            if not accumulation.lives_in_grad(parameters):
                continue
            for step in steps:
                step.seen_grads = accumulation.SeenGrads(parameters)
                # From now on zeros in `.grad` are an emptied one.
                step.began_empty = False

    def backward_of(self, call: ForwardCall | None, shape: torch.Size) -> Backward:
        """Return what there is to know about the running backward.

        Args:
            call: the forward call; None in a compiled graph.
            shape: of the gradient.
        """
        parameters = self._parameters_of(call)
        lives_in_grad = accumulation.lives_in_grad(parameters)
        other_leaf = None
        if call is not None and lives_in_grad and call.leaf is not self._own_weight():
            other_leaf = call.leaf
        return Backward(_backward_pass_of(call), parameters, lives_in_grad, call, shape, other_leaf)

    @property
    def layer(self) -> nn.Module | None:
        """Return the layer, while something else keeps it."""
        return self._layer()

    def has_as_parameter(self, weight: Tensor) -> bool:
        """Return whether a tensor is registered as the layer's weight, and not computed by the layer."""
        return weight is self._own_weight()

    def is_frozen(self) -> bool:
        """Return whether the layer's weight is a parameter that requires no gradient any more."""
        weight = self._own_weight()
        return weight is not None and not weight.requires_grad

    def _own_weight(self) -> Tensor | None:
        layer = self.layer
        return layer._parameters.get("weight") if layer else None

    def _parameters_of(self, call: ForwardCall | None) -> Sequence[Tensor]:
        """Return the parameters that the weight consists of, or is computed from.

        This is the parameter that the forward call used, since the layer may have another one by now. Where an engine
        keeps gradients outside of `.grad`, it is the layer's own parameters, as only these show that.
        """
        weight = self._own_weight()
        if call is not None and weight is not None and call.leaf is weight:
            return [weight]
        parameters = weight_parameters(self.layer)
        if call is None or call.leaf is None:
            return parameters
        if parameters and not accumulation.lives_in_grad(parameters):
            return parameters
        return [call.leaf]

    def step_of(self, backward: Backward, is_local: bool) -> Step:
        """Return the step that a backward belongs to, a new one if it begins one or if each does (`is_local`)."""
        leaf = backward.other_leaf
        shape = backward.shape
        number = backward.number
        computed = self._computed_weight(backward)
        if computed is not None:
            return self._present.in_pass(number, computed, shape, is_local)
        if _is_returned(backward):
            return self._present.in_pass(number, leaf, shape, is_local)
        step = self._present.find(leaf, shape)
        if step is None or is_local or self._is_over(step, backward):
            step = _new_step(backward)
            self._present.begin(leaf, shape, step, backward.was_emptied)
            self.count += 1
        return step

    def _computed_weight(self, backward: Backward) -> Tensor | None:
        """Return the weight that other parameters computed: it has no `.grad`. FSDP1 puts such a one there too."""
        if backward.call is None or self._has_engine:
            return None
        if not backward.lives_in_grad:
            return None
        return backward.call.computed

    def _is_over(self, step: Step, backward: Backward) -> bool:
        if step.backward_pass == backward.number:
            return False
        if not backward.lives_in_grad:
            return step.closed
        if step.seen_grads is not None and step.seen_grads.were_replaced(backward.parameters):
            return True
        if not backward.was_emptied:
            return False
        if self._has_engine and not step.closed:
            return False
        are_own_zeros = step.began_empty and accumulation.has_grad(backward.parameters) and step.adds_up_to_zero()
        return not are_own_zeros

    def enter(self, step: Step, backward: Backward) -> Tensor | None:
        """Begin a backward of a step that `step_of` has returned.

        Returns:
            A flag on an accelerator, whether the step's totals still count; None if they do.
        """
        step.closed = not (self._left_open or accumulation.engine_accumulates())
        is_same_pass = step.backward_pass == backward.number
        step.backward_pass = backward.number
        if backward.call is not None and backward.call.creates_graph:
            # Autograd makes a new tensor then, where it would else add to the one in `.grad`.
            step.seen_grads = None
        if self.count == 1 and torch._C._current_graph_task_id() >= 0:
            torch.autograd.Variable._execution_engine.queue_callback(self._look_for_engine)
        if is_same_pass or not backward.lives_in_grad:
            return None
        return _mask(step, backward.parameters)

    def _look_for_engine(self) -> None:
        """Look whether an engine keeps the gradients; in its forward and backward the parameters do not show it."""
        self._has_engine = self._has_engine or accumulation.has_engine(weight_parameters(self.layer))


def _backward_pass_of(call: ForwardCall | None) -> int:
    """Return autograd's number of the running backward pass; in a reentrant checkpoint, that of the outer pass."""
    if call is not None and call.backward_pass >= 0:
        return call.backward_pass
    return torch._C._current_graph_task_id()


def _is_returned(backward: Backward) -> bool:
    """Return whether this is `torch.autograd.grad`, which returns gradients and adds nothing to `.grad`."""
    if not backward.lives_in_grad:
        return False
    return not accumulation.adds_to_grad(backward.parameters)


def _after_step(optimizer: Optimizer) -> None:
    for sequence in list(_sequences):
        sequence.after_step_of(optimizer)


def _new_step(backward: Backward) -> Step:
    step = Step(backward.number, began_empty=not accumulation.has_grad(backward.parameters))
    if backward.lives_in_grad and not backward.was_emptied:
        # A penalty has filled `.grad`, and will fill it with another tensor in the next step.
        step.seen_grads = accumulation.SeenGrads(backward.parameters)
    return step


def _mask(step: Step, parameters: Sequence[Tensor]) -> Tensor | None:
    """Return whether the step's totals still count: None if the host knows that they do, else a flag on the device.

    `zero_grad(set_to_none=False)` begins a step too, and on an accelerator the host cannot see that without waiting.
    """
    keep = accumulation.holds_gradient(parameters)
    if keep is None or step.grad is None or not step.began_empty:
        return keep
    # Zeros may be what the step has added up.
    return keep | ~step.grad.any().to(keep.device)
