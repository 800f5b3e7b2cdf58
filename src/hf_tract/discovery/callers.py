"""Finds the modules whose own forward reads a layer's weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from hf_tract.core.sharding import is_sharded
from hf_tract.discovery.first_layer import BY_TIMM, REACHED, FirstLayer
from hf_tract.discovery.tracing import LayerInput
from hf_tract.discovery.trials import trial_runs
from hf_tract.discovery.wrappers import unwrap, without_wrappers


def find_functional_callers(
    model: nn.Module, layers: Sequence[FirstLayer], example_batch: Any = None
) -> list[tuple[nn.Module, list[nn.Module]]]:
    """Return the modules whose own forward uses the weight of one of `layers` directly, each with those layers.

    They are found in a trial run; if none reaches a layer, nothing is returned.
    """
    sharded = is_sharded(model)
    model = unwrap(model)
    # Layers that are known to run their own forward need no check.
    names = {layer.name for layer in layers if layer.source not in (REACHED, BY_TIMM)}
    if sharded or not names:
        return []
    modules = dict(model.named_modules())
    callers: dict[nn.Module, list[nn.Module]] = {}
    for each in _layer_inputs(model, names, example_batch):
        # In evaluation mode, in which it is tried, a model may have other modules.
        is_known = each.layer in modules and each.module in modules
        if is_known and each.module != each.layer and without_wrappers(each.layer) in names:
            read = callers.setdefault(modules[each.module], [])
            if modules[each.layer] not in read:
                read.append(modules[each.layer])
    return list(callers.items())


def _layer_inputs(model: nn.Module, names: set[str], example_batch: Any) -> list[LayerInput]:
    """Return what the layers read in the first trial run that reaches all of `names`, else in the longest one.

    If it reaches any on the meta device, it is not tried with values.
    """
    found: list[LayerInput] = []
    for device, probe in trial_runs(model, example_batch):
        if found and device != "meta":
            break
        if names <= {without_wrappers(each.layer) for each in probe.inputs}:
            return probe.inputs
        if len(probe.inputs) > len(found):
            found = probe.inputs
    return found
