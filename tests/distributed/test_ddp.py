"""Works with: DistributedDataParallel. Two gloo processes give the update of one process with all images."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from helpers.oracle import assert_close, expected
from helpers.ranks import (
    COLUMNS,
    STEPS,
    Net,
    Pairs,
    Sizes,
    flat,
    images,
    loss_sum,
    on_two_ranks,
    one_process,
    optimizer_of,
    train,
)
from hf_tract import apply_tract, whiten_first_layer
from hf_tract.core import accumulation

# The images' parts; what differs from a DDP of default settings, TrAct applied before it.
SCENARIOS = {
    "one batch": ([[6], [6]], {}),
    "after DDP": ([[6], [6]], {"before": False}),
    "accumulated": ([[3, 3], [4, 2]], {}),
    "accumulated without no_sync": ([[3, 3], [4, 2]], {"no_sync": False}),
    "uneven": ([[5, 3], [2, 2]], {}),
    "an empty batch": ([[4, 0], [4, 4]], {}),
    "an empty batch first": ([[0, 4], [4, 4]], {}),
    "a dropped forward": ([[3, 3], [4, 2]], {"dropped": True}),
    "bucket view": ([[3, 3], [4, 2]], {"gradient_as_bucket_view": True}),
    "bucket view, each micro-step reduced": (
        [[2, 2, 2], [1, 2, 3]],
        {"gradient_as_bucket_view": True, "no_sync": False},
    ),
    "static graph": ([[6], [6]], {"static_graph": True}),
    "unused parameters": ([[3, 3], [4, 2]], {"find_unused_parameters": True}),
    "two calls": ([[3, 3], [4, 2]], {"net": Pairs}),
    "comm hook": ([[3, 3], [4, 2]], {"hook": True}),
    "local": ([[3, 3], [4, 2]], {"scope": "local"}),
}


def job(rank: int, name: str) -> tuple[torch.Tensor, list[int]]:
    sizes, settings = SCENARIOS[name]
    settings = dict(settings)
    net, hook = settings.pop("net", Net), settings.pop("hook", False)
    no_sync = settings.pop("no_sync", True)
    before, scope, dropped = (
        settings.pop("before", True),
        settings.pop("scope", "global"),
        settings.pop("dropped", False),
    )
    model = net()
    if before:
        apply_tract(model, lam=0.1, scope=scope)
    ddp = DistributedDataParallel(model, **settings)
    if hook:
        ddp.register_comm_hook(None, bf16_compress_hook)
    if not before:
        apply_tract(ddp, lam=0.1, scope=scope)
    collectives = train(ddp, rank, sizes, ddp.no_sync if no_sync else contextlib.nullcontext, dropped)
    return flat(ddp), collectives


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return on_two_ranks(tmp_path_factory.mktemp("ddp"), job, list(SCENARIOS))


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "local"])
def test_equals_one_process_with_one_collective_for_each_backward(results, name):
    (weights, collectives), (others, _) = (rank[name] for rank in results)
    sizes, settings = SCENARIOS[name]
    assert torch.equal(weights, others)
    tolerance = 1e-3 if "hook" in settings else 1e-10  # which rounds every gradient to bfloat16
    assert_close(weights, one_process(sum(map(sum, sizes)), settings.get("net", Net)), tolerance)
    calls = 2 if name == "two calls" else 1
    assert collectives == [COLUMNS**2 + 1] * STEPS * len(sizes[0]) * calls


def by_parts(sizes: Sizes) -> torch.Tensor:
    """Returns the weights where each micro-batch's gradient is multiplied by the inverse of its own C."""
    model, total = Net(), sum(map(sum, sizes))
    optimizer, stem = optimizer_of(model), model.embed[0]
    for step in range(STEPS):
        optimizer.zero_grad()
        added = torch.zeros_like(stem.weight)
        for part in images(step, total).split([count for counts in sizes for count in counts]):
            stem.weight.grad = None
            (loss_sum(model, part) / total).backward()
            added += expected(stem.weight.grad, part, stem, 0.1).detach()
        stem.weight.grad = added
        optimizer.step()
    return flat(model)


def test_local_scope_communicates_nothing_and_takes_each_part_by_itself(results):
    (weights, collectives), (others, _) = (rank["local"] for rank in results)
    assert collectives == []
    assert torch.equal(weights, others)
    assert_close(weights, by_parts(SCENARIOS["local"][0]), 1e-10)
    assert (weights - one_process(12)).norm() > 1e-4 * weights.norm()


@pytest.mark.parametrize("host", [True, False])
def test_sums_and_counts_are_added_up_in_the_group_that_was_given(host, monkeypatch):
    """Also on an accelerator, whose count stays there."""
    group, asked = object(), []

    def all_reduce(tensor, group=None):
        asked.append(group)
        tensor.mul_(2)

    monkeypatch.setattr(accumulation, "ranks_of", lambda of: 2 if of is group else 1)
    monkeypatch.setattr(accumulation, "on_host", lambda tensor: host)
    monkeypatch.setattr(accumulation.dist, "all_reduce", all_reduce)
    mine = torch.randn(2, 5, 5, dtype=torch.float64)
    sums, count = accumulation.sum_over_ranks(accumulation.PatchSums(mine, 3), group)
    assert asked == [group]
    assert torch.equal(sums, 2 * mine)
    assert float(count) == 6
    assert isinstance(count, torch.Tensor) is not host


def nan_job(rank: int, name: str) -> dict[str, bool]:
    """One rank meets NaN in one step."""
    ddp = DistributedDataParallel(Net())
    apply_tract(ddp, lam=0.1)
    finite = {}
    for step in range(3):
        ddp.zero_grad()
        x = images(step, 4)
        if step == 1 and rank == 1:
            x[0, 0, 0, 0] = torch.nan
        loss_sum(ddp, x).backward()
        finite[f"step {step}"] = bool(ddp.module.embed[0].weight.grad.isfinite().all())
    return finite


def test_a_rank_with_nan_makes_that_step_non_finite_everywhere_and_no_other(tmp_path):
    for rank in on_two_ranks(tmp_path, nan_job, ["nan"]):
        assert rank["nan"] == {"step 0": True, "step 1": False, "step 2": True}


def groups_job(rank: int, name: str) -> dict[str, torch.Tensor]:
    """Each rank trains a model of its own, in a group of its own."""
    group = [dist.new_group([member]) for member in range(2)][rank]
    model, x = Net(), images(rank, 4 + rank)
    whitened = Net()
    whiten_first_layer(whitened, x, process_group=group)
    apply_tract(model, lam=0.1, process_group=group)
    for _ in range(1 + rank):  # Together the ranks would wait for each other.
        loss_sum(model, x).backward()
    return {"grad": model.embed[0].weight.grad, "whitened": whitened.embed[0].weight.detach()}


def test_ranks_in_groups_of_their_own_share_nothing(tmp_path):
    for rank, results in enumerate(on_two_ranks(tmp_path, groups_job, ["groups"])):
        model, x = Net(), images(rank, 4 + rank)
        loss_sum(model, x).backward()
        wanted = (1 + rank) * expected(model.embed[0].weight.grad, x, model.embed[0], 0.1)
        assert_close(results["groups"]["grad"], wanted, 1e-10)
        whiten_first_layer(model, x)
        assert_close(results["groups"]["whitened"], model.embed[0].weight, 1e-10)
