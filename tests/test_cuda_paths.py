"""The accelerator's way, on fake CUDA tensors: a read of a value by the host, which would wait for the device, raises there."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from hf_tract import TrActConfig
from hf_tract.moments import Window, patch_moments
from hf_tract.step import LayerStep

try:
    with FakeTensorMode():
        torch.zeros(2, device="cuda")[:1]
except (RuntimeError, AssertionError):  # older versions ask the driver, builds without CUDA the build
    pytest.skip("this torch makes no fake CUDA tensors on this machine", allow_module_level=True)

WINDOWS = {
    "linear": (Window(), (8, 48)),
    "patches": (Window((4, 4), (4, 4), (0,) * 4, (1, 1)), (8, 3, 64, 64)),
    "rows": (Window((7, 7), (2, 2), (3,) * 4, (1, 1)), (8, 3, 64, 64)),
}


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("settings", [{}, {"every": 2}, {"ema": 0.9}])
def test_no_step_waits_for_the_device(name, dtype, settings):
    window, shape = WINDOWS[name]
    n = window.columns(shape)
    with FakeTensorMode():
        step = LayerStep(TrActConfig(**settings))
        for _ in range(2):
            x = torch.empty(shape, dtype=dtype, device="cuda")
            payload = torch.zeros(n * n + 1, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device="cuda")
            if step.takes_moment():
                patch_moments(x, window, payload[:-1].view(1, n, n))
            step.open(payload)
            grad = step.close(torch.empty(8, n, dtype=dtype, device="cuda"), payload)
            assert (grad.device.type, grad.dtype, grad.shape) == ("cuda", dtype, (8, n))


def test_a_fake_tensor_tells_a_wait():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.zeros(1, device="cuda").item()
