"""A contrast with the communities that the images of a batch fall into (gCooL; Li et al., arXiv 2110.14863)."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttrain.losses import reference
from fasttrain.system.collectives import sum_over_ranks


def community_contrast(
    a_ND: Tensor, b_ND: Tensor, ra_NC: Tensor, rb_NC: Tensor, temperature: float, impl: str = "auto"
) -> Tensor:
    """mean −log softmax_c(a_i·C_c/τ) at the community of b_i, and the other way round; the mean of both.

    a_ND, b_ND (N, D): this rank's rows of two views, L2-normalised; ra_NC, rb_NC (N, C): how much of each row is of
    each community. The same N on every rank. The mean over the ranks is that of one process that holds all rows.
    Scalar, fp32 (fp64 for fp64). impl: "reference" is plain torch as the formula reads, of one rank.

    C_c is the mean of b's rows in community c, over all ranks and without gradient; a row is in the community of which
    it has most. Communities that no row is in are left out: in the authors' code they stand in the sum, at the origin.
    """
    if impl == "reference":
        one = reference.community_contrast(a_ND, b_ND, rb_NC, temperature)
        return (one + reference.community_contrast(b_ND, a_ND, ra_NC, temperature)) / 2
    return (_one_way(a_ND, b_ND, rb_NC, temperature) + _one_way(b_ND, a_ND, ra_NC, temperature)) / 2


def _one_way(a_ND: Tensor, b_ND: Tensor, r_NC: Tensor, temperature: float) -> Tensor:
    with torch.no_grad():
        every_C = torch.arange(r_NC.shape[1], device=r_NC.device)
        member_NC = (r_NC.argmax(1, keepdim=True) == every_C).to(b_ND.dtype)  # one_hot would make the host wait
        summed = sum_over_ranks(torch.cat([member_NC.T @ b_ND, member_NC.sum(0)[:, None]], 1))
        sum_CD, count_C1 = summed.tensor_split([b_ND.shape[1]], 1)
        centroid_CD = sum_CD / count_C1.clamp_min(1)
    s_NC = (a_ND @ centroid_CD.T / temperature).masked_fill(count_C1[:, 0] == 0, -torch.inf)
    return (s_NC.logsumexp(1) - (member_NC * s_NC.where(count_C1[:, 0] > 0, 0)).sum(1)).mean()
