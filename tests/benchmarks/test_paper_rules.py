"""The other rules that benchmarks compare with the paper's: dense formulas of another form, and scaled pixels."""

import copy

import pytest
import torch
from torch import nn

from benchmarks.paper.rules import Rule, ruled
from helpers.oracle import assert_close, moment, says
from hf_tract import find_first_layers

LAM = 0.1


@pytest.fixture
def pixels():
    """Far from centred and from white."""
    return (torch.randn(6, 3, 9, 9, generator=torch.Generator().manual_seed(0)).cumsum(-1) + 2).double()


def gradients(layer: nn.Conv2d, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of a loss that is not linear, for the flattened weight and the bias."""
    layer.zero_grad()
    layer(x).sin().square().sum().div(len(x)).backward()
    return layer.weight.grad.flatten(1).clone(), layer.bias.grad.clone() if layer.bias is not None else None


def layer_of(bias: bool = True) -> nn.Conv2d:
    torch.manual_seed(1)
    return nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=bias).double()


def test_the_default_is_the_paper_s(pixels):
    plain = layer_of()
    g, g_b = gradients(plain, pixels)
    got, got_b = gradients(ruled(copy.deepcopy(plain), Rule(LAM)), pixels)
    eye = torch.eye(27, dtype=torch.float64)
    assert_close(got, torch.linalg.solve(moment(pixels, plain)[0] + LAM * eye, g, left=False), 1e-4)
    assert_close(got_b, g_b, 1e-12)


def test_the_power_one_half_twice_is_the_paper_s(pixels):
    plain = layer_of()
    g, _ = gradients(plain, pixels)
    got, _ = gradients(ruled(copy.deepcopy(plain), Rule(LAM, power=0.5)), pixels)
    eye = torch.eye(27, dtype=torch.float64)
    once = torch.linalg.solve(moment(pixels, plain)[0] + LAM * eye, g, left=False)
    again, _ = Rule(LAM, power=0.5).apply(got, None, moment(pixels, plain)[0], torch.zeros(27))
    assert_close(again, once, 1e-4)


def test_centred_is_the_ridge_solution_of_weight_and_bias_together(pixels):
    """The system of both, with a column of ones for the bias, which is not damped."""
    plain = layer_of()
    g, g_b = gradients(plain, pixels)
    unfolded = nn.functional.unfold(pixels, 3, padding=1, stride=2).mT.flatten(0, 1)
    ones = torch.cat([unfolded, torch.ones(len(unfolded), 1).double()], 1)
    joint = ones.mT @ ones / len(ones)
    joint.diagonal()[:-1] += LAM
    both = torch.linalg.solve(joint, torch.cat([g, g_b[:, None]], 1), left=False)
    got, got_b = gradients(ruled(copy.deepcopy(plain), Rule(LAM, center=True)), pixels)
    assert_close(got, both[:, :-1], 1e-4)
    assert_close(got_b, both[:, -1], 1e-4)
    without, none = gradients(ruled(layer_of(bias=False), Rule(LAM, center=True)), pixels)
    assert none is None
    assert without.isfinite().all()


@pytest.mark.parametrize("scale", [0.25, 255.0])
def test_relative_damping_moves_the_outputs_alike_whatever_the_pixels_scale(pixels, scale):
    """The weight that gives the same outputs is W / scale, and so is its step."""
    plain = layer_of()
    other = copy.deepcopy(plain)
    with torch.no_grad():
        other.weight /= scale
    rule = Rule(LAM, relative=True, center=True)
    step, bias_step = gradients(ruled(plain, rule), pixels)
    scaled, scaled_bias = gradients(ruled(other, rule), pixels * scale)
    assert_close(scaled * scale, step, 1e-5)
    assert_close(scaled_bias, bias_step, 1e-5)


def test_a_schedule_goes_from_lam_to_its_end_by_equal_factors_and_into_checkpoints(pixels):
    plain = layer_of()
    g, _ = gradients(plain, pixels)
    layer = ruled(copy.deepcopy(plain), Rule(0.8, lam_end=0.1), 4)
    eye = torch.eye(27, dtype=torch.float64)

    def is_at(lam: float) -> None:
        got, _ = gradients(layer, pixels)
        assert_close(got, torch.linalg.solve(moment(pixels, plain)[0] + lam * eye, g, left=False), 1e-4)

    is_at(0.8)
    assert find_first_layers(nn.Sequential(layer))  # which runs a copy
    is_at(0.4)
    saved = layer.state_dict()
    with torch.no_grad():
        layer(pixels)  # a test is no step
    layer = ruled(copy.deepcopy(plain), Rule(0.8, lam_end=0.1), 4)
    layer.load_state_dict(saved)
    is_at(0.2)
    is_at(0.1)
    is_at(0.1)


def test_what_it_cannot_unfold_is_refused():
    with pytest.raises(ValueError, match=says("`layer` (=Conv2d(4, 4", "must be an ungrouped convolution")):
        ruled(nn.Conv2d(4, 4, 3, groups=2), Rule())
