"""A learned gate of pairs of embeddings (AdaMEOW, arXiv 2212.13847)."""

from __future__ import annotations

from torch import Tensor, nn

HIDDEN = 16  # as in the authors' code
LIMIT = 2.0  # |x| < LIMIT, so no pair counts more than e^2 times, by its sigmoid, what another does


class PairGate(nn.Module):
    """x = MLP(z + y) of width D → 16 → tanh → 1, and 2 tanh(x/2) of it: how much a pair counts, before its sigmoid."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(dim, HIDDEN), nn.Linear(HIDDEN, 1)

    def forward(self, sum_D: Tensor) -> Tensor:
        """(…, D) → (…)."""
        return self._limited(self.inner(sum_D))

    def of_pairs(self, z_ND: Tensor, y_kD: Tensor) -> Tensor:
        """forward of every z_i + y_j, (N, k). Rows of any dtype; the result is in that of the weights.

        W(z + y) = Wz + Wy, so no N·k·D product is made; N·k·16 numbers are held, so y_kD is to be a tile.
        """
        weight_HD = self.inner.weight
        y_kH = self.inner(y_kD.to(weight_HD.dtype))
        z_NH = z_ND.to(weight_HD.dtype) @ weight_HD.T
        return self._limited(z_NH[:, None] + y_kH)

    def _limited(self, inner_H: Tensor) -> Tensor:
        return LIMIT * (self.outer(inner_H.tanh())[..., 0] / LIMIT).tanh()
