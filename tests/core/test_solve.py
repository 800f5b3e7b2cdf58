from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hf_tract.core.solve
from helpers import oracle
from hf_tract.core.solve import DampedInverse


@pytest.fixture(params=["host", "accelerator"])
def where(request, monkeypatch):
    """Both ways to deal with the factorisation's outcome: looked at, or chosen by without looking."""
    monkeypatch.setattr(hf_tract.core.solve, "on_host", lambda moment: request.param == "host")
    return request.param


def damped_inverse(moment, lam, dtype=None):
    """Returns the inverse for 4 patches with this second moment."""
    return DampedInverse(4 * moment, 4, lam, dtype)


@st.composite
def problems(draw):
    torch.manual_seed(draw(st.integers(0, 2**16)))
    groups, n, patches = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(0, 30))
    rows = torch.randn(groups, patches, n, dtype=torch.float64)
    return rows.mT @ rows / max(1, patches), torch.randn(groups * draw(st.integers(1, 3)), n, dtype=torch.float64)


@pytest.mark.parametrize("host", [True, False])
@given(problems(), st.floats(1e-3, 10))
def test_equals_the_explicit_inverse(host, problem, lam):
    moment, grad = problem
    with mock.patch.object(hf_tract.core.solve, "on_host", return_value=host):
        got = damped_inverse(moment, lam)(grad)
    oracle.assert_close(got, oracle.precondition(grad, moment, lam), 1e-10)


@given(problems(), st.floats(1e-3, 10))
def test_a_device_without_cholesky_solve_has_the_same_inverse(problem, lam):
    """As MPS before torch 2.12, where the triangular solve exists."""
    moment, grad = problem
    inverse = damped_inverse(moment, lam)
    condition = inverse.condition()
    lacks = mock.patch.object(torch, "cholesky_solve", side_effect=NotImplementedError)
    with lacks, mock.patch.object(hf_tract.core.solve, "WITH_LITTLE_ALGEBRA", ("cpu",)):
        oracle.assert_close(inverse(grad), oracle.precondition(grad, moment, lam), 1e-10)
    with mock.patch.object(hf_tract.core.solve, "WITH_LITTLE_ALGEBRA", ("cpu",)):
        assert inverse.condition() == condition


@given(problems(), st.floats(1e-3, 10))
def test_no_direction_gains_more_than_one_over_lam(problem, lam):
    moment, grad = problem
    assert damped_inverse(moment, lam)(grad).norm() <= grad.norm() / lam * (1 + 1e-9)


HUGE = torch.full((1, 2, 2), 2.0**24)  # in float32 lam is lost beside it, and the second pivot is 0


def test_float64_takes_over_where_float32_cannot_factorise():
    assert torch.linalg.cholesky_ex(HUGE + 0.1 * torch.eye(2))[1].any()
    inverse, grad = damped_inverse(HUGE, 0.1), torch.randn(5, 2)
    assert not inverse.failed
    oracle.assert_close(inverse(grad), oracle.precondition(grad, HUGE.double(), 0.1), 1e-6)


def test_an_accelerator_keeps_the_gradient_then_and_factorises_in_the_precision_that_it_is_told(monkeypatch):
    monkeypatch.setattr(hf_tract.core.solve, "on_host", lambda _: False)
    grad = torch.randn(5, 2)
    inverse = damped_inverse(HUGE, 0.1)
    assert inverse.failed
    assert torch.equal(inverse(grad), grad)
    inverse = damped_inverse(HUGE, 0.1, torch.float64)
    assert not inverse.failed
    oracle.assert_close(inverse(grad), oracle.precondition(grad, HUGE.double(), 0.1), 1e-6)


def test_a_matrix_that_cannot_be_factorised_leaves_the_gradient(where):
    inverse = damped_inverse(-torch.eye(4)[None], 0.1)
    grad = torch.randn(3, 4)
    assert inverse.failed
    assert torch.equal(inverse(grad), grad)
    assert inverse.condition() == float("inf")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_moment_gives_a_non_finite_gradient(where, value):
    moment = torch.eye(4)[None].clone()
    moment[0, 1, 1] = value
    assert damped_inverse(moment, 0.1)(torch.randn(3, 4)).isnan().all()


@pytest.mark.parametrize("n", [1, 3, 48, 192])
def test_the_condition_number_is_that_of_the_eigenvalues(n):
    p = torch.randn(4 * n, n) * torch.linspace(0.1, 3, n) + 1
    moment = (p.mT @ p / len(p))[None]
    inverse = damped_inverse(moment, 0.1)
    eigenvalues = torch.linalg.eigvalsh(moment[0].double()) + 0.1
    assert inverse.condition() == pytest.approx(float(eigenvalues[-1] / eigenvalues[0]), rel=0.05)


def test_the_figures_are_over_all_groups():
    moment = torch.stack([torch.eye(2), torch.diag(torch.tensor([1.0, 5.0]))])
    inverse = damped_inverse(moment, 1.0)
    assert inverse.mean_eigenvalue == pytest.approx(2)
    assert inverse.condition() == pytest.approx(3, rel=1e-3)
    # The trace of each group is at the limit.
    limit = torch.eye(2).expand(2, 2, 2) * hf_tract.core.solve.max_trace(0.1) / 2
    assert not damped_inverse(0.75 * limit, 0.1).needs_float64
    assert damped_inverse(1.5 * limit, 0.1).needs_float64
