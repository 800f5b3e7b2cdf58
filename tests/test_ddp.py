"""Works with: DistributedDataParallel. Two gloo processes give the update of one process with all images."""

import contextlib

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from oracle import assert_close
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import hf_tract.step
from hf_tract import apply_tract

STEPS = 4
COLUMNS = 3 * 4 * 4
# Images of each micro-batch, by rank: even, uneven in the last one, and none at all on one rank.
BATCHES = {"one batch": [[6], [6]], "accumulated": [[3, 3], [4, 2]], "uneven": [[5, 3], [2, 2]], "an empty one": [[4, 0], [4, 4]]}


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


def worker(rank: int, folder: str, sizes: list[list[int]], when: str, scope: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    collectives: list[int] = []
    original = dist.all_reduce
    hf_tract.step.dist.all_reduce = lambda t, *a, **k: collectives.append(t.numel()) or original(t, *a, **k)
    model, total = network(), sum(map(sum, sizes))
    if when == "before":
        handle = apply_tract(model, lam=0.1, scope=scope)
    ddp = DistributedDataParallel(model)
    if when == "after":
        handle = apply_tract(ddp, lam=0.1, scope=scope)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=1e-2, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        mine = images(step, total).split([count for rank_sizes in sizes for count in rank_sizes])
        mine = mine[sum(map(len, sizes[:rank])) :][: len(sizes[rank])]
        for micro, x in enumerate(mine):
            last = micro == len(mine) - 1
            with contextlib.ExitStack() as stack:
                if not last:
                    stack.enter_context(ddp.no_sync())
                    stack.enter_context(handle.no_sync())
                (loss_sum(ddp, x) * 2 / total).backward()  # DDP takes the mean over two ranks
        optimizer.step()
    assert collectives == ([COLUMNS**2 + 1] * STEPS if scope == "global" else [])
    torch.save(torch.cat([p.detach().flatten() for p in ddp.parameters()]), f"{folder}/weights-{rank}.pt")
    dist.destroy_process_group()


def two_processes(folder, sizes, when="before", scope="global") -> torch.Tensor:
    mp.spawn(worker, (str(folder), sizes, when, scope), nprocs=2)
    first, second = (torch.load(folder / f"weights-{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    return first


@pytest.mark.parametrize("name, when", [("one batch", "after"), *((name, "before") for name in BATCHES)])
def test_equals_one_process_with_one_collective_a_step(tmp_path, name, when):
    sizes = BATCHES[name]
    assert_close(two_processes(tmp_path, sizes, when), one_process(sum(map(sum, sizes))), 1e-10)


def test_local_scope_communicates_nothing_and_differs(tmp_path):
    weights, alone = two_processes(tmp_path, BATCHES["accumulated"], scope="local"), one_process(12)
    assert (weights - alone).norm() > 1e-4 * alone.norm()
