"""The similarity losses in plain torch, each as short as its formula; the terms are held to them.

N batch, M ≥ N rows of the global batch, D feature width, K queue length. All rows L2-normalised; queries carry the
gradient. Sources: InfoNCE as in MoCo (arXiv 1911.05722, eq. 1); the cross-similarity consistency and uniform-similarity
regularisers are this project's reading of XMoCo's abstract (arXiv 2206.04676), see docs/objective.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def info_nce(q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor, temperature: float) -> Tensor:
    """mean_i [ log(exp s⁺_i + Σ_j exp s_ij) − s⁺_i ],  s⁺_i = q_i·k_i/τ,  s_ij = q_i·Q_j/τ."""
    positive_N1 = (q_ND * k_ND).sum(1, keepdim=True) / temperature
    logits_NK1 = torch.cat([positive_N1, q_ND @ queue_KD.T / temperature], dim=1)
    return (torch.logsumexp(logits_NK1, dim=1) - positive_N1[:, 0]).mean()


def decoupled(q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor, temperature: float) -> Tensor:
    """mean_i [ log Σ_j exp s_ij − s⁺_i ]: InfoNCE without the positive in its denominator (arXiv 2110.06848, eq. 6)."""
    positive_N = (q_ND * k_ND).sum(1) / temperature
    return (torch.logsumexp(q_ND @ queue_KD.T / temperature, dim=1) - positive_N).mean()


def sce(
    q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor, temperature: float, key_temperature: float, weight: float
) -> Tensor:
    """mean_i −Σ_j w_ij log p_ij,  p_i = softmax([s⁺_i, s_i]),  w_i = [λ, (1 − λ) softmax(k_i Qᵀ/τ_k)] (arXiv
    2111.14585)."""
    logits_NK1 = torch.cat([(q_ND * k_ND).sum(1, keepdim=True), q_ND @ queue_KD.T], dim=1) / temperature
    similar_NK = torch.softmax(k_ND @ queue_KD.T / key_temperature, dim=1)
    target_NK1 = torch.cat([torch.full_like(similar_NK[:, :1], weight), (1 - weight) * similar_NK], dim=1)
    return -(target_NK1 * torch.log_softmax(logits_NK1, dim=1)).sum(1).mean()


def ressl(q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor, temperature: float, key_temperature: float) -> Tensor:
    """mean_i −Σ_j softmax_j(k_i Qᵀ/τ_k) log softmax_j(q_i Qᵀ/τ) (arXiv 2107.09282)."""
    target_NK = torch.softmax(k_ND @ queue_KD.T / key_temperature, dim=1)
    return -(target_NK * torch.log_softmax(q_ND @ queue_KD.T / temperature, dim=1)).sum(1).mean()


def mutual_consistency(q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor, temperature: float) -> Tensor:
    """mean_i ½ [KL(P_i‖R_i) + KL(R_i‖P_i)],  P_i = softmax(k_i Qᵀ/τ),  R_i = softmax(q_i Qᵀ/τ) (arXiv 2010.02217)."""
    forward = queue_consistency(q_ND, k_ND, queue_KD, temperature)
    return (forward + queue_consistency(k_ND, q_ND, queue_KD, temperature)) / 2


def queue_consistency(q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor, temperature: float) -> Tensor:
    """mean_i KL( softmax(k_i Qᵀ/τ) ‖ softmax(q_i Qᵀ/τ) ): the key's similarities are the target of the query's."""
    log_p_NK = torch.log_softmax(k_ND @ queue_KD.T / temperature, dim=1)
    log_q_NK = torch.log_softmax(q_ND @ queue_KD.T / temperature, dim=1)
    return (log_p_NK.exp() * (log_p_NK - log_q_NK)).sum(1).mean()


def queue_uniformity(q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor, temperature: float) -> Tensor:
    """mean_i KL( U ‖ softmax_j(q_i·Q_j/τ) ) = mean_i [ logsumexp_j s_ij − mean_j s_ij − log K ]."""
    s_NK = q_ND @ queue_KD.T / temperature
    return (s_NK.logsumexp(1) - s_NK.mean(1) - math.log(len(queue_KD))).mean()


def neighbour_contrast(
    neighbour_ND: Tensor, p_MD: Tensor, first: int, temperature: float, decoupled: bool = False
) -> Tensor:
    """mean_i −log softmax_j(n_i·p_j/τ) at j = first+i (NNCLR, arXiv 2104.14548); decoupled: j itself left out of
    the denominator."""
    s_NM = neighbour_ND @ p_MD.T / temperature
    rows_N = torch.arange(len(s_NM), device=s_NM.device)
    positive_N = s_NM[rows_N, first + rows_N]
    if decoupled:
        s_NM = s_NM.scatter(1, (first + rows_N)[:, None], -math.inf)
    return (s_NM.logsumexp(1) - positive_N).mean()


def batch_consistency(q_ND: Tensor, k_ND: Tensor) -> Tensor:
    """Σ_{i≠j} (A_ij − A_ji)² / (N(N−1)),  A = q kᵀ: a pair keeps its similarity when the two views are exchanged."""
    a_NN = q_ND @ k_ND.T
    n = len(q_ND)
    return (a_NN - a_NN.T).square().sum() / (n * (n - 1))


def batch_uniformity(q_ND: Tensor, k_MD: Tensor, first: int, temperature: float) -> Tensor:
    """mean_i KL( U ‖ softmax_{j≠i}(q_i·k_j/τ) ) over the M−1 other images' keys; query i's own key is row first+i."""
    s_NM = q_ND @ k_MD.T / temperature
    rows_N1 = torch.arange(len(q_ND), device=s_NM.device)[:, None]
    own_NM = torch.arange(len(k_MD), device=s_NM.device) == rows_N1 + first
    negatives = len(k_MD) - 1
    lse_N = s_NM.masked_fill(own_NM, -math.inf).logsumexp(1)
    mean_N = s_NM.masked_fill(own_NM, 0).sum(1) / negatives
    return (lse_N - mean_N - math.log(negatives)).mean()
