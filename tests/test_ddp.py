"""Works with: DistributedDataParallel. Two gloo processes give the update of one process with all images."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_tract import apply_tract
from oracle import assert_close

STEPS = 4
COLUMNS = 3 * 4 * 4
# Images of each micro-batch by rank, when TrAct is applied (to DDP's model or before DDP), and the scope.
SCENARIOS = {
    "one batch": ([[6], [6]], "before", "global"),
    "after DDP": ([[6], [6]], "after", "global"),
    "accumulated": ([[3, 3], [4, 2]], "before", "global"),
    "uneven": ([[5, 3], [2, 2]], "before", "global"),
    "an empty batch": ([[4, 0], [4, 4]], "before", "global"),
    "a dropped forward": ([[3, 3], [4, 2]], "before", "global"),
    "local": ([[3, 3], [4, 2]], "before", "local"),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.GELU(), nn.Flatten(), nn.Linear(24, 4)).double()


def images(step: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    scale = torch.rand(count, 1, 1, 1, generator=generator, dtype=torch.float64)
    return torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64) * scale * 3


def loss_sum(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().sum()


def one_process(total: int) -> torch.Tensor:
    model = network()
    apply_tract(model, lam=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        (loss_sum(model, images(step, total)) / total).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def worker(rank: int, folder: str) -> None:
    """Every scenario, one after the other in one pair of processes."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    results = {}
    for name, (sizes, when, scope) in SCENARIOS.items():
        results[name] = train(rank, sizes, when, scope, dropped=name == "a dropped forward")
    torch.save(results, f"{folder}/results-{rank}.pt")
    dist.destroy_process_group()


def train(rank: int, sizes: list[list[int]], when: str, scope: str, dropped: bool) -> tuple[torch.Tensor, list[int]]:
    """Weights after training, and how many numbers each collective of ours carried."""
    collectives: list[int] = []
    model, total = network(), sum(map(sum, sizes))
    if when == "before":
        handle = apply_tract(model, lam=0.1, scope=scope)
    ddp = DistributedDataParallel(model)
    if when == "after":
        handle = apply_tract(ddp, lam=0.1, scope=scope)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=1e-2, momentum=0.9)
    mine = slice(sum(map(len, sizes[:rank])), sum(map(len, sizes[: rank + 1])))
    original = dist.all_reduce
    with mock.patch.object(dist, "all_reduce", lambda t, *a, **k: collectives.append(t.numel()) or original(t, *a, **k)):
        for step in range(STEPS):
            optimizer.zero_grad()
            *held, last = images(step, total).split([count for counts in sizes for count in counts])[mine]
            for x in held:
                with ddp.no_sync(), handle.no_sync():
                    (loss_sum(ddp, x) * 2 / total).backward()  # DDP takes the mean over two ranks
            if dropped:  # `if not loss.isfinite(): continue`, its graph still alive at the next forward
                loss = loss_sum(ddp, last * torch.nan)
            loss = loss_sum(ddp, last) * 2 / total
            loss.backward()
            optimizer.step()
    return torch.cat([p.detach().flatten() for p in ddp.parameters()]), collectives


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    mp.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"results-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", [name for name, (_, _, scope) in SCENARIOS.items() if scope == "global"])
def test_equals_one_process_with_one_collective_a_step(results, name):
    (weights, collectives), (others, _) = (rank[name] for rank in results)
    assert torch.equal(weights, others)
    assert_close(weights, one_process(sum(map(sum, SCENARIOS[name][0]))), 1e-10)
    extra = 3 if name == "a dropped forward" else 1  # its own, the good one's, and what it was to carry
    assert collectives == [COLUMNS**2 + 1] * STEPS * extra


def test_local_scope_communicates_nothing_and_differs(results):
    (weights, collectives), alone = results[0]["local"], one_process(12)
    assert collectives == []
    assert (weights - alone).norm() > 1e-4 * alone.norm()
