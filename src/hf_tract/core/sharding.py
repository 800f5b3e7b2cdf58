"""Reads and writes a layer's whole weight, however the model is sharded: FSDP1, FSDP2, ZeRO, or not at all.

Neither FSDP nor DeepSpeed is imported here: unless something else has imported them, they have sharded nothing.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized


def is_sharded(model: nn.Module) -> bool:
    """Return whether a forward call gathers weights from other ranks, so that every rank must run it to its end."""
    if _fsdp_units(model, "FullyShardedDataParallel") or _fsdp_units(model, "FSDPModule"):
        return True
    return len(_zero_parameters([model])) > 0


@contextlib.contextmanager
def gathered_weights(model: nn.Module, layers: Iterable[nn.Module]) -> Iterator[None]:
    """Gather the weights of `layers`, for `read_weight` and `write_weight` inside this context; all ranks enter it."""
    for unit in _fsdp_units(model, "FSDPModule"):
        # A forward call leaves the root unsharded, and what is written in that state is lost.
        unit.reshard()
    with contextlib.ExitStack() as stack:
        units = _fsdp_units(model, "FullyShardedDataParallel")
        if units:
            stack.enter_context(type(units[0]).summon_full_params(model))
        partitioned = _zero_parameters(layers)
        if partitioned:
            zero = sys.modules["deepspeed"].zero
            stack.enter_context(zero.GatheredParameters(partitioned, modifier_rank=0))
        yield


def read_weight(layer: nn.Module) -> Tensor:
    """Return the whole weight, detached; gathered where FSDP2 has sharded it."""
    weight: Any = layer.weight
    if hasattr(weight, "full_tensor"):
        weight = weight.full_tensor()
    whole: Tensor = weight.detach()
    return whole


@torch.no_grad()
def write_weight(layer: nn.Module, value: Tensor) -> None:
    """Overwrite the whole weight, through its parametrization if it has one, and the copy in ZeRO's optimizer."""
    old: Any = layer.weight
    if hasattr(old, "full_tensor"):
        value = torch.distributed.tensor.distribute_tensor(value, old.device_mesh, old.placements)
    if is_parametrized(layer, "weight"):
        layer.weight = value
    else:
        old.copy_(value)
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None:
        for parameter in layer.parameters():
            deepspeed.utils.safe_set_full_fp32_param(parameter, parameter.detach().float())


def _fsdp_units(model: nn.Module, kind: str) -> list[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return []
    cls = getattr(fsdp, kind)
    return [module for module in model.modules() if isinstance(module, cls)]


def _zero_parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    parameters = nn.ModuleList(modules).parameters()
    return [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
