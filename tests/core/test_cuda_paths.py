"""The accelerator's paths, on fake CUDA tensors: where the host reads a value, and would wait for it, they raise."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_tract import TrActConfig
from hf_tract.core.delayed import DelayedFlag
from hf_tract.core.ops import precondition_eagerly
from hf_tract.core.patches import PatchSpec
from hf_tract.core.pieces import factor_dtype
from hf_tract.core.preconditioner import LayerPreconditioner

try:
    with FakeTensorMode():
        torch.zeros(2, device="cuda")[:1]
except (RuntimeError, AssertionError):  # older versions ask the driver, builds without CUDA the build
    pytest.skip("this torch makes no fake CUDA tensors on this machine", allow_module_level=True)

SPECS = {
    "linear": (PatchSpec(), (8, 48)),
    "patches": (PatchSpec((4, 4), (4, 4), (0,) * 4, (1, 1)), (8, 3, 64, 64)),
    "rows": (PatchSpec((7, 7), (2, 2), (3,) * 4, (1, 1)), (8, 3, 64, 64)),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_no_step_after_the_first_waits_for_the_device(name, dtype, monkeypatch):
    spec, shape = SPECS[name]
    n = spec.patch_size(shape)
    # It reads pinned memory of the host, which a fake tensor cannot tell from the device's.
    monkeypatch.setattr(DelayedFlag, "read", lambda self: False)
    with FakeTensorMode():
        layer = nn.Linear(n, 8, device="cuda")
        preconditioner = LayerPreconditioner(layer, TrActConfig())
        # Both are chosen by a look in the very first backward.
        preconditioner.sums_dtype = preconditioner.factor_dtype = torch.float32
        for task in range(3):
            x = torch.empty(shape, dtype=dtype, device="cuda")
            grad = torch.empty(8, n, dtype=dtype, device="cuda")
            out = preconditioner.precondition(grad, x, spec)
            preconditioner.last_step.backward_pass = task  # as if each were a pass of its own
            assert (out.device.type, out.dtype, out.shape) == ("cuda", dtype, (8, n))
            layer.weight.grad = torch.empty(8, n, device="cuda")  # perhaps zeros: told there, not here


@pytest.mark.parametrize(("hip", "multiplied"), [(None, torch.bfloat16), ("6.4", torch.float32)])
def test_amds_gpus_multiply_in_float32(hip, multiplied, monkeypatch):
    """Older versions for them have no product of 16-bit numbers in float32."""
    monkeypatch.setattr(torch.version, "hip", hip)
    with FakeTensorMode():
        x = torch.empty(4, dtype=torch.bfloat16, device="cuda")
        assert factor_dtype(x, torch.float32) == multiplied


@pytest.mark.parametrize("empties", ["to None", "to zeros"])
def test_replicas_on_several_devices_share_their_sums(empties, monkeypatch):
    monkeypatch.setattr(DelayedFlag, "read", lambda self: False)
    with FakeTensorMode():
        layer = nn.Linear(6, 8, device="cuda:0")
        preconditioner = LayerPreconditioner(layer, TrActConfig())
        preconditioner.sums_dtype = preconditioner.factor_dtype = torch.float32
        for task in range(2):
            if empties == "to zeros":
                layer.weight.grad = torch.empty(8, 6, device="cuda:0")
            for device in ("cuda:0", "cuda:1"):
                x, grad = torch.empty(4, 6, device=device), torch.empty(8, 6, device=device)
                assert preconditioner.precondition(grad, x, PatchSpec()).device == grad.device
            preconditioner.last_step.backward_pass = task


class Event:
    """Refuses what CUDA refuses: another device than at first, and every question while a graph is captured."""

    device = "cuda:0"
    is_captured = False

    def __init__(self, _: torch.device) -> None:
        self.recorded_on = None

    def record(self) -> None:
        assert self.recorded_on in (None, Event.device)
        self.recorded_on = Event.device

    def query(self) -> bool:
        assert not Event.is_captured
        return True


def test_a_delayed_flag_comes_from_any_device(monkeypatch):
    monkeypatch.setattr(torch, "Event", Event)
    flag = DelayedFlag()
    with FakeTensorMode():
        for device in ("cuda:0", "cuda:1", "cuda:0"):
            monkeypatch.setattr(Event, "device", device)
            assert flag.send(torch.empty((), dtype=torch.bool, device=device))


def test_a_delayed_flag_on_its_way_is_neither_replaced_nor_read(monkeypatch):
    monkeypatch.setattr(torch, "Event", Event)
    flag = DelayedFlag()
    with FakeTensorMode():
        value = torch.empty((), dtype=torch.bool, device="cuda")
        assert flag.send(value)
        monkeypatch.setattr(Event, "query", lambda self: False)
        assert not flag.send(value)
        assert not flag.read()


def test_a_delayed_flag_stays_out_of_a_cuda_graph(monkeypatch):
    monkeypatch.setattr(torch, "Event", Event)
    flag = DelayedFlag()
    with FakeTensorMode():
        value = torch.empty((), dtype=torch.bool, device="cuda")
        assert flag.send(value)
        monkeypatch.setattr(Event, "is_captured", True)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert not flag.send(value)
        assert not flag.read()


def test_a_fake_tensor_tells_a_wait():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.zeros(1, device="cuda").item()


class Kernels(TorchDispatchMode):
    """Counts the operations that launch a kernel: all but views, empty tensors and scalars of the host."""

    LAUNCHES_NOTHING = ("empty", "new_empty", "_unsafe_view", "promote_types", "scalar_tensor", "zeros")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        schema = func._schema
        writes = any(argument.alias_info and argument.alias_info.is_write for argument in schema.arguments)
        is_view = not writes and any(result.alias_info for result in schema.returns)
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and not is_view and name not in self.LAUNCHES_NOTHING:
            self.names.append(name)
        return out


FIRST_LAYERS = {
    "CIFAR ViT": (384, PatchSpec((4, 4), (4, 4), (0,) * 4, (1, 1)), (128, 3, 32, 32), 20),
    "CIFAR ResNet-18": (64, PatchSpec((3, 3), (1, 1), (1,) * 4, (1, 1)), (128, 3, 32, 32), 20),
    "ViT-S/16": (384, PatchSpec((16, 16), (16, 16), (0,) * 4, (1, 1)), (256, 3, 224, 224), 25),
    "ResNet-50": (64, PatchSpec((7, 7), (2, 2), (3,) * 4, (1, 1)), (256, 3, 224, 224), 45),
}


@pytest.mark.parametrize("name", FIRST_LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_launches_few_kernels(name, dtype, monkeypatch):
    """Small models wait for the host, which takes some microseconds for each."""
    m, spec, shape, bound = FIRST_LAYERS[name]
    monkeypatch.setattr(DelayedFlag, "read", lambda self: False)
    with FakeTensorMode():
        x = torch.empty(shape, dtype=dtype, device="cuda")
        grad = torch.empty(m, shape[1], *spec.kernel, device="cuda")
        output_grad = None
        if dtype == torch.bfloat16:
            output_grad = torch.empty(shape[0], m, *spec.output_size(shape[2:]), dtype=dtype, device="cuda")
        layer = nn.Conv2d(shape[1], m, spec.kernel, device="cuda")
        preconditioner = LayerPreconditioner(layer, TrActConfig())
        preconditioner.sums_dtype = preconditioner.factor_dtype = torch.float32
        with Kernels() as kernels:
            precondition_eagerly(grad, x, output_grad, preconditioner.key, -1, *spec)
    assert len(kernels.names) <= bound, kernels.names
