"""Gates of pairs of classes: which numbers of an embedding two classes are compared in (arXiv 2410.18200)."""

from __future__ import annotations

from torch import Tensor, nn

EMBEDDING, HIDDEN = 512, 1024  # widths, as in the paper's code


class PairGates(nn.Module):
    """Labels of two classes, int64 (N,) each → a gate (N, D) in (0, 1), fp32: σ(MLP((e_1 + e_2)/2)). It is the same for
    both orders of a pair.

    A label takes the row of the table that it is modulo the number of rows: of more classes some share one.
    """

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.classes = nn.Embedding(classes, EMBEDDING)
        self.mlp = nn.Sequential(
            nn.ReLU(), nn.BatchNorm1d(EMBEDDING), nn.Linear(EMBEDDING, HIDDEN),
            nn.ReLU(), nn.BatchNorm1d(HIDDEN), nn.Linear(HIDDEN, dim),
        )  # fmt: skip

    def forward(self, label_N: Tensor, other_N: Tensor) -> Tensor:
        rows = self.classes.num_embeddings
        both_NE = self.classes(label_N % rows) + self.classes(other_N % rows)
        return self.mlp(both_NE / 2).float().sigmoid()
