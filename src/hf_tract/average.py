"""What `every` and `ema` keep of a layer's second moments from one optimizer step to the next."""

from __future__ import annotations

import torch
from torch import Tensor


class KeptMoment:
    """A weighted sum of moments and its weight, in one vector: g * n * n + 1 numbers, the weight last."""

    def __init__(self, ema: float, lam: float) -> None:
        """Starts with nothing kept.

        Args:
            ema: decay of the sum and of its weight at each `update`; 0 keeps the newest moment alone.
            lam: the damping, by which the gradient stays as it is until there is a moment.
        """
        self.ema, self.lam = ema, lam
        self.sums: Tensor | None = None

    def update(self, moment: Tensor, count: Tensor) -> Tensor:
        """Takes in the moment of one step; the host waits for nothing.

        Args:
            moment: C, (g, n, n), of this step.
            count: its patches, a scalar. A moment of none, or a non-finite one, is not kept.

        Returns:
            Whether the moment is finite, a scalar: if not, this step's gradient must not look as if it were.
        """
        finite = moment.diagonal(dim1=-2, dim2=-1).sum().isfinite()
        new = torch.cat([moment.flatten(), moment.new_ones(1)])
        old = torch.zeros_like(new) if self.sums is None else self.sums.to(new)
        self.sums = torch.where(finite & (count > 0), self.ema * old + (1 - self.ema) * new, old)
        return finite

    def mean(self, device: torch.device, n: int) -> Tensor:
        """The average so far, (g, n, n); with nothing kept (1 - lam) I, which leaves gradients as they are."""
        assert self.sums is not None
        sums = self.sums.to(device)
        mean = (sums[:-1] / sums[-1]).view(-1, n, n)
        return torch.where(sums[-1] > 0, mean, (1 - self.lam) * torch.eye(n, dtype=sums.dtype, device=device))
