"""Clusters of a queue's keys at several granularities, which follow the queue from step to step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.kernels.similarity import nearest
from fasttrain.system.collectives import common_generator, sent

KEYS = 8192  # of a tile: no membership of all keys in all clusters is formed


class Clusters(nn.Module):
    """Spherical k-means (Dhillon, Modha 2001) of G granularities, C clusters in all. Centroids are unit rows (C, D).

    `follow` makes one iteration over the queue. A queue changes little in a step, so iterations of many steps add up as
    those of one k-means do. The clusters of rows are looked up where they are needed, before a step and after it: that
    costs K·C·D each, as C more queries would. Kept beside the queue they would save one of the two, and be a state that
    has to follow both the queue and the centroids.
    """

    centroids_CD: Tensor

    def __init__(self, dim: int, counts: Sequence[int]) -> None:
        """counts: the clusters of each granularity, ≥ 1. Centroids are random at first."""
        super().__init__()
        self._counts = list(counts)
        self.register_buffer("centroids_CD", F.normalize(torch.randn(sum(counts), dim), dim=1))

    @torch.no_grad()
    def of(self, rows_RD: Tensor) -> Tensor:
        """Each row's cluster at every granularity: the centroid of the largest product, (G, R) int64.

        rows_RD: of any dtype of `nearest`, to which centroids are rounded.
        """
        parts = self.centroids_CD.to(rows_RD.dtype).split(self._counts)
        return torch.stack([nearest(rows_RD, part_PD) for part_PD in parts])

    @torch.no_grad()
    def follow(self, queue_KD: Tensor, good: Tensor) -> None:
        """Move each centroid to the direction of its rows' mean, and one without rows to a row that is drawn.

        The draw is from the generator that all ranks draw from alike, and sums are in the same order from run to run,
        so all ranks have the same centroids. good: 0-dim bool on the device; where false, nothing changes.
        """
        members = zip(self.of(queue_KD), self._counts, strict=True)
        sums, sizes = zip(*(_sums(queue_KD, index_K, count) for index_K, count in members), strict=True)
        drawn_C = torch.randint(len(queue_KD), (sum(self._counts),), generator=common_generator)
        seed_CD = queue_KD[sent(drawn_C, queue_KD.device)].to(self.centroids_CD.dtype)
        mean_CD = F.normalize(torch.cat(sums), dim=1)
        new_CD = torch.where(torch.cat(sizes)[:, None] > 0, mean_CD, seed_CD)
        self.centroids_CD.copy_(torch.where(good, new_CD, self.centroids_CD))


def _sums(rows_KD: Tensor, index_K: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The sum of each cluster's rows (P, D), fp32 at least, and their number (P,).

    By products with memberships: adding rows where they belong has no fixed order on a GPU.
    """
    dtype = torch.promote_types(rows_KD.dtype, torch.float32)
    sum_PD, size_P = rows_KD.new_zeros(count, rows_KD.shape[1], dtype=dtype), rows_KD.new_zeros(count, dtype=dtype)
    places_P1 = torch.arange(count, device=rows_KD.device)[:, None]
    for rows_kD, index_k in zip(rows_KD.split(KEYS), index_K.split(KEYS), strict=True):
        member_Pk = (index_k == places_P1).to(dtype)
        sum_PD += member_Pk @ rows_kD.to(dtype)
        size_P += member_Pk.sum(1)
    return sum_PD, size_P
