import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from benchmarks.common.timing import peak_bytes
from helpers import oracle
from helpers.strategies import cases
from hf_tract.core import pieces
from hf_tract.core.moments import MEMORY_LIMIT, patch_moments
from hf_tract.core.patches import PATCH_OPS, PatchSpec


def spec_of(layer: nn.Module, x: torch.Tensor) -> PatchSpec:
    """The patches of a layer without a padding mode."""
    if isinstance(layer, nn.Linear):
        return PatchSpec()
    arguments = (layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    return PATCH_OPS[oracle.CONVS[len(layer.kernel_size)][1]](x, layer.weight, *arguments)


def moments(
    x: torch.Tensor, spec: PatchSpec, dtype: torch.dtype, memory_limit: int = MEMORY_LIMIT
) -> tuple[torch.Tensor, int]:
    n = spec.patch_size(x.shape)
    sums = torch.zeros(spec.groups, n, n, dtype=dtype)
    return sums, patch_moments(x, spec, sums, memory_limit)


@given(cases(torch.float64), st.sampled_from([1, 2000, 20000, 2**27]))
def test_equals_the_dense_moment_whatever_the_chunks(case, memory_limit):
    if getattr(case.layer, "padding_mode", "zeros") != "zeros":
        case.layer.padding_mode = "zeros"
    sums, count = moments(case.x, spec_of(case.layer, case.x), torch.float64, memory_limit)
    assert count == oracle.patches(case.x, case.layer).shape[1]
    oracle.assert_close(sums / count, oracle.moment(case.x, case.layer), 1e-12)


PATCHES = {
    "linear, converted": (PatchSpec(), (40000, 200)),
    "patches": (PatchSpec((8, 8), (8, 8), (0,) * 4, (1, 1)), (60, 3, 128, 128)),
    "padded patches": (
        PatchSpec((8, 8), (8, 8), (4,) * 4, (1, 1)),
        (60, 3, 128, 128),
    ),
    "rows": (PatchSpec((7, 7), (2, 2), (3,) * 4, (1, 1)), (60, 3, 128, 128)),
    "one large image": (PatchSpec((7, 7), (2, 2), (3,) * 4, (1, 1)), (1, 3, 1600, 1600)),
    "dilated": (PatchSpec((5, 5), (1, 1), (0,) * 4, (2, 2)), (20, 3, 64, 64)),
}


@pytest.mark.parametrize("name", PATCHES)
def test_memory_is_bounded_and_not_wasted(name):
    spec, shape = PATCHES[name]
    x = torch.randn(shape, dtype=torch.bfloat16 if not spec.kernel else torch.float32)
    n, bound = spec.patch_size(shape), 4 * 2**20
    sums = torch.zeros(spec.groups, n, n)
    peak = peak_bytes(lambda: patch_moments(x, spec, sums, bound), x.device)
    assert bound / 8 < peak <= bound + sums.nbytes


def test_an_unbatched_image_is_one_image():
    x = torch.randn(3, 8, 8)
    spec = PatchSpec((4, 4), (4, 4), (0, 0, 0, 0), (1, 1))
    one, _ = moments(x, spec, torch.float32)
    batch, count = moments(x[None], spec, torch.float32)
    assert count == 4
    assert torch.equal(one, batch)


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 3, 2, 8)])
def test_no_patches_give_zero_sums(shape):
    sums, count = moments(torch.randn(shape), PatchSpec((4, 4), (4, 4), (0,) * 4, (1, 1)), torch.float32)
    assert count == 0
    assert sums.shape == (1, 48, 48)
    assert not sums.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_summed_in_float32(dtype):
    layer = nn.Conv2d(3, 4, 4, 4)
    x = torch.randn(8, 3, 16, 16).to(dtype)
    sums, count = moments(x, spec_of(layer, x), torch.float32)
    assert sums.dtype == torch.float32
    oracle.assert_close(sums / count, oracle.moment(x, layer), 1e-6)


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Linear(7, 3, bias=False), (12, 7)),
        (nn.Linear(7, 3, bias=False), (4, 5, 7)),
        (nn.Conv2d(3, 4, 3, padding=1, bias=False), (4, 3, 6, 6)),
        (nn.Conv2d(3, 4, 4, stride=4, bias=False), (4, 3, 8, 8)),
    ],
)
def test_is_the_input_factor_of_curvlinops_forward_only_kfac(layer, shape):
    """KFAC's A with fisher_type="forward-only" and kfac_approx="expand" is C: the divisor is the number of patches."""
    from curvlinops import KFACLinearOperator

    layer = layer.double()
    x = torch.randn(shape, dtype=torch.float64)
    model = nn.Sequential(layer, nn.Flatten(1) if x.dim() != 3 else nn.Identity())
    y = torch.zeros_like(model(x))
    kfac = KFACLinearOperator(
        model,
        nn.MSELoss(),
        list(model.parameters()),
        [(x, y)],
        fisher_type="forward-only",
        kfac_approx="expand",
        check_deterministic=False,
    )
    kfac.compute_kronecker_factors()
    (factor,) = kfac.state_dict()["input_covariances"].values()
    sums, count = moments(x, spec_of(layer, x), torch.float64)
    oracle.assert_close(sums[0] / count, factor, 1e-12)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("b", [10, 11, 12, 15])
def test_a_long_product_in_parts_is_the_product(groups, b, monkeypatch):
    monkeypatch.setattr(pieces, "MAX_PRODUCT_LENGTH", 10)
    monkeypatch.setattr(pieces, "PART_LENGTH", 4)
    left, right = (torch.randn(groups, b, n, dtype=torch.float64) for n in (3, 5))
    oracle.assert_close(pieces.long_product(left, right, torch.float64), left.mT @ right, 1e-12)
