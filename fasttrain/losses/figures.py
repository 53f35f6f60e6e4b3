"""How well a contrast tells positives from negatives: figures beside a loss, which says nothing while a queue fills.

- `contrastive_accuracy`: the share of queries to which their positive is nearer than every negative, 0 … 1.
- `positive_similarity`, `negative_similarity`: the mean cosine of a query with its positive, and with a negative.

Shapes: q_ND, k_ND (N, D): this rank's queries and their positives, rows L2-normalised. Values are scalars, fp32 (fp64
for fp64), without gradient; their means over the ranks are those of one process that holds all rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fasttrain.kernels.similarity import log_sum_exp_with_maximum
from fasttrain.losses.contrast import sums_by_label
from fasttrain.losses.queue import QueueRead, QueueTerm, dot
from fasttrain.system.collectives import gather_rows, own_rows, world_size

MARGIN = 1e-5  # of a cosine, more than roundings make: of rows that are all alike, no positive is nearer


@torch.no_grad()
def queue_figures(contrast: QueueTerm, q_ND: Tensor, k_ND: Tensor, read: QueueRead) -> dict[str, Tensor]:
    """Of a contrast whose negatives are the queue, by the readout that it needs itself.

    Positives are compared as negatives are: in the queue's dtype.
    """
    side = next(side for side in contrast.sides if side.rows == "q")
    return figures_of_rows(q_ND, k_ND, side.temperature * read[side].maximum_N, read)


@torch.no_grad()
def figures_of_rows(q_ND: Tensor, k_ND: Tensor, nearest_N: Tensor, read: QueueRead) -> dict[str, Tensor]:
    """The same, where the cosine of each query's nearest negative is known: (N,)."""
    dtype = read.queue_KD.dtype
    return _figures(dot(q_ND.to(dtype), k_ND.to(dtype)), nearest_N, dot(q_ND, read.mean_D))


@torch.no_grad()
def batch_figures(q_ND: Tensor, k_ND: Tensor, *others_MD: Tensor) -> dict[str, Tensor]:
    """Of a contrast whose negatives are the other images' rows: of each tensor, the rows of all ranks, M ≥ 2, all but
    that in the query's own place.

    A pass over them of its own: a loss that has the positive among them knows no largest of the others.
    """
    own = own_rows(len(q_ND))
    nearest = [log_sum_exp_with_maximum(q_ND, rows_MD, 1.0, own=own.start)[1] for rows_MD in others_MD]
    sum_ND = torch.stack([rows_MD.sum(0) - rows_MD[own] for rows_MD in others_MD]).sum(0)
    negative_N = dot(q_ND, sum_ND) / sum(len(rows_MD) - 1 for rows_MD in others_MD)
    return _figures(dot(q_ND, k_ND), torch.stack(nearest).amax(0), negative_N)


@torch.no_grad()
def label_figures(z_ND: Tensor, label_N: Tensor) -> dict[str, Tensor]:
    """Of a row's similarities to the other rows of its label, and to those of other labels, a mean over the rows that
    have any. Arguments as of `contrast.sup_con`. Of several positives, which should be nearest is not said."""
    z_MD, label_M = gather_rows(z_ND), gather_rows(label_N[:, None])[:, 0]
    own = own_rows(len(z_ND))
    same_ND, others_M = sums_by_label(z_MD, label_M, own)
    return {
        "positive_similarity": _mean_of_pairs(dot(z_ND, same_ND - z_ND), others_M, own),
        "negative_similarity": _mean_of_pairs(dot(z_ND, z_MD.sum(0) - same_ND), len(z_MD) - 1 - others_M, own),
    }


def _mean_of_pairs(sum_N: Tensor, pairs_M: Tensor, own: slice) -> Tensor:
    """The mean over the rows of all ranks that have pairs of the mean over a row's pairs; this rank's part of it, whose
    mean over the ranks it is."""
    mean_N = sum_N / pairs_M[own].clamp_min(1)
    return world_size() * (mean_N * (pairs_M[own] > 0)).sum() / (pairs_M > 0).sum().clamp_min(1)


def _figures(positive_N: Tensor, nearest_N: Tensor, negative_N: Tensor) -> dict[str, Tensor]:
    return {
        "contrastive_accuracy": (positive_N > nearest_N + MARGIN).to(positive_N.dtype).mean(),
        "positive_similarity": positive_N.mean(),
        "negative_similarity": negative_N.mean(),
    }


def mean_figures(directions: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The means over the directions of a symmetric loss, by name."""
    return {name: torch.stack([figures[name] for figures in directions]).mean() for name in directions[0]}
