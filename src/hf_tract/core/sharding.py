"""A layer's whole weight, read and written, however the model is sharded: FSDP1, FSDP2, ZeRO, or not at all."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward gathers weights, so that every rank must run all of it."""
    return bool(_by_fsdp1(model) or _by_fsdp2(model)) or any(map(_by_zero, model.parameters()))


@contextlib.contextmanager
def gathered_weights(model: nn.Module, layers: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, on every rank at once, `read_weight` and `write_weight` work on these layers of `model`."""
    for unit in _by_fsdp2(model):
        unit.reshard()  # a forward leaves the root unsharded, and what is written then is lost
    with contextlib.ExitStack() as stack:
        if units := _by_fsdp1(model):
            stack.enter_context(type(units[0]).summon_full_params(model))
        if partitioned := [parameter for layer in layers for parameter in layer.parameters() if _by_zero(parameter)]:
            stack.enter_context(sys.modules["deepspeed"].zero.GatheredParameters(partitioned, modifier_rank=0))
        yield


def read_weight(layer: nn.Module) -> Tensor:
    """The whole weight, detached; where FSDP2 has sharded it, gathered."""
    weight: Any = layer.weight
    whole: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return whole.detach()


@torch.no_grad()
def write_weight(layer: nn.Module, value: Tensor) -> None:
    """Writes the whole weight in place, also through a parametrization, and into what ZeRO's optimizer keeps of it."""
    old: Any = layer.weight
    if hasattr(old, "full_tensor"):
        value = torch.distributed.tensor.distribute_tensor(value, old.device_mesh, old.placements)
    if is_parametrized(layer, "weight"):
        layer.weight = value
    else:
        old.copy_(value)
    if deepspeed := sys.modules.get("deepspeed"):
        for parameter in layer.parameters():
            deepspeed.utils.safe_set_full_fp32_param(parameter, parameter.detach().float())


def _by_fsdp1(model: nn.Module) -> list[Any]:
    return _fsdp_units(model, "FullyShardedDataParallel")


def _by_fsdp2(model: nn.Module) -> list[Any]:
    return _fsdp_units(model, "FSDPModule")


def _fsdp_units(model: nn.Module, kind: str) -> list[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # what is not imported has sharded nothing
    return [module for module in model.modules() if isinstance(module, getattr(fsdp, kind))] if fsdp else []


def _by_zero(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_id")
