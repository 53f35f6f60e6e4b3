"""Contrast of classes that are paired, in the numbers a gate leaves them (Hydra, SimLAP; arXiv 2410.18200).

    L = mean_{i, p: y_p = y'_i} [ log(exp s_ip + Σ_{n: y_n ≠ y_i, y'_i} exp s_in) − s_ip ]
    s_ij = (z_i∘g_i)·(k_j∘g_i)/τ

y_i is a row's class, y'_i the class it is paired with, g_i the pair's gate. A positive is compared with negatives only,
not with other positives. The mean is over all positive pairs, so a frequent class has much of it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttrain.losses import reference
from fasttrain.system.collectives import common_generator, gather_rows, own_rows, sent, sum_over_ranks, world_size


def paired_labels(label_N: Tensor) -> Tensor:
    """The class that each row of this rank is paired with: the labels of all ranks' rows in another order, which every
    step draws anew from the generator that all ranks draw from alike. A row may be paired with its own class.

    label_N: int64, the same N on every rank. A reading of the paper's arbitrary pairs: rows are paired, not classes, so
    that a batch has many pairs, frequent classes are in more of them, and each row's class is in the batch.
    """
    label_M = gather_rows(label_N[:, None])[:, 0]
    order_M = sent(torch.randperm(len(label_M), generator=common_generator), label_N.device)
    return label_M[order_M[own_rows(len(label_N))]]


def gated_contrast(
    z_ND: Tensor, k_ND: Tensor, gate_ND: Tensor, label_N: Tensor, paired_N: Tensor, temperature: float,
    impl: str = "auto",
) -> Tensor:  # fmt: skip
    """L of rows z with the rows k of all ranks, in which their images lie in the same order. All take gradient.

    z_ND, k_ND (N, D): rows of two views, L2-normalised, row i of both from one image; gate_ND (N, D): of row i's pair
    of classes; label_N, paired_N: any int64; the same N on every rank. A row whose paired class is in no row of k is no
    part of the mean; pairs of one that has no negatives count as 0. Forms N×M, M rows being of all ranks: each row has
    other negatives than the rest, and several positives that stand apart. The mean over the ranks is that of one
    process that holds all rows. impl: "reference" is plain torch as the formula reads, of one rank. Scalar, fp32 (fp64
    for fp64).
    """
    if impl == "reference":
        return reference.gated_contrast(z_ND, k_ND, gate_ND, label_N, paired_N, temperature)
    k_MD, label_M = gather_rows(k_ND), gather_rows(label_N[:, None])[:, 0]
    # the keys have the query's own gate, so its square on the query is as good
    s_NM = (z_ND * gate_ND.square()) @ k_MD.T / temperature
    positive_NM = label_M == paired_N[:, None]
    negative_NM = (label_M != label_N[:, None]) & ~positive_NM
    compared_N1 = negative_NM.any(1, keepdim=True)
    # a sum over nothing would have no gradient that is a number
    lse_N1 = s_NM.masked_fill(compared_N1 & ~negative_NM, -math.inf).logsumexp(1, keepdim=True)
    lost_NM = F.softplus(lse_N1.where(compared_N1, -math.inf) - s_NM).where(positive_NM, 0)
    pairs = sum_over_ranks(positive_NM.sum()).clamp_min(1)
    return world_size() * lost_NM.sum() / pairs


@torch.no_grad()
def gate_figures(gate_ND: Tensor) -> dict[str, Tensor]:
    """`gate`, the mean of a gate's numbers: at 0 nothing is compared. `gate_entropy`, the mean over them of −g log g −
    (1 − g) log(1 − g): log 2 where a gate is undecided, 0 where it is open or shut."""
    entropy = torch.special.entr(gate_ND) + torch.special.entr(1 - gate_ND)
    return {"gate": gate_ND.mean(), "gate_entropy": entropy.mean()}
