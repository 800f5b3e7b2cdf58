"""Within 1e-3 of float64 wherever the float64 problem is well posed: normalised pixels and raw ones of any unit."""

import copy
import logging

import pytest
import torch
from torch import nn

import hf_tract.core.preconditioner
import hf_tract.core.solve
from helpers import oracle
from helpers.oracle import assert_close, expected
from hf_tract import apply_tract
from hf_tract.core.moments import patch_sums
from hf_tract.core.patches import PatchSpec

LAYERS = {
    "patches": lambda: nn.Conv2d(3, 16, 4, 4),
    "patches of 16": lambda: nn.Conv2d(3, 16, 16, 16),
    "3x3": lambda: nn.Conv2d(3, 16, 3, padding=1),
    "7x7": lambda: nn.Conv2d(3, 16, 7, 2, 3),
}
PIXELS = {
    "normalised": lambda p: (p - 0.45) / 0.25,
    "0 to 1": lambda p: p,
    "0 to 255": lambda p: 255 * p,
    "Sentinel-2, 0 to 10 000": lambda p: 10_000 * p,
    "16 bits": lambda p: 65_535 * p,
}


def photos(count: int) -> torch.Tensor:
    """Smooth images of 0 to 1 with a little noise, whose patches have a mean far above their spread."""
    rough = torch.rand(count, 3, 8, 8)
    smooth = nn.functional.interpolate(rough, size=(32, 32), mode="bicubic", align_corners=False)
    return (0.2 + 0.5 * smooth + 0.02 * torch.randn(count, 3, 32, 32)).clamp(0, 1)


def gradient(layer: nn.Module, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    layer.zero_grad()
    (layer(x) * weights.to(x.dtype)).sum().backward()
    return layer.weight.grad


@pytest.mark.parametrize("pixels", PIXELS)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_float32_model_is_right_on_pixels_of_any_unit(layer, pixels, caplog):
    # More patches than n: else C has no inverse, lam alone decides, and it enlarges the gradient's own rounding.
    plain, x = LAYERS[layer](), PIXELS[pixels](photos(500 if layer == "patches of 16" else 32))
    weights = torch.randn_like(plain(x))
    wanted = expected(gradient(copy.deepcopy(plain).double(), x.double(), weights), x, plain, 0.1)
    with caplog.at_level(logging.WARNING, "hf_tract"), apply_tract(plain, lam=0.1):
        assert_close(gradient(plain, x, weights), wanted, 1e-3)
    assert caplog.records == []


@pytest.mark.parametrize("n, count", [(768, 1), (1536, 4)])
def test_a_step_of_a_few_large_patches_is_right(n, count):
    torch.manual_seed(0)
    plain, x, weights = nn.Linear(n, 24), torch.randn(count, n), torch.randn(count, 24)
    wanted = expected(gradient(copy.deepcopy(plain).double(), x.double(), weights), x, plain, 0.1)
    with apply_tract(plain, lam=0.1, layers=plain):
        assert_close(gradient(plain, x, weights), wanted, 5e-4)


@pytest.mark.parametrize("pixels, dtype", [("normalised", torch.float32), ("0 to 255", torch.float64)])
def test_sums_are_float64_only_where_float32_would_lose_lam(pixels, dtype):
    x = PIXELS[pixels](photos(4))
    assert patch_sums(x, PatchSpec((4, 4), (4, 4), (0,) * 4, (1, 1)), lam=0.1).sums.dtype == dtype


@pytest.mark.parametrize("spec", [PatchSpec(), PatchSpec((1, 1), (1, 1), (0,) * 4, (1, 1))], ids=["linear", "1x1"])
def test_millions_of_patches_are_summed_in_pieces(spec):
    """One float32 product of 17 million rows stops growing at 2^24."""
    rows = torch.randn(2**24, 3) + 0.2
    x = rows if not spec.kernel else rows.T.reshape(1, 3, 4096, 4096)
    exact = sum(part.double().T @ part.double() for part in rows.split(2**18))
    sums, count = patch_sums(x, spec, lam=0.1)
    assert_close(sums[0], exact, 5e-5)
    assert count == 2**24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_whose_squares_overflow_are_finite_pixels(dtype):
    layer, x = nn.Conv2d(3, 4, 4, 4), 1e18 * torch.randn(60, 3, 32, 32)
    plain = copy.deepcopy(layer)
    apply_tract(layer, 0.1)
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        out = layer(x)
    output_grad = torch.randn_like(out)
    out.backward(output_grad)
    read = x.to(dtype)
    wanted = gradient(copy.deepcopy(plain).double(), read.double(), output_grad)
    assert_close(layer.weight.grad, expected(wanted, read, plain, 0.1), 1e-3)


@pytest.fixture
def as_on_an_accelerator(monkeypatch):
    """Has the host not look at a value, as if it had to wait for that."""
    monkeypatch.setattr(hf_tract.core.solve, "on_host", lambda _: False)
    monkeypatch.setattr(hf_tract.core.preconditioner, "on_host", lambda _: False)


def test_what_an_accelerator_cannot_factorise_is_told_in_the_first_step(caplog, as_on_an_accelerator):
    layer = nn.Conv2d(3, 4, 4, 4)
    plain, x = copy.deepcopy(layer), torch.randn(5, 3, 8, 8)
    handle = apply_tract(layer)
    object.__setattr__(layer._tract_preconditioner.config, "lam", -1e6)  # what no user can ask for
    for _ in range(2):
        layer.zero_grad()
        layer(x).square().sum().backward()
        handle.stats()
    plain(x).square().sum().backward()
    assert_close(layer.weight.grad, plain.weight.grad, 1e-6)
    assert "could not be factorised, in float64 neither" in caplog.records[0].getMessage()


def test_an_accelerator_turns_to_float64_in_the_step_after_one_that_failed(caplog, as_on_an_accelerator):
    layer = nn.Linear(2, 3, bias=False)
    plain = copy.deepcopy(layer)
    apply_tract(layer, 0.1)
    # The first step chooses float32 by its pixels; those of later steps are of another scale.
    small, huge = torch.randn(4, 2), torch.full((4, 2), 2.0**12)
    grads = []
    for x in (small, huge, huge, small):
        layer.zero_grad()
        layer(x).sum().backward()
        grads.append(layer.weight.grad.clone())
    plain(huge).sum().backward()
    assert torch.equal(grads[1], plain.weight.grad)
    moment = oracle.moment(huge, plain)
    assert_close(grads[2], oracle.precondition(plain.weight.grad, moment, 0.1), 1e-3)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "could not be factorised in torch.float32" in message
    assert "From now on it is factorised in torch.float64" in message


@pytest.mark.parametrize("change", ["pixels", "lam"])
def test_an_accelerator_turns_to_float64_when_a_later_step_needs_it(change, as_on_an_accelerator):
    """The first step chooses float32, as where its images are black or `apply_tract` is called again."""
    layer = nn.Conv2d(3, 16, 7, 2, 3)
    plain = copy.deepcopy(layer)
    apply_tract(layer, 0.1 if change == "pixels" else 1e7)
    gradient(layer, (0.01 if change == "pixels" else 1e4) * photos(4), torch.ones(4, 16, 16, 16))
    assert layer._tract_preconditioner.sums_dtype == torch.float32
    apply_tract(layer, 0.1)
    for _ in range(2):
        x, weights = 1e4 * photos(40), torch.randn(40, 16, 16, 16)
        gradient(layer, x, weights)
    wanted = gradient(copy.deepcopy(plain).double(), x.double(), weights)
    assert_close(layer.weight.grad, expected(wanted, x, plain, 0.1), 1e-4)
    assert layer._tract_preconditioner.sums_dtype == layer._tract_preconditioner.factor_dtype == torch.float64


def test_a_step_with_a_nan_does_not_change_the_precision_of_later_ones(caplog, as_on_an_accelerator):
    layer = nn.Linear(2, 3, bias=False)
    handle = apply_tract(layer, 0.1)
    x = torch.randn(4, 2)
    for pixels in (x, x * torch.nan, x):
        layer.zero_grad()
        layer(pixels).sum().backward()
    assert handle.layers[0].module._tract_preconditioner.factor_dtype == torch.float32
    assert caplog.records == []
