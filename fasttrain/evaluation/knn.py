"""Weighted k-nearest-neighbour classification (Wu et al., arXiv 1805.01978, section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttrain.evaluation.accuracy import RANKED
from fasttrain.evaluation.features import Features

NEIGHBOURS = 200  # of Wu et al., for ImageNet
LEAST = 5  # neighbours: fewer follow single images
QUERY_ROWS, MEMORY_ROWS = 2048, 16384  # similarities held at once: 128 MiB, whatever the size of the sets


def neighbours(label_N: Tensor, k: int = 0) -> int:
    """How many neighbours vote: k, or for 0 a sixth of the mean number of a class's images, as 200 is of ImageNet's.

    For 0 at least LEAST, if that is no more than half of that number, and at most NEIGHBOURS. With more than a class
    has, the neighbours of any image are all there are, and the most frequent class wins.
    """
    if not k:
        images = len(label_N) // len(label_N.unique())
        k = min(NEIGHBOURS, max(images // 6, min(LEAST, images // 2)))
    return min(max(k, 1), len(label_N))


def knn(
    memory: Features, queries: Features, num_classes: int, k: int, temperature: float, device: torch.device
) -> Tensor:
    """Rank the queries' classes, see evaluation/accuracy.py. k nearest by cosine similarity vote with
    exp(similarity / temperature); a class without a vote is not named.

    Labels lie below num_classes, and k within the memory.
    """
    ranked_Nr = torch.empty(len(queries), min(RANKED, num_classes), dtype=torch.int64)
    for first in range(0, len(queries), QUERY_ROWS):
        rows = slice(first, first + QUERY_ROWS)
        query_QF = F.normalize(queries.rows(rows, device), dim=1)
        similarity_Qk, label_Qk = _nearest(query_QF, memory, k)
        votes_QC = torch.zeros(len(query_QF), num_classes, device=device)
        votes_QC.scatter_add_(1, label_Qk, ((similarity_Qk - 1) / temperature).exp())  # −1: no overflow, same order
        most_Qr, class_Qr = votes_QC.topk(ranked_Nr.shape[1])
        ranked_Nr[rows] = class_Qr.where(most_Qr > 0, -1).cpu()
    return ranked_Nr


def _nearest(query_QF: Tensor, memory: Features, k: int) -> tuple[Tensor, Tensor]:
    """Similarities and labels of the k nearest rows of the memory, (Q, k) each, the memory read a chunk at a time."""
    device = query_QF.device
    best_Qk = torch.empty(len(query_QF), 0, device=device)
    label_Qk = torch.empty(len(query_QF), 0, dtype=torch.int64, device=device)
    for first in range(0, len(memory), MEMORY_ROWS):
        rows = slice(first, first + MEMORY_ROWS)
        similarity_QM = query_QF @ F.normalize(memory.rows(rows, device), dim=1).T
        label_M = memory.label_N[rows].to(device)
        values, places = torch.cat([best_Qk, similarity_QM], 1).topk(min(k, best_Qk.shape[1] + len(label_M)), dim=1)
        label_Qk = torch.cat([label_Qk, label_M.expand(len(query_QF), -1)], 1).gather(1, places)
        best_Qk = values
    return best_Qk, label_Qk
