"""Works with: DistributedDataParallel. Two gloo processes give the update of one process with all images."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from hf_tract import apply_tract
from oracle import assert_close
from ranks import COLUMNS, STEPS, Net, flat, on_two_ranks, one_process, train

# The images' parts; what differs from a DDP of default settings, TrAct applied before it.
SCENARIOS = {
    "one batch": ([[6], [6]], {}),
    "after DDP": ([[6], [6]], {"before": False}),
    "accumulated": ([[3, 3], [4, 2]], {}),
    "uneven": ([[5, 3], [2, 2]], {}),
    "an empty batch": ([[4, 0], [4, 4]], {}),
    "a dropped forward": ([[3, 3], [4, 2]], {"dropped": True}),
    "bucket view": ([[3, 3], [4, 2]], {"gradient_as_bucket_view": True}),
    "static graph": ([[6], [6]], {"static_graph": True}),
    "unused parameters": ([[3, 3], [4, 2]], {"find_unused_parameters": True}),
    "local": ([[3, 3], [4, 2]], {"scope": "local"}),
}


def job(rank: int, name: str) -> tuple[torch.Tensor, list[int]]:
    sizes, settings = SCENARIOS[name]
    settings = dict(settings)
    before, scope, dropped = settings.pop("before", True), settings.pop("scope", "global"), settings.pop("dropped", False)
    model = Net()
    if before:
        handle = apply_tract(model, lam=0.1, scope=scope)
    ddp = DistributedDataParallel(model, **settings)
    if not before:
        handle = apply_tract(ddp, lam=0.1, scope=scope)
    collectives = train(ddp, handle, rank, sizes, ddp.no_sync, dropped)
    return flat(ddp), collectives


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return on_two_ranks(tmp_path_factory.mktemp("ddp"), job, list(SCENARIOS))


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "local"])
def test_equals_one_process_with_one_collective_a_step(results, name):
    (weights, collectives), (others, _) = (rank[name] for rank in results)
    assert torch.equal(weights, others)
    assert_close(weights, one_process(sum(map(sum, SCENARIOS[name][0]))), 1e-10)
    each = 3 if name == "a dropped forward" else 1  # the dropped one's, the good one's, and what the first was to carry
    assert collectives == [COLUMNS**2 + 1] * STEPS * each


def test_local_scope_communicates_nothing_and_differs(results):
    (weights, collectives), alone = results[0]["local"], one_process(12)
    assert collectives == []
    assert (weights - alone).norm() > 1e-4 * alone.norm()
