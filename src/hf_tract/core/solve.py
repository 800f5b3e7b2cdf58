"""Applies the damped inverse of a second moment to a gradient: pure linear algebra.

Shape letters as in core/README.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

CONDITION_STEPS = 24
CONDITION_VECTORS = 4


class DampedInverse:
    """Multiplies gradients by inv(C + lam I), with a Cholesky factor; no inverse is formed.

    On the host the factorisation runs in the moment's precision and, if it fails, again in float64. An accelerator
    with float64 uses that at once: with a matrix of this size, launches take longer than arithmetic, and since nothing
    has to be chosen, the host never waits for the device. If float64 fails too, the gradient stays as it is. A
    non-finite moment gives a non-finite gradient, so that a GradScaler and the user see it.

    Source: the closed form of TrAct (arXiv 2410.23970, section 3), dW = -eta grad_W (x x^T / b + lam I)^-1.
    """

    def __init__(self, moment: Tensor, lam: float) -> None:
        """Factorise `moment` + `lam` I.

        Args:
            moment: C, (g, n, n), symmetric, float32 or float64; it is overwritten.
            lam: the damping, in the units of C's eigenvalues.
        """
        self.dtype = moment.dtype
        diagonal = moment.diagonal(dim1=-2, dim2=-1)
        trace = diagonal.sum()
        self._mean = trace / max(1, diagonal.numel())
        # The trace contains the square of every pixel, so it shows whether one is not finite.
        self.finite = trace.isfinite()
        if not on_host(moment) and moment.device.type != "mps":
            moment = moment.double()
        undamped = diagonal.clone()
        moment.diagonal(dim1=-2, dim2=-1).add_(lam)
        self._factorise(moment)
        if not on_host(moment) or moment.dtype == torch.float64:
            return
        if self.finite and not self.solved:
            moment = moment.double()
            moment.diagonal(dim1=-2, dim2=-1).copy_(undamped.double() + lam)
            self._factorise(moment)

    def _factorise(self, damped: Tensor) -> None:
        self._factor, info = torch.linalg.cholesky_ex(damped)
        self.solved = (info == 0).all()

    def __call__(self, grad: Tensor) -> Tensor:
        """Return `grad` inv(C + lam I), (m, ...) like `grad`, whose m rows are split evenly over the g groups."""
        groups, _, n = self._factor.shape
        rows = grad.reshape(groups, -1, n).to(self.dtype)
        out = self._solve(rows)
        if not (on_host(out) and self.finite and self.solved):
            # An accelerator makes this choice itself, so that the host does not wait for the values.
            out = torch.where(self.solved, out, rows)
            out = torch.where(self.finite, out, torch.nan)
        return out.reshape(grad.shape).to(grad.dtype)

    def _solve(self, rows: Tensor) -> Tensor:
        """Return `rows` inv(L L^T), laid out in memory as the gradient is, by substitution from the right."""
        factor = self._factor
        half = torch.linalg.solve_triangular(factor.mT, rows.to(factor.dtype), upper=True, left=False)
        whole: Tensor = torch.linalg.solve_triangular(factor, half, upper=False, left=False)
        return whole.to(self.dtype)

    @property
    def mean_eigenvalue(self) -> float:
        """Return tr(C) / n, the mean square of what the layer reads; this waits for the device."""
        return self._mean.item()

    def condition(self) -> float:
        """Return a lower bound on the condition number of C + lam I, the largest over groups.

        It comes from power and inverse iteration with the factor L, where C + lam I = L L^T.
        """
        if not (self.finite and self.solved):
            return float("inf")
        factor = self._factor
        groups, n, _ = factor.shape
        generator = torch.Generator().manual_seed(0)
        shape = (groups, n, min(CONDITION_VECTORS, n))
        top = torch.randn(shape, generator=generator, dtype=torch.float64).to(factor)
        bottom = top
        for _ in range(CONDITION_STEPS):
            top = torch.linalg.qr(factor @ (factor.mT @ top)).Q
            bottom = torch.linalg.qr(torch.cholesky_solve(bottom, factor)).Q
        damped = (top.mT @ factor) @ (factor.mT @ top)
        inverse = bottom.mT @ torch.cholesky_solve(bottom, factor)
        largest = torch.linalg.eigvalsh(damped)[..., -1]
        smallest = 1 / torch.linalg.eigvalsh(inverse)[..., -1]
        return float((largest / smallest).max())


def on_host(tensor: Tensor) -> bool:
    """Return whether the host can read a value of `tensor` without waiting for a device."""
    return tensor.is_cpu
