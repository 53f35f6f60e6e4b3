"""Contrastive losses over the rows of the global batch, all of which take gradient, without a matrix of similarities.

Shapes: a_ND, b_ND (N, D): this rank's rows of two views, row i of both from one image; z_ND (N, D): its rows of any
views. Rows L2-normalised, the same N on every rank, at least 2 images or rows over all. The mean of a loss over the
ranks is that of one process that holds all rows. Values are scalars, fp32 (fp64 for fp64).

impl: "reference" is plain torch as the formulas read, of one rank; others are versions of `log_sum_exp`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttrain.kernels.similarity import log_sum_exp
from fasttrain.losses import reference
from fasttrain.losses.queue import positive_weights
from fasttrain.system.collectives import first_row, gather_rows, own_rows, world_size


def nt_xent(a_ND: Tensor, b_ND: Tensor, temperature: float, impl: str = "auto") -> Tensor:
    """NT-Xent of SimCLR (arXiv 2002.05709, eq. 1): each row against all others of both views, its positive among them.

    A mean over the 2N rows, as the paper has it; the sum of two views' means, as in the paper's code, is twice as much.
    """
    if impl == "reference":
        return reference.nt_xent(a_ND, b_ND, temperature)
    z_RD = torch.cat([a_ND, b_ND])
    lse_R = _over(z_RD, gather_rows(z_RD), temperature, impl)
    return lse_R.mean() - (a_ND * b_ND).sum(1).mean() / temperature


def decoupled(a_ND: Tensor, b_ND: Tensor, temperature: float, weighted: bool = False, impl: str = "auto") -> Tensor:
    """NT-Xent without the positive among the others: DCL (Yeh et al., arXiv 2110.06848). May be negative.

    weighted: DCLW, where pairs that are far apart weigh more. One view at a time, since an image's two rows are left
    out: to take the positive off a sum that it dominates would leave no digits.
    """
    if impl == "reference":
        return reference.in_batch_decoupled(a_ND, b_ND, temperature, weighted)
    a_MD, b_MD = gather_rows(a_ND), gather_rows(b_ND)
    lse_N = sum(
        torch.logaddexp(_over(x_ND, a_MD, temperature, impl), _over(x_ND, b_MD, temperature, impl))
        for x_ND in (a_ND, b_ND)
    )
    weight_N = positive_weights(a_ND, b_ND) if weighted else 1
    return (lse_N / 2 - weight_N * (a_ND * b_ND).sum(1) / temperature).mean()


def sup_con(z_ND: Tensor, label_N: Tensor, temperature: float, impl: str = "auto") -> Tensor:
    """Supervised contrast (Khosla et al., arXiv 2004.11362, eq. 2, L_out), times τ/τ_base as in its code.

    label_N: any int64; a row's positives are the other rows of its label. A row that has none is no part of the mean.
    """
    if impl == "reference":
        return reference.sup_con(z_ND, label_N, temperature)
    z_MD, label_M = gather_rows(z_ND), gather_rows(label_N[:, None])[:, 0]
    lse_N = _over(z_ND, z_MD, temperature, impl)
    own = own_rows(len(z_ND))
    sum_ND, others_M = sums_by_label(z_MD, label_M, own)
    positive_N = ((sum_ND - z_ND) * z_ND).sum(1) / others_M[own].clamp_min(1) / temperature
    loss = ((lse_N - positive_N) * (others_M[own] > 0)).sum() / (others_M > 0).sum().clamp_min(1)
    return temperature / reference.BASE_TEMPERATURE * world_size() * loss


def _over(x_ND: Tensor, keys_MD: Tensor, temperature: float, impl: str) -> Tensor:
    """log Σ_j exp(x_i·y_j/τ) over the keys of all ranks but the one in this row's own place."""
    return log_sum_exp(x_ND, keys_MD, temperature, own=first_row(len(x_ND)), impl=impl)


def sums_by_label(z_MD: Tensor, label_M: Tensor, own: slice) -> tuple[Tensor, Tensor]:
    """For each row of `own` the sum (N, D) of all rows of its label; for each of all how many others (M,) have its own.

    Labels are compared by their places once sorted, so that shapes do not depend on them and the host need not wait.
    """
    sorted_M, order_M = label_M.sort()
    first_M, end_M = (torch.searchsorted(sorted_M, label_M, right=right) for right in (False, True))
    # A bag begins where its row's label does: all of a label are empty but the last one, which holds all its rows.
    sum_MD = F.embedding_bag(order_M, z_MD, torch.searchsorted(sorted_M, sorted_M), mode="sum")
    return sum_MD[end_M[own] - 1], end_M - first_M - 1
