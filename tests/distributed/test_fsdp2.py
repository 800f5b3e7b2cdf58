"""Works with: FSDP2 (`fully_shard`). The gradient is preconditioned before it is sharded: nothing is gathered."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from accelerate.state import GradientState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from helpers.oracle import assert_close
from helpers.ranks import COLUMNS, STEPS, Net, flat, fsdp2_no_sync, on_two_ranks, one_process, train
from hf_tract import apply_tract
from hf_tract.core.attach import TrActLayer

UNITS = {"the root's": [], "a unit of its own": ["embed.0"], "inside a unit": ["embed"]}
SIZES = [[5, 3], [2, 2]]
SCENARIOS = {
    f"{unit}, {when}, reshard {reshard}": (unit, when, reshard)
    for unit in UNITS
    for when in ("before", "after")
    for reshard in (True, False)
}
# To save memory FSDP2 may reduce each micro-step, which empties `.grad`; TrAct is told by its own `no_sync`, or by
# accelerate's flag.
EACH_REDUCED = "reduced in each micro-step"
BY_ACCELERATE = "reduced in each micro-step of accelerate"
for when in ("before", "after"):
    for how in (EACH_REDUCED, BY_ACCELERATE):
        SCENARIOS[f"the root's, {when}, {how}"] = ("the root's", when, True)


@contextmanager
def accelerates_flag():
    state = GradientState()
    state._set_sync_gradients(False)
    yield
    state._set_sync_gradients(True)


def job(rank: int, name: str) -> tuple[torch.Tensor, list[int], str, str]:
    unit, when, reshard = SCENARIOS[name]
    model, mesh = Net(), init_device_mesh("cpu", (2,))
    if when == "before":
        handle = apply_tract(model, lam=0.1)
    for part in [*UNITS[unit], ""]:
        fully_shard(model.get_submodule(part), mesh=mesh, reshard_after_forward=reshard)
    if when == "after":
        handle = apply_tract(model, lam=0.1)

    no_sync = partial(fsdp2_no_sync, model, handle)
    if name.endswith(EACH_REDUCED):
        no_sync = handle.no_sync
    elif name.endswith(BY_ACCELERATE):
        no_sync = accelerates_flag
    collectives = train(model, rank, SIZES, no_sync)
    stem = model.embed[0]
    during, weights = type(stem).__name__, flat(model)
    assert isinstance(stem, TrActLayer)
    handle.remove()
    assert not isinstance(stem, TrActLayer)
    model(torch.zeros(1, 3, 8, 8).double()).sum().backward()  # what is left is FSDP2's own
    return weights, collectives, during, type(stem).__name__


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return on_two_ranks(tmp_path_factory.mktemp("fsdp2"), job, list(SCENARIOS))


@pytest.mark.parametrize("name", SCENARIOS)
def test_equals_one_process_with_one_collective_for_each_backward(results, name):
    (weights, collectives, during, after), (others, *_) = (rank[name] for rank in results)
    assert torch.equal(weights, others)
    assert_close(weights, one_process(sum(map(sum, SIZES))), 1e-10)
    assert collectives == [COLUMNS**2 + 1] * STEPS * 2
    assert "TrAct" in during
    assert after == ("FSDPConv2d" if SCENARIOS[name][0] == "a unit of its own" else "Conv2d")
