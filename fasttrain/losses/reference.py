"""The similarity losses in plain torch, each as short as its formula; the terms are held to them.

N batch, M ≥ N rows of the global batch, D feature width, K queue length. All rows L2-normalised; queries carry the
gradient. Sources: InfoNCE as in MoCo (arXiv 1911.05722, eq. 1); the cross-similarity consistency and uniform-similarity
regularisers are this project's reading of XMoCo's abstract (arXiv 2206.04676), see docs/objective.md. Others are named
where they stand.
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


def queue_consistency(q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor, temperature: float) -> Tensor:
    """mean_i KL( softmax(k_i Qᵀ/τ) ‖ softmax(q_i Qᵀ/τ) ): the key's similarities are the target of the query's."""
    log_p_NK = torch.log_softmax(k_ND @ queue_KD.T / temperature, dim=1)
    log_q_NK = torch.log_softmax(q_ND @ queue_KD.T / temperature, dim=1)
    return (log_p_NK.exp() * (log_p_NK - log_q_NK)).sum(1).mean()


def queue_uniformity(q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor, temperature: float) -> Tensor:
    """mean_i KL( U ‖ softmax_j(q_i·Q_j/τ) ) = mean_i [ logsumexp_j s_ij − mean_j s_ij − log K ]."""
    s_NK = q_ND @ queue_KD.T / temperature
    return (s_NK.logsumexp(1) - s_NK.mean(1) - math.log(len(queue_KD))).mean()


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


def sinkhorn(scores_NP: Tensor, epsilon: float, iterations: int = 3) -> Tensor:
    """Assignments of N images to P prototypes, rows summing to 1 (SwAV, arXiv 2006.09882, appendix A, algorithm 1)."""
    plan_PN = (scores_NP / epsilon).exp().T
    plan_PN = plan_PN / plan_PN.sum()
    for _ in range(iterations):
        plan_PN = plan_PN / plan_PN.sum(1, keepdim=True) / len(plan_PN)
        plan_PN = plan_PN / plan_PN.sum(0, keepdim=True) / plan_PN.shape[1]
    return (plan_PN * plan_PN.shape[1]).T


def crop_cross_entropy(x_VND: Tensor, weight_PD: Tensor, target_ANP: Tensor, temperature: float) -> Tensor:
    """mean over pairs (a, v ≠ a) and images of −Σ_p target_a[p]·log softmax_p(x_v·w/τ) (SwAV, eq. 6; DINO, eq. 3)."""
    log_p_VNP = (x_VND @ weight_PD.T / temperature).log_softmax(2)
    pairs = [(a, v) for a in range(len(target_ANP)) for v in range(len(x_VND)) if a != v]
    return torch.stack([-(target_ANP[a] * log_p_VNP[v]).sum(1).mean() for a, v in pairs]).mean()
