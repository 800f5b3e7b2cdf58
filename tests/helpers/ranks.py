"""Trains a model in two gloo processes on parts of the same images, and in one process to compare them with."""

import faulthandler
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from hf_tract import TrActHandle, apply_tract

PRELOADED = ["hf_tract.integrations", "timm", "torch.distributed.fsdp", "transformers.models.vit.modeling_vit"]
STEPS = 4
COLUMNS = 3 * 4 * 4

Sizes = list[list[int]]  # images of each micro-batch, by rank


class Net(nn.Module):
    """Has a stem inside a block, so that the stem can be sharded with its parent or by itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.GELU(), nn.Flatten())
        self.head = nn.Linear(24, 4)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(x))


def linear_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.GELU(), nn.Linear(6, 4))


def images(step: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    scale = torch.rand(count, 1, 1, 1, generator=generator, dtype=torch.float64)
    return torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64) * scale * 3


class Pairs(Net):
    """Calls its stem twice in each forward, as contrastive and multi-crop training do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + super().forward(2 * x.flip(-1)).sin()


def loss_sum(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().sum()


def flat(model: nn.Module) -> torch.Tensor:
    """Returns all parameters in one vector, gathered where they are sharded."""
    parameters = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in parameters])


@contextmanager
def fsdp1_no_sync(model: Any, handle: TrActHandle) -> Iterator[None]:
    """Accumulates a micro-step's gradients without communication, in FSDP1 and in TrAct."""
    with model.no_sync(), handle.no_sync():
        yield


@contextmanager
def fsdp2_no_sync(model: Any, handle: TrActHandle) -> Iterator[None]:
    """Accumulates a micro-step's gradients without communication, in FSDP2 and in TrAct."""
    model.set_requires_gradient_sync(False)
    with handle.no_sync():
        yield
    model.set_requires_gradient_sync(True)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)


def one_process(total: int, net: type[Net] = Net) -> torch.Tensor:
    """Returns the weights after training on all images of each step at once."""
    model = net()
    apply_tract(model, lam=0.1)
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        (loss_sum(model, images(step, total)) / total).backward()
        optimizer.step()
    return flat(model)


def train(
    model: nn.Module,
    rank: int,
    sizes: Sizes,
    no_sync: Callable[[], AbstractContextManager[Any]],
    dropped: bool = False,
    mean: bool = True,
) -> list[int]:
    """Trains on this rank's part; returns how many numbers each collective of TrAct carried.

    Args:
        model: wrapped or sharded.
        rank: of this process.
        sizes: which part is whose.
        no_sync: opens the context of every micro-step but the last.
        dropped: forwards a NaN batch first whose graph is still alive at the next forward.
        mean: whether the wrapper averages gradients over the two ranks, and does not sum them.
    """
    total, collectives = sum(map(sum, sizes)), list[int]()
    mine = slice(sum(map(len, sizes[:rank])), sum(map(len, sizes[: rank + 1])))
    optimizer = optimizer_of(model)
    original = dist.all_reduce

    def watched(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.numel() == COLUMNS**2 + 1:
            collectives.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    with mock.patch.object(dist, "all_reduce", watched):
        for step in range(STEPS):
            optimizer.zero_grad()
            *first, last = images(step, total).split([count for counts in sizes for count in counts])[mine]
            for x in first:
                with no_sync():
                    (loss_sum(model, x) * (2 if mean else 1) / total).backward()
            if dropped:
                loss = loss_sum(model, last * torch.nan)
            loss = loss_sum(model, last) * (2 if mean else 1) / total
            loss.backward()
            optimizer.step()
    return collectives


def _main(rank: int, folder: str, job: Callable[..., Any], names: list[str]) -> None:
    # As torchrun sets them; the group is made here, so nothing listens at that address.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    faulthandler.enable()  # a rank that aborts says where
    torch.save({name: job(rank, name) for name in names}, f"{folder}/results-{rank}.pt")
    leave()


def leave() -> None:
    """Ends a rank without the interpreter's shutdown.

    gloo's threads may outlive the group as long as a mesh refers to it, and one that frees a tensor while the
    interpreter shuts down aborts the process (pytorch/pytorch#179291).
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def on_two_ranks(folder: Path, job: Callable[[int, str], Any], names: list[str]) -> list[dict[str, Any]]:
    """Runs `job(rank, name)` for each name in one pair of processes; returns its results, by rank and name.

    Each pair is forked from a server that has imported the large packages and has run nothing yet, so that they are
    imported once for all pairs.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    mp.start_processes(_main, (str(folder), job, names), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"results-{rank}.pt") for rank in range(2)]
