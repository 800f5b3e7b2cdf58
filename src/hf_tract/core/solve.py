"""Applies the damped inverse of a second moment to a gradient: pure linear algebra.

Shape letters as in core/README.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rounding of C's trace in float32, in units of lam, above which the sums and the factor are float64.
MAX_ROUNDING = 1e-2
CONDITION_STEPS = 24
CONDITION_VECTORS = 4
# Devices on which older versions of torch lack `cholesky_solve`, `qr` and `eigvalsh`.
WITH_LITTLE_ALGEBRA = ("mps",)


class DampedInverse:
    """Multiplies gradients by inv(C + lam I), where C = S / b, and S is the sum of p p^T over b patches.

    It factorises by Cholesky in the precision of the sums, and forms no inverse. If that fails on the host, it is done
    again in float64. For an accelerator the host would have to wait, so there the caller chooses the precision, by the
    outcome of earlier steps. If the factorisation fails, the gradient stays as it is. Sums that are not finite give a
    gradient that is not finite, so that a GradScaler and the user see it.

    Source: the closed form of TrAct (arXiv 2410.23970, section 3), dW = -eta grad_W (x x^T / b + lam I)^-1.
    """

    def __init__(self, sums: Tensor, count: int | Tensor, lam: float, dtype: torch.dtype | None = None) -> None:
        """Factorise S / b + lam I.

        Args:
            sums: S, (g, n, n), symmetric, float32 or float64; it is not modified.
            count: b, the number of patches.
            lam: the damping, in the units of C's eigenvalues.
            dtype: the precision of the factor; by default that of `sums`.
        """
        self._sums = sums
        # Without a patch, lam I is to be left.
        self._count = max(1, count) if isinstance(count, int) else count.clamp(min=1)
        self._lam = lam
        self._factorise(dtype or sums.dtype)
        is_float32 = self._factor.dtype != torch.float64
        if on_host(sums) and is_float32 and self.failed and self.finite:
            self._factorise(torch.float64)

    def _factorise(self, dtype: torch.dtype) -> None:
        damped = self._sums.to(dtype) / self._count
        diagonal = damped.diagonal(dim1=-2, dim2=-1)
        # The trace contains the square of every pixel, so it shows whether one is not finite.
        self._trace: Tensor = diagonal.sum()
        diagonal.add_(self._lam)
        self._factor, info = torch.linalg.cholesky_ex(damped)
        # One value for all groups, which an accelerator keeps to itself.
        self.failed: Tensor = info.any()

    @property
    def needs_float64(self) -> Tensor:
        """Return whether this factor, in float32, has failed or loses lam: a scalar tensor on its device."""
        return self.failed | (self._trace > len(self._sums) * max_trace(self._lam))

    @property
    def finite(self) -> bool:
        """Return whether all patches were finite; this waits for the device."""
        return bool(self._trace.isfinite())

    def __call__(self, grad: Tensor) -> Tensor:
        """Return `grad` inv(C + lam I), (m, ...) like `grad`, whose m rows are split evenly over the g groups."""
        groups, _, n = self._factor.shape
        rows = grad.reshape(groups, -1, n)
        # With columns for right-hand sides, the result lies in memory as the gradient does.
        rows = rows.to(self._factor.dtype)
        out = _solve(self._factor, rows.mT).mT
        if not on_host(out):
            # An accelerator makes this choice itself, so that the host does not wait for the values.
            out = torch.where(self.failed, rows, out)
        elif self.failed:
            out = rows
        # Adds NaN if the trace is not finite, and nothing if it is.
        out = torch.add(out, self._trace, alpha=0)
        return out.reshape(grad.shape).to(grad.dtype)

    @property
    def mean_eigenvalue(self) -> float:
        """Return tr(C) / n, the mean square of what the layer reads; this waits for the device."""
        groups, n, _ = self._sums.shape
        return float(self._trace) / (groups * n)

    def condition(self) -> float:
        """Return a lower bound on the condition number of C + lam I, the largest over groups.

        It comes from power and inverse iteration with the factor L, where C + lam I = L L^T.
        """
        if self.failed or not self.finite:
            return float("inf")
        factor = self._factor
        if factor.device.type in WITH_LITTLE_ALGEBRA:
            factor = factor.cpu()
        groups, n, _ = factor.shape
        generator = torch.Generator("cpu").manual_seed(0)
        shape = (groups, n, min(CONDITION_VECTORS, n))
        top = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(factor)
        bottom = top
        for _ in range(CONDITION_STEPS):
            top = torch.linalg.qr(factor @ (factor.mT @ top)).Q
            bottom = torch.linalg.qr(torch.cholesky_solve(bottom, factor)).Q
        damped = (top.mT @ factor) @ (factor.mT @ top)
        inverse = bottom.mT @ torch.cholesky_solve(bottom, factor)
        largest = torch.linalg.eigvalsh(damped)[..., -1]
        smallest = 1 / torch.linalg.eigvalsh(inverse)[..., -1]
        return float((largest / smallest).max())


def _solve(factor: Tensor, columns: Tensor) -> Tensor:
    """Return inv(L L^T) times columns (g, n, m), for a lower factor L."""
    if factor.device.type not in WITH_LITTLE_ALGEBRA:
        return torch.cholesky_solve(columns, factor)
    half = torch.linalg.solve_triangular(factor, columns, upper=False)
    solved: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return solved


def max_trace(lam: float) -> float:
    """Return the largest trace of C at which float32 is precise enough to add `lam` to its diagonal."""
    return MAX_ROUNDING * lam / torch.finfo(torch.float32).eps


def on_host(tensor: Tensor) -> bool:
    """Return whether the host can read a value of `tensor` without waiting for a device."""
    return tensor.is_cpu


def widest_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 for a device that has no float64."""
    if device.type == "mps":
        return torch.float32
    if device.type == "xpu" and not torch.xpu.get_device_capability(device).get("has_fp64", True):
        return torch.float32
    return torch.float64
