"""Prototypes: directions that embeddings are compared with, the last layer of methods that assign images to them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Prototypes(nn.Linear):
    """(N, D) → (N, P) without a bias, whose rows `normalise` keeps at unit length (SwAV, arXiv 2006.09882).

    The gradient is that of the rows as they are. It has a part along each row, which weight normalisation has not, and
    which momentum remembers.
    """

    def __init__(self, dim: int, count: int) -> None:
        super().__init__(dim, count, bias=False)
        self.normalise(torch.tensor(True))

    @torch.no_grad()
    def normalise(self, good: Tensor) -> None:
        """After a step. good: 0-dim bool on the device; where false, nothing changes."""
        self.weight.copy_(torch.where(good, F.normalize(self.weight, dim=1), self.weight))


class WeightNormLinear(nn.Linear):
    """(N, D) → (N, P) without a bias, by rows of unit length that the weights point along.

    Weight normalisation (arXiv 1602.07868) with lengths fixed at 1, as in DINO (arXiv 2104.14294).
    """

    def __init__(self, dim: int, count: int) -> None:
        super().__init__(dim, count, bias=False)

    def rows(self) -> Tensor:
        """(P, D), fp32 at least."""
        return F.normalize(self.weight, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.rows())
