"""The damped inverse of a second moment, applied to a gradient: pure linear algebra.

Shape letters: g groups, m rows of the weight, n columns of `weight.flatten(1)`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class DampedInverse:
    """inv(C + lam I), held as a Cholesky factor; no inverse is formed.

    On the host the factorisation runs in the moment's precision, and where it fails in float64. An accelerator factorises
    in float64 at once, where it has it: with a matrix of this size it waits for launches and not for arithmetic, and nothing
    has to be chosen, so the host is never waited for. Where that fails too the gradient stays as it is. A non-finite moment
    gives a non-finite gradient, so that a GradScaler and the user see it.

    Source: the closed form of TrAct (arXiv 2410.23970, section 3), dW = -eta grad_W (x x^T / b + lam I)^-1.
    """

    def __init__(self, moment: Tensor, lam: float) -> None:
        """Factorises `moment` + `lam` I.

        Args:
            moment: C, (g, n, n), symmetric, float32 or float64; it is overwritten.
            lam: the damping, in the units of C's eigenvalues.
        """
        self.dtype, self.host = moment.dtype, on_host(moment)
        diagonal = moment.diagonal(dim1=-2, dim2=-1)
        trace = diagonal.sum()  # a non-finite pixel is in it, as its square
        self._mean = trace / max(1, diagonal.numel())
        self.finite: bool | Tensor = math.isfinite(trace.item()) if self.host else trace.isfinite()
        if not self.host and moment.device.type != "mps":
            moment = moment.double()
        undamped = diagonal.clone()
        moment.diagonal(dim1=-2, dim2=-1).add_(lam)
        self.solved = self._factorise(moment)
        if self.host and moment.dtype != torch.float64 and self.finite and not self.solved:
            moment = moment.double()
            moment.diagonal(dim1=-2, dim2=-1).copy_(undamped.double() + lam)
            self.solved = self._factorise(moment)

    def _factorise(self, damped: Tensor) -> bool | Tensor:
        """Sets the factor and says whether it is one."""
        self._factor, info = torch.linalg.cholesky_ex(damped)
        return not info.any().item() if self.host else (info == 0).all()

    def __call__(self, grad: Tensor) -> Tensor:
        """`grad` inv(C + lam I), (m, ...) like `grad`; rows m are split evenly over the g groups."""
        rows = grad.reshape(len(self._factor), -1, self._factor.shape[-1]).to(self.dtype)
        if isinstance(self.solved, Tensor):
            out = torch.where(self.solved, self._solve(rows), rows)
            out = torch.where(torch.as_tensor(self.finite), out, torch.nan)
        elif not self.finite:
            return torch.full_like(grad, torch.nan)
        elif not self.solved:
            return grad
        else:
            out = self._solve(rows)
        return out.reshape(grad.shape).to(grad.dtype)

    def _solve(self, rows: Tensor) -> Tensor:
        """`rows` inv(L L^T), by substitution from the right: the result lies in memory as the gradient does."""
        half = torch.linalg.solve_triangular(self._factor.mT, rows.to(self._factor.dtype), upper=True, left=False)
        whole: Tensor = torch.linalg.solve_triangular(self._factor, half, upper=False, left=False)
        return whole.to(self.dtype)

    @property
    def mean_eigenvalue(self) -> float:
        """tr(C) / n: the mean square of what the layer reads. Waits for the device."""
        return self._mean.item()

    def condition(self, steps: int = 24) -> float:
        """Condition number of C + lam I (the largest over groups), by power and inverse iteration: a lower bound."""
        if not (self.finite and self.solved):
            return float("inf")
        factor = self._factor
        generator = torch.Generator().manual_seed(0)
        shape = (*factor.shape[:-1], min(4, factor.shape[-1]))
        start = torch.randn(shape, generator=generator, dtype=torch.float64).to(factor)
        top, bottom = start, start
        for _ in range(steps):
            top = torch.linalg.qr(factor @ (factor.mT @ top)).Q
            bottom = torch.linalg.qr(torch.cholesky_solve(bottom, factor)).Q
        largest = torch.linalg.eigvalsh((top.mT @ factor) @ (factor.mT @ top))[..., -1]
        smallest = 1 / torch.linalg.eigvalsh(bottom.mT @ torch.cholesky_solve(bottom, factor))[..., -1]
        return float((largest / smallest).max())


def on_host(tensor: Tensor) -> bool:
    """Says whether looking at a value costs nothing."""
    return tensor.is_cpu
