"""Weighted k-nearest-neighbour classification (Wu et al., arXiv 1805.01978, section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttrain.evaluation.features import Features
from fasttrain.evaluation.ranking import NEVER, Sharing, best_classes, share_of_rows

NEIGHBOURS = 200  # of Wu et al., for ImageNet
LEAST = 5  # neighbours: fewer follow single images
QUERY_ROWS, MEMORY_ROWS = 16384, 16384  # features held at once: 128 MiB each for a ResNet-50, whatever the sets' size
KEPT_NEIGHBOURS = 1 << 25  # of all queries held at once: 400 MiB, of which more than 2048 each leave fewer queries
BLOCK_ROWS = 256  # of queries in one product, which is the same on however many ranks


def neighbours(label_N: Tensor, k: int = 0) -> int:
    """How many neighbours vote: k, or for 0 a sixth of the mean number of a class's images, as 200 is of ImageNet's.

    For 0 at least LEAST, if that is no more than half of that number, and at most NEIGHBOURS. With more than a class
    has, the neighbours of any image are all there are, and the most frequent class wins. Never more than there are.
    """
    if not k:
        images = len(label_N) // len(label_N.unique())
        k = min(NEIGHBOURS, max(images // 6, min(LEAST, images // 2)))
    return min(max(k, 1), len(label_N))


def knn_settings(label_N: Tensor, k: int, temperature: float) -> dict[str, Any]:
    """What is printed with a figure, for the memory's labels and the k that was asked for: the k that voted."""
    voted = neighbours(label_N, k)
    cut = {"k_asked": k} if k > voted else {}
    return {"k": voted, **cut, "temperature": temperature}


def knn(
    memory: Features, queries: Features, num_classes: int, k: Sequence[int], temperatures: Sequence[float],
    device: torch.device, ranks: Sharing,
) -> dict[tuple[int, float], Tensor]:  # fmt: skip
    """Rank the queries' classes, see evaluation/accuracy.py, for each k that votes and each temperature.

    The k nearest by cosine similarity s vote with exp(s / temperature); the memory is read once for all of them. k: as
    for `neighbours`, so that a pair's k is the one it returns. A class without a vote is not named. Labels lie below
    num_classes. Each rank takes a part of the queries, and all return the same.
    """
    k_all = sorted({neighbours(memory.label_N, each) for each in k})
    share = share_of_rows(len(queries), ranks, BLOCK_ROWS)
    pairs = [(each, temperature) for each in k_all for temperature in temperatures]
    parts = {pair: [best_classes(torch.empty(0, num_classes))] for pair in pairs}
    at_once = max(BLOCK_ROWS, min(QUERY_ROWS, KEPT_NEIGHBOURS // k_all[-1] // BLOCK_ROWS * BLOCK_ROWS))
    for first in range(share.start, share.stop, at_once):
        query_QF = F.normalize(queries.rows(slice(first, min(first + at_once, share.stop)), device), dim=1)
        for similarity_Bk, label_Bk in _nearest(query_QF, memory, k_all[-1]):
            for each, temperature in pairs:
                votes_BC = _votes(similarity_Bk[:, :each], label_Bk[:, :each], num_classes, temperature)
                parts[each, temperature].append(best_classes(votes_BC))
    found = ranks.gather({pair: torch.cat(parts[pair]) for pair in pairs})
    return {pair: torch.cat([of_rank[pair] for of_rank in found]) for pair in pairs}


def _nearest(query_QF: Tensor, memory: Features, k: int) -> list[tuple[Tensor, Tensor]]:
    """Similarities and labels of the k nearest rows of the memory, nearest first, (B, k) each for every block of
    queries, the memory read a chunk at a time."""
    blocks = query_QF.split(BLOCK_ROWS)
    best = [
        (block.new_empty(len(block), 0), memory.label_N.new_empty(len(block), 0, device=block.device))
        for block in blocks
    ]
    for first in range(0, len(memory), MEMORY_ROWS):
        rows = slice(first, first + MEMORY_ROWS)
        memory_FM = F.normalize(memory.rows(rows, query_QF.device), dim=1).T
        label_M = memory.label_N[rows].to(query_QF.device)
        for number, block in enumerate(blocks):
            similarity_Bk, places = (block @ memory_FM).topk(min(k, len(label_M)), dim=1)
            both = torch.cat([best[number][0], similarity_Bk], 1), torch.cat([best[number][1], label_M[places]], 1)
            similarity_Bk, places = both[0].topk(min(k, both[0].shape[1]), dim=1)
            best[number] = similarity_Bk, both[1].gather(1, places)
    return best


def _votes(similarity_Bk: Tensor, label_Bk: Tensor, num_classes: int, temperature: float) -> Tensor:
    """Each class's votes, (B, C), in units of the nearest neighbour's; NEVER for a class without one.

    Summed in fp64 and then rounded, so that the order of additions, which a GPU does not keep, decides nothing.
    """
    weight_Bk = ((similarity_Bk - similarity_Bk[:, :1]).double() / temperature).exp()
    votes_BC = weight_Bk.new_zeros(len(weight_Bk), num_classes).scatter_add_(1, label_Bk, weight_Bk).float()
    return votes_BC.masked_fill(votes_BC == 0, NEVER)
