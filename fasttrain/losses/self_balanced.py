"""Self-balanced contrast (BaCon, arXiv 2310.01376): images are positives of each other as far as one class is likely to
hold both.

    L = mean_i −Σ_j m_ij log softmax_{j≠i}(z_i·z_j/τ) / Σ_j m_ij,   m_ij = p_i·p_j, and 1 for an image's own two views

It is SupCon over the 2M rows of two views with positives that are more or less so: where p is one class for certain, it
is SupCon itself, without its factor. p takes no gradient.

Shapes: a_ND, b_ND (N, D): this rank's rows of two views, row i of both from one image, L2-normalised; p_NC (N, C): an
image's classes, rows that sum to 1. The same N on every rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fasttrain.kernels.similarity import log_sum_exp
from fasttrain.losses import reference
from fasttrain.system.collectives import first_row, gather_rows, sum_over_ranks, world_size

ADJUSTMENT = 0.5  # power of the prior that is taken off, as in the paper's code
PRIOR_MOMENTUM = 0.99


class Contrasts(NamedTuple):
    """Scalars, fp32 (fp64 for fp64); their means over the ranks are those of one process that holds all rows."""

    nt_xent: Tensor
    balanced: Tensor
    positives: Tensor  # mean of Σ_j m_ij, without gradient: 1 where an image has its own other view alone


def contrasts(a_ND: Tensor, b_ND: Tensor, p_NC: Tensor, temperature: float, impl: str = "auto") -> Contrasts:
    """NT-Xent and L by one pass over the similarities, as both have the same denominators. All rows take gradient.

    No matrix of similarities is formed: Σ_ij (m_ij/Σ_j m_ij) z_i·z_j is the product of two sums over all rows of
    class times embedding, (C, D), which ranks add up. impl: "reference" is plain torch as the formulas read, of one
    rank; others are versions of `log_sum_exp`.
    """
    p_NC = p_NC.detach()
    if impl == "reference":
        m_NN = p_NC @ p_NC.T
        positives = 1 + 2 * (m_NN.sum(1) - m_NN.diagonal()).mean()
        nt_xent = reference.nt_xent(a_ND, b_ND, temperature)
        return Contrasts(nt_xent, reference.self_balanced(a_ND, b_ND, p_NC, temperature), positives)
    z_RD = torch.cat([a_ND, b_ND])
    lse = log_sum_exp(z_RD, gather_rows(z_RD), temperature, own=first_row(len(z_RD)), impl=impl).mean()
    pair_N, both_ND = (a_ND * b_ND).sum(1), a_ND + b_ND
    # Sums over all images have an image's two rows with themselves and each other, too, at a weight of p_i·p_i.
    own_N = p_NC.square().sum(1)
    weight_N = 1 + 2 * (p_NC @ sum_over_ranks(p_NC.sum(0)) - own_N)
    share_NC = p_NC / weight_N[:, None]
    to_CD, from_CD = sum_over_ranks(torch.stack([share_NC.T @ both_ND, p_NC.T @ both_ND]))
    of_all = (to_CD * from_CD).sum() / (world_size() * len(a_ND))
    corrected = ((2 * pair_N - own_N * both_ND.square().sum(1)) / weight_N).mean()
    positive = (of_all + corrected) / 2
    return Contrasts(lse - pair_N.mean() / temperature, lse - positive / temperature, weight_N.mean())


@torch.no_grad()
def soft_classes(scores_VNC: Tensor, prior_C: Tensor, temperature: float) -> Tensor:
    """p (N, C), without gradient: ∝ softmax_c(score/τ) / prior_c^½, the mean over the views. So classes count less
    that many images are in."""
    return (scores_VNC / temperature - ADJUSTMENT * prior_C.log()).softmax(2).mean(0)


@torch.no_grad()
def class_share(scores_VNC: Tensor, temperature: float) -> Tensor:
    """How much of this rank's views is in each class, (C,), by softmax_c(score/τ): what the prior is an average of."""
    return (scores_VNC / temperature).softmax(2).mean((0, 1))


@torch.no_grad()
def move_prior(prior_C: Tensor, share_C: Tensor, good: Tensor) -> None:
    """prior ← 0.99·prior + 0.01·share, in place. share_C: of all ranks. good: 0-dim bool on the device; where false,
    nothing changes."""
    prior_C.copy_(torch.where(good, torch.lerp(share_C, prior_C, PRIOR_MOMENTUM), prior_C))
