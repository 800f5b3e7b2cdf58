"""Works with: FSDP1 (`FullyShardedDataParallel`), with original parameters or without, before or after."""

import logging
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from helpers.oracle import assert_close
from helpers.ranks import COLUMNS, STEPS, Net, fsdp1_no_sync, on_two_ranks, one_process, train
from hf_tract import apply_tract

SIZES = [[5, 3], [2, 2]]
SCENARIOS = {
    f"original parameters {original}, {when}, {'the stem wrapped' if wrapped else 'one unit'}": (
        original,
        when,
        wrapped,
    )
    for original in (True, False)
    for when in ("before", "after")
    for wrapped in (True, False)
}


def job(rank: int, name: str) -> tuple[torch.Tensor, list[int], list[str]]:
    original, when, wrapped = SCENARIOS[name]
    warnings.simplefilter("ignore", FutureWarning)  # torch deprecates FSDP1
    model, messages = Net(), []
    logging.getLogger("hf_tract").addHandler(log := logging.Handler())
    log.emit = lambda record: messages.append(record.getMessage())
    if when == "before":
        handle = apply_tract(model, lam=0.1)
    sharded = FullyShardedDataParallel(
        model,
        sharding_strategy=ShardingStrategy.FULL_SHARD,
        use_orig_params=original,
        device_id=torch.device("cpu"),
        auto_wrap_policy=ModuleWrapPolicy({nn.Sequential}) if wrapped else None,
    )
    if when == "after":
        handle = apply_tract(sharded, lam=0.1)
    logging.getLogger("hf_tract").removeHandler(log)
    collectives = train(sharded, rank, SIZES, lambda: fsdp1_no_sync(sharded, handle))
    with FullyShardedDataParallel.summon_full_params(sharded):
        weights = torch.cat([p.detach().flatten() for p in sharded.parameters()]).clone()
    return weights, collectives, messages


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return on_two_ranks(tmp_path_factory.mktemp("fsdp1"), job, list(SCENARIOS))


@pytest.mark.parametrize("name", SCENARIOS)
def test_equals_one_process_with_one_collective_for_each_backward(results, name):
    (weights, collectives, messages), (others, *_) = (rank[name] for rank in results)
    assert torch.equal(weights, others)
    want = one_process(sum(map(sum, SIZES)))
    if not SCENARIOS[name][0]:
        # There is one flat parameter a unit, and another order of all of them.
        weights, want = weights.sort().values, want.sort().values
    assert_close(weights, want, 1e-10)
    assert collectives == [COLUMNS**2 + 1] * STEPS * 2
    # A model that is sharded already cannot be tried, and the layer is taken by the order of the modules: told once.
    assert ["in the order of the modules" in message for message in messages] == [True] * ("after" in name)
