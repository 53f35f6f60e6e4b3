"""SwAV's assignments of images to prototypes (arXiv 2006.09882): as even as possible over the global batch."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttrain.system.collectives import max_over_ranks, sum_over_ranks

ITERATIONS = 3
TINY = 1e-30


@torch.no_grad()
def sinkhorn(
    scores_ANP: Tensor, epsilon: float, others_AKP: Tensor | None = None, counted: Tensor | None = None
) -> Tensor:
    """Assignments (A, N, P) of this rank's N images by their scores, for each of A views by itself: rows sum to 1, and
    over all ranks' images each prototype gets about as much.

    epsilon: weight of the assignments' entropy. others_AKP: scores of older images, of which each rank has some of its
    own, or none; they only help to fill the prototypes. counted: 0-dim bool, whether they do. Without gradient; fp32
    (fp64 for fp64).

    A prototype's largest score is subtracted from its scores, so that nothing overflows and none loses all its images.
    That cancels, as do the algorithm's first division by the sum of all and its divisors P and M, which are left out.
    """
    rows = scores_ANP if others_AKP is None else torch.cat([scores_ANP, others_AKP], 1)
    images = scores_ANP.shape[1]
    plan = ((rows - max_over_ranks(rows.amax(1, keepdim=True))) / epsilon).exp_()
    if counted is not None:
        plan[:, images:] *= counted
    for _ in range(ITERATIONS):
        plan /= sum_over_ranks(plan.sum(1, keepdim=True))
        plan /= plan.sum(2, keepdim=True).clamp_min(TINY)  # rows that don't count are 0, and stay so
    return plan[:, :images]
