"""The damped inverse of a second moment, applied to a gradient: pure linear algebra.

Shape letters: g groups, m rows of the weight, n columns of `weight.flatten(1)`.
"""

from __future__ import annotations

import torch
from torch import Tensor


class DampedInverse:
    """inv(C + lam I), held as a Cholesky factor; no inverse is formed.

    The factorisation runs in the moment's precision. Where it fails the float64 one takes its place, and where that
    fails too the gradient stays as it is. A non-finite moment gives a non-finite gradient, so that a GradScaler and the
    user see it. On an accelerator the choice is made there, without a host synchronisation.

    Source: the closed form of TrAct (arXiv 2410.23970, section 3), dW = -eta grad_W (x x^T / b + lam I)^-1.
    """

    def __init__(self, moment: Tensor, lam: float) -> None:
        """Factorises `moment` + `lam` I.

        Args:
            moment: C, (g, n, n), symmetric, float32 or float64.
            lam: the damping, in the units of C's eigenvalues.
        """
        self.moment, self.lam = moment, lam
        self.finite = moment.isfinite().all()
        self._factor, info = torch.linalg.cholesky_ex(self._damped(moment))
        self._good = (info == 0).all()
        self._wide: Tensor | None = None
        self.solved = self._good
        # The CPU can look at the outcome for nothing; anywhere else looking costs more than a second factor.
        if moment.dtype != torch.float64 and not (moment.is_cpu and (self._good or not self.finite)):
            self._wide, info = torch.linalg.cholesky_ex(self._damped(moment.double()))
            self.solved = self._good | (info == 0).all()

    def __call__(self, grad: Tensor) -> Tensor:
        """`grad` inv(C + lam I), (m, ...) like `grad`; rows m are split evenly over the g groups."""
        rows = grad.reshape(len(self.moment), -1, self.moment.shape[-1]).to(self.moment.dtype)
        if self.moment.is_cpu:
            if not self.finite:
                return torch.full_like(grad, torch.nan)
            if not self.solved:
                return grad
            out = _solve(self._factor if self._wide is None else self._wide, rows)
        else:
            out = _solve(self._factor, rows)
            if self._wide is not None:
                out = torch.where(self._good, out, _solve(self._wide, rows).to(out.dtype))
            out = torch.where(self.solved, out, rows)
            out = torch.where(self.finite, out, torch.nan)
        return out.reshape(grad.shape).to(grad.dtype)

    def _damped(self, moment: Tensor) -> Tensor:
        damped = moment.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(self.lam)
        return damped

    def condition(self, steps: int = 24) -> float:
        """Condition number of C + lam I (the largest over groups), by power and inverse iteration: a lower bound."""
        if not (self.finite and self.solved):
            return float("inf")
        factor = self._factor if self._good or self._wide is None else self._wide
        damped = self._damped(self.moment.to(factor.dtype))
        generator = torch.Generator().manual_seed(0)
        shape = (*damped.shape[:-1], min(4, damped.shape[-1]))
        start = torch.randn(shape, generator=generator, dtype=torch.float64).to(damped)
        top, bottom = start, start
        for _ in range(steps):
            top = torch.linalg.qr(damped @ top).Q
            bottom = torch.linalg.qr(torch.cholesky_solve(bottom, factor)).Q
        largest = torch.linalg.eigvalsh(top.mT @ damped @ top)[..., -1]
        smallest = 1 / torch.linalg.eigvalsh(bottom.mT @ torch.cholesky_solve(bottom, factor))[..., -1]
        return float((largest / smallest).max())


def _solve(factor: Tensor, rows: Tensor) -> Tensor:
    """`rows` inv(factor factor^T) for (g, m / g, n) rows and a lower (g, n, n) factor."""
    return torch.cholesky_solve(rows.to(factor.dtype).mT, factor).mT
