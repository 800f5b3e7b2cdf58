"""The accelerator's paths, on fake CUDA tensors: where the host reads a value, and would wait for it, they raise."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from hf_tract import TrActConfig
from hf_tract.core.delayed import DelayedValue
from hf_tract.core.patches import PatchSpec
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
    monkeypatch.setattr(DelayedValue, "read", lambda self: 0.0)
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


def test_a_fake_tensor_tells_a_wait():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.zeros(1, device="cuda").item()
