"""Works with: DataParallel, which Trainer uses for several GPUs in one process. Here its replicas run on the CPU."""

import copy
import threading

import pytest
import torch
from torch import nn

from helpers.models import Adapted, Airbench, Gated
from helpers.oracle import assert_close, expected
from helpers.ranks import Net, images
from hf_tract import apply_tract


def replicate(model: nn.Module, count: int) -> list[nn.Module]:
    """What `torch.nn.parallel.replicate` does, with a copy in the place of the broadcast to other devices."""
    modules = list(model.modules())
    index = {module: position for position, module in enumerate(modules)}
    replicas = []
    for _ in range(count):
        parts = [module._replicate_for_data_parallel() for module in modules]
        for module, part in zip(modules, parts, strict=True):
            for name, child in module._modules.items():
                setattr(part, name, parts[index[child]])
            for name, parameter in module._parameters.items():
                setattr(part, name, parameter.clone())  # a copy that autograd leads back from
        replicas.append(parts[0])
    return replicas


def test_replicas_in_threads_share_one_moment():
    plain, x = Net(), images(0, 12)
    model = copy.deepcopy(plain)
    apply_tract(model, lam=0.1)
    outputs: dict[int, torch.Tensor] = {}

    def forward(position: int, replica: nn.Module, part: torch.Tensor) -> None:
        with torch.enable_grad():
            outputs[position] = replica(part)

    for _ in range(2):
        model.zero_grad()
        parts = x.split([5, 4, 3])
        threads = [
            threading.Thread(target=forward, args=(position, replica, part))
            for position, (replica, part) in enumerate(zip(replicate(model, 3), parts, strict=True))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        torch.cat([outputs[position] for position in range(3)]).square().mean().backward()
        plain.zero_grad()
        plain(x).square().mean().backward()
        stem, grad = plain.embed[0], plain.embed[0].weight.grad
        assert_close(model.embed[0].weight.grad, expected(grad, x, stem, 0.1), 1e-10)
        assert_close(model.head.weight.grad, plain.head.weight.grad, 1e-10)


@pytest.mark.parametrize("make", [Gated, lambda: Adapted(12, 4), Airbench], ids=["gated", "adapted", "parent reads"])
def test_replicas_of_layers_with_a_forward_of_their_own_precondition_one_weight_alone(make):
    """Their parameters are plain tensors."""
    model = make().double()
    plain = copy.deepcopy(model)
    x = torch.randn(6, 12).double() if isinstance(model, Adapted) else torch.randn(6, 3, 8, 8).double()
    layer = model.whiten if isinstance(model, Airbench) else model
    apply_tract(model, layers=layer)
    outputs = [replica(part) for replica, part in zip(replicate(model, 2), x.chunk(2), strict=True)]
    torch.cat(outputs).square().sum().backward()
    plain(x).square().sum().backward()
    name = next(name for name, each in model.named_parameters() if each is layer.weight)
    ordinary = dict(plain.named_parameters())
    for each, parameter in model.named_parameters():
        wanted = ordinary[each].grad
        if each == name:
            wanted = expected(wanted, x, plain.get_submodule(name.rpartition(".")[0]), 0.1)
        assert_close(parameter.grad, wanted, 1e-10)
