"""The losses in plain torch, each as short as its formula; the terms are held to them.

N batch, M ≥ N rows of the global batch, R rows of all views, D feature width, K queue length. All rows L2-normalised;
queries carry the gradient. Sources: InfoNCE as in MoCo (arXiv 1911.05722, eq. 1); the cross-similarity consistency and
uniform-similarity regularisers are this project's reading of XMoCo's abstract (arXiv 2206.04676), see
docs/objective.md. Others are named where they stand. Barlow Twins and VICReg: x_MD, y_MD the embeddings of two views,
rows not normalised.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SIGMA = 0.5  # temperature of DCLW's weights, as in its code
BASE_TEMPERATURE = 0.07  # of SupCon's factor τ/τ_base, as in its code
BATCH_NORM_EPS = 1e-5  # of Barlow Twins' batch norm without scale and shift
VARIANCE_EPS = 1e-4  # of VICReg's standard deviations, whose gradient would be infinite at 0


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


def directed_distillation(q_LND: Tensor, k_ND: Tensor, queue_KD: Tensor, temperature: float) -> Tensor:
    """½ Σ_l mean_i H(sg p_li, p_(l+1)i),  p_li = softmax([q_li·k_i, q_li·Q]/τ) (HiCLR, arXiv 2211.13466)."""
    positive_LN1 = (q_LND * k_ND).sum(2, keepdim=True)
    log_p_LNK1 = torch.log_softmax(torch.cat([positive_LN1, q_LND @ queue_KD.T], dim=2) / temperature, dim=2)
    return -(log_p_LNK1[:-1].exp().detach() * log_p_LNK1[1:]).sum(2).mean(1).sum() / 2


def mutual_consistency(
    q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor, temperature: float, key_temperature: float
) -> Tensor:
    """mean_i ½ [KL(P_i‖R_i) + KL(R_i‖P_i)],  P_i = softmax(k_i Qᵀ/τ_k),  R_i = softmax(q_i Qᵀ/τ) (arXiv 2010.02217)."""
    forward = queue_consistency(q_ND, k_ND, queue_KD, temperature, key_temperature)
    return (forward + queue_consistency(k_ND, q_ND, queue_KD, key_temperature, temperature)) / 2


def decoupled_weighted(q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor, temperature: float) -> Tensor:
    """mean_i [ log Σ_j exp s_ij − w_i s⁺_i ]: DCLW, whose hard positives weigh more (arXiv 2110.06848)."""
    positive_N = (q_ND * k_ND).sum(1) / temperature
    lse_N = torch.logsumexp(q_ND @ queue_KD.T / temperature, dim=1)
    return (lse_N - positive_weights(q_ND, k_ND) * positive_N).mean()


def positive_weights(q_ND: Tensor, k_ND: Tensor) -> Tensor:
    """w_i = 2 − N · softmax_i(q_i·k_i/σ), (N,), their mean 1, without gradient."""
    return (2 - len(q_ND) * ((q_ND * k_ND).sum(1) / SIGMA).softmax(0)).detach()


def weighted_negatives(q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor, temperature: float, weight_NK: Tensor) -> Tensor:
    """mean_i [ log Σ_j γ_ij exp s_ij − s⁺_i ]: MEOW (arXiv 2212.13847)."""
    s_NK = q_ND @ queue_KD.T / temperature
    return ((weight_NK * s_NK.exp()).sum(1).log() - (q_ND * k_ND).sum(1) / temperature).mean()


def cluster_weights(own_GN: Tensor, key_GK: Tensor) -> Tensor:
    """γ_ij = Σ_g [i and j are in different clusters], and G throughout where a row has 0 alone: (N, K)."""
    weight_NK = (own_GN[:, :, None] != key_GK[:, None]).sum(0)
    return weight_NK.where(weight_NK.any(1, keepdim=True), len(own_GN))


def gate_weights(logit_NK: Tensor) -> Tensor:
    """γ_ij = σ(x_ij) / mean_j σ(x_ij): AdaMEOW's, their mean 1 (arXiv 2212.13847)."""
    return logit_NK.sigmoid() / logit_NK.sigmoid().mean(1, keepdim=True)


def nt_xent(a_ND: Tensor, b_ND: Tensor, temperature: float) -> Tensor:
    """mean_i [ log Σ_{j≠i} exp s_ij − s_i,pos(i) ],  s = z zᵀ/τ over the 2N rows z of both views (arXiv 2002.05709,
    eq. 1). pos(i), the same image's row in the other view, stands in the sum."""
    s_RR = _among_others(torch.cat([a_ND, b_ND]), temperature)
    return (s_RR.logsumexp(1) - s_RR.diagonal(len(a_ND)).repeat(2)).mean()


def in_batch_decoupled(a_ND: Tensor, b_ND: Tensor, temperature: float, weighted: bool = False) -> Tensor:
    """NT-Xent without the positive in its sum: DCL; weighted: DCLW, its s_i,pos(i) times w_i (arXiv 2110.06848)."""
    s_RR = _among_others(torch.cat([a_ND, b_ND]), temperature)
    weight_N = positive_weights(a_ND, b_ND) if weighted else torch.ones_like(a_ND[:, 0])
    positive_N = weight_N * s_RR.diagonal(len(a_ND))
    pairs_RR = torch.eye(len(a_ND), dtype=torch.bool, device=a_ND.device).repeat(2, 2)
    return (s_RR.masked_fill(pairs_RR, -math.inf).logsumexp(1) - positive_N.repeat(2)).mean()


def mv_info_nce(z_VND: Tensor, temperature: float) -> Tensor:
    """mean_i [ log Σ_l Σ_{m≠l} Σ_j exp(z_li·z_mj/τ) − log Σ_l Σ_{m≠l} exp(z_li·z_mi/τ) ] over V views (arXiv
    2507.06979)."""
    s_VVNN = torch.einsum("lid,mjd->lmij", z_VND, z_VND) / temperature
    other_VV = ~torch.eye(len(z_VND), dtype=torch.bool, device=z_VND.device)
    s_PNN = s_VVNN[other_VV]  # of the ordered pairs of views
    positive_NP = s_PNN.diagonal(dim1=1, dim2=2).T
    return (s_PNN.transpose(0, 1).flatten(1).logsumexp(1) - positive_NP.logsumexp(1)).mean()


def mv_dhel(z_VND: Tensor, temperature: float) -> Tensor:
    """mean_i [ Σ_l log Σ_{j≠i} exp(z_li·z_lj/τ) − log Σ_{l<m} exp(z_li·z_mi/τ) ] over V views (arXiv 2507.06979)."""
    lse_VN = torch.stack([_among_others(z_ND, temperature).logsumexp(1) for z_ND in z_VND])
    first, second = torch.triu_indices(len(z_VND), len(z_VND), 1)
    positive_PN = (z_VND[first] * z_VND[second]).sum(2) / temperature
    return (lse_VN.sum(0) - positive_PN.logsumexp(0)).mean()


def attraction(z_ND: Tensor, positive_PND: Tensor, sharpness: float) -> Tensor:
    """mean_i Σ_p a_ip d_ip,  d_ip = ‖z_i − x_pi‖²,  a_i = softmax_p(t d_ip): CACR (arXiv 2105.03746)."""
    d_PN = (z_ND - positive_PND).square().sum(2)
    return ((sharpness * d_PN).softmax(0) * d_PN).sum(0).mean()


def repulsion(x_ND: Tensor, y_MD: Tensor, first: int, sharpness: float) -> Tensor:
    """mean_i −Σ_j b_ij d_ij,  d_ij = ‖x_i − y_j‖²,  b_i = softmax_j(−t d_ij), over all j but first+i: CACR (arXiv
    2105.03746)."""
    d_NM = 2 - 2 * x_ND @ y_MD.T
    own_NM = torch.arange(len(y_MD), device=d_NM.device) == torch.arange(len(x_ND), device=d_NM.device)[:, None] + first
    b_NM = (-sharpness * d_NM).masked_fill(own_NM, -math.inf).softmax(1)
    return -(b_NM * d_NM).sum(1).mean()


def queue_cacr(
    q_ND: Tensor, positive_PND: Tensor, queue_KD: Tensor, sharpness: float, negative_sharpness: float
) -> Tensor:
    """mean_i [ Σ_p a_ip d_ip − Σ_j b_ij d_ij ], weights without gradient: CACR over a queue (arXiv 2105.03746)."""
    d_PN = (q_ND - positive_PND).square().sum(2)
    d_NK = 2 - 2 * q_ND @ queue_KD.T
    a_PN, b_NK = (sharpness * d_PN).softmax(0).detach(), (-negative_sharpness * d_NK).softmax(1).detach()
    return (a_PN * d_PN).sum(0).mean() - (b_NK * d_NK).sum(1).mean()


def restraint(x_ND: Tensor, y_MD: Tensor, first: int) -> Tensor:
    """mean_i [ (σ_i⁺ − min(σ_i⁺, m_i)) + mean_j (max(σ_i⁺, m_i) − σ_ij) ],  σ_ij = x_i·y_j, σ_i⁺ that of row first+i,
    j all others, m_i = max_j σ_ij (MCLRec, arXiv 2304.07763)."""
    s_NM = x_ND @ y_MD.T
    own_NM = torch.arange(len(y_MD), device=s_NM.device) == torch.arange(len(x_ND), device=s_NM.device)[:, None] + first
    positive_N, nearest_N = s_NM.diagonal(first), s_NM.masked_fill(own_NM, -math.inf).amax(1)
    mean_N = s_NM.masked_fill(own_NM, 0).sum(1) / (len(y_MD) - 1)
    least_N, most_N = torch.minimum(positive_N, nearest_N), torch.maximum(positive_N, nearest_N)
    return (positive_N - least_N + most_N - mean_N).mean()


def community_contrast(a_ND: Tensor, b_ND: Tensor, r_NC: Tensor, temperature: float) -> Tensor:
    """mean_i −log softmax_c(a_i·C_c/τ) at c(i) = argmax r_i,  C_c the mean of the b_i with c(i) = c, over those c that
    have any (gCooL, arXiv 2110.14863)."""
    found_C, place_N = r_NC.argmax(1).unique(return_inverse=True)
    centroid_CD = torch.stack([b_ND[place_N == c].mean(0) for c in range(len(found_C))]).detach()
    return torch.nn.functional.cross_entropy(a_ND @ centroid_CD.T / temperature, place_N)


def sup_con(z_RD: Tensor, label_R: Tensor, temperature: float) -> Tensor:
    """τ/τ_base · mean_i [ log Σ_{j≠i} exp s_ij − mean_{p∈P(i)} s_ip ] over the rows whose P(i), the other rows of i's
    label, is not empty (arXiv 2004.11362, eq. 2, L_out)."""
    s_RR = _among_others(z_RD, temperature)
    same_RR = (label_R[:, None] == label_R).fill_diagonal_(False)
    count_R = same_RR.sum(1)
    positive_R = s_RR.where(same_RR, 0).sum(1) / count_R.clamp_min(1)
    loss_R = (s_RR.logsumexp(1) - positive_R).where(count_R > 0, 0)
    return temperature / BASE_TEMPERATURE * loss_R.sum() / (count_R > 0).sum().clamp_min(1)


def self_balanced(a_ND: Tensor, b_ND: Tensor, p_NC: Tensor, temperature: float) -> Tensor:
    """mean_i −Σ_j m_ij log softmax_{j≠i}(z_i·z_j/τ) / Σ_j m_ij over the 2N rows z of both views,  m_ij = p_i·p_j, 1 for
    i's own other view, 0 for i itself (BaCon, arXiv 2310.01376)."""
    own_RR = torch.eye(2 * len(a_ND), dtype=torch.bool, device=a_ND.device)
    m_RR = (p_NC @ p_NC.T).repeat(2, 2).masked_fill(own_RR.roll(len(a_ND), 0), 1).masked_fill(own_RR, 0)
    log_p_RR = _among_others(torch.cat([a_ND, b_ND]), temperature).log_softmax(1).masked_fill(own_RR, 0)
    return -((m_RR * log_p_RR).sum(1) / m_RR.sum(1)).mean()


def gated_contrast(
    z_ND: Tensor, k_ND: Tensor, gate_ND: Tensor, label_N: Tensor, paired_N: Tensor, temperature: float
) -> Tensor:
    """mean_{i, p: y_p = y'_i} [ log(exp s_ip + Σ_{n: y_n ≠ y_i, y'_i} exp s_in) − s_ip ],  s_ij = (z_i∘g_i)·(k_j∘g_i)/τ
    (Hydra, arXiv 2410.18200)."""
    s_NN = torch.einsum("id,id,jd,id->ij", z_ND, gate_ND, k_ND, gate_ND) / temperature
    positive_NN = label_N == paired_N[:, None]
    others_NN = s_NN.masked_fill(positive_NN | (label_N == label_N[:, None]), -math.inf)
    compared_NNJ = torch.cat([s_NN[:, :, None], others_NN[:, None].expand(-1, len(s_NN), -1)], 2)
    lost_NN = (compared_NNJ.logsumexp(2) - s_NN).where(positive_NN, 0)
    return lost_NN.sum() / positive_NN.sum().clamp_min(1)


def anchored_margins(
    a_ND: Tensor, b_ND: Tensor, anchor_a_ND: Tensor, anchor_b_ND: Tensor, margin: float, split: float
) -> tuple[Tensor, Tensor, Tensor]:
    """mean_i 2 [γm + t_ii − s_ii]₊ + max_j [(1 − γ)m + s_ij − t_ij]₊ of rows and columns; mean_i max_j [m + (t_ii −
    t_ij) − (s_ii − s_ij)]₊ of both; how many of the latter are 0. s = a bᵀ, t the anchor's, j ≠ i (arXiv 2404.18114).
    """
    s_NN, t_NN = a_ND @ b_ND.T, anchor_a_ND @ anchor_b_ND.T
    own_NN = torch.eye(len(s_NN), dtype=torch.bool, device=s_NN.device)
    s_N, t_N = s_NN.diagonal(), t_NN.diagonal()
    push_NN = ((1 - split) * margin + s_NN - t_NN).relu().masked_fill(own_NN, 0)
    absolute_N = 2 * (split * margin + t_N - s_N).relu() + push_NN.amax(1) + push_NN.amax(0)
    row_NN = (margin + (t_N[:, None] - t_NN) - (s_N[:, None] - s_NN)).relu().masked_fill(own_NN, 0)
    column_NN = (margin + (t_N - t_NN) - (s_N - s_NN)).relu().masked_fill(own_NN, 0)
    relative_2N = torch.stack([row_NN.amax(1), column_NN.amax(0)])
    return absolute_N.mean(), relative_2N.sum(0).mean(), (relative_2N == 0).to(s_NN.dtype).mean()


def separation(
    c_VND: Tensor, s_VNE: Tensor, background_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """align(c) + 2 unif(c), align(s of targets) + 2 unif(s'), mean ‖s of background‖²/(2τ), mean_i log mean_j k(c_i,
    c_j) k(s'_i, s'_j): SepCLR (arXiv 2402.11928). s' is s with background at 0; a mean over nothing is 0."""

    def distance(x: Tensor, y: Tensor) -> Tensor:
        return (x - y).square().sum(-1) / (2 * temperature)

    pairs = torch.triu_indices(len(background_N), len(background_N), 1, device=c_VND.device)
    kept_VNE = s_VNE * ~background_N[:, None]
    unif_c, unif_s = ((-distance(x[:, pairs[0]], x[:, pairs[1]])).exp().mean(1).log().mean() for x in (c_VND, kept_VNE))
    targets, backgrounds = (~background_N).sum().clamp_min(1), background_N.sum().clamp_min(1)
    aligned_s = distance(*kept_VNE).sum() / targets
    d_c_VNN, d_s_VNN = (distance(x[:, :, None], x[:, None]) for x in (c_VND, kept_VNE))
    length_VN = distance(s_VNE, torch.zeros_like(s_VNE)) * background_N
    joint = (-d_c_VNN - d_s_VNN).exp().mean(2).log().mean()
    return distance(*c_VND).mean() + 2 * unif_c, aligned_s + 2 * unif_s, length_VN.sum() / (2 * backgrounds), joint


def _among_others(z_RD: Tensor, temperature: float) -> Tensor:
    """s_ij = z_i·z_j/τ, −inf on the diagonal."""
    own_RR = torch.eye(len(z_RD), dtype=torch.bool, device=z_RD.device)
    return (z_RD @ z_RD.T / temperature).masked_fill(own_RR, -math.inf)


def queue_consistency(
    q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor, temperature: float, key_temperature: float
) -> Tensor:
    """mean_i KL( softmax(k_i Qᵀ/τ_k) ‖ softmax(q_i Qᵀ/τ) ): the key's similarities are the target of the query's."""
    log_p_NK = torch.log_softmax(k_ND @ queue_KD.T / key_temperature, dim=1)
    log_q_NK = torch.log_softmax(q_ND @ queue_KD.T / temperature, dim=1)
    return (log_p_NK.exp() * (log_p_NK - log_q_NK)).sum(1).mean()


def queue_uniformity(q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor, temperature: float) -> Tensor:
    """mean_i KL( U ‖ softmax_j(q_i·Q_j/τ) ) = mean_i [ logsumexp_j s_ij − mean_j s_ij − log K ]."""
    s_NK = q_ND @ queue_KD.T / temperature
    return (s_NK.logsumexp(1) - s_NK.mean(1) - math.log(len(queue_KD))).mean()


def neighbour_contrast(
    neighbour_ND: Tensor, p_ND: Tensor, temperature: float, decoupled: bool = False, weighted: bool = False
) -> Tensor:
    """mean_i −log softmax_j(n_i·p_j/τ) at j = i (NNCLR, arXiv 2104.14548); decoupled, and weighted: i itself left out
    of the denominator, and the positive times w_i (arXiv 2110.06848)."""
    s_NN = neighbour_ND @ p_ND.T / temperature
    weight_N = positive_weights(neighbour_ND, p_ND) if weighted else torch.ones_like(p_ND[:, 0])
    own_NN = torch.eye(len(s_NN), dtype=torch.bool, device=s_NN.device)
    others_NN = s_NN.masked_fill(own_NN, -math.inf) if decoupled or weighted else s_NN
    return (others_NN.logsumexp(1) - weight_N * s_NN.diagonal()).mean()


def batch_info_nce(q_ND: Tensor, k_MD: Tensor, first: int, temperature: float) -> Tensor:
    """Cross-entropy of softmax_j(q_i·k_j/τ) against query i's own key, row first+i (arXiv 2104.02057, eq. 1)."""
    own_N = torch.arange(len(q_ND), device=q_ND.device) + first
    return torch.nn.functional.cross_entropy(q_ND @ k_MD.detach().T / temperature, own_N)


def batch_consistency(q_ND: Tensor, k_ND: Tensor, within: bool = False) -> Tensor:
    """Σ_{i≠j} (A_ij − A_ji)² / (N(N−1)),  A = q kᵀ: a pair keeps its similarity when the two views are exchanged.

    within: Σ_{i≠j} (q_i·q_j − k_i·k_j)² / (N(N−1)): it has the same in both views. The cross-modal and the in-modal
    cyclic consistency of CyCLIP (arXiv 2205.14459).
    """
    a_NN = q_ND @ k_ND.T
    n = len(q_ND)
    difference_NN = q_ND @ q_ND.T - k_ND @ k_ND.T if within else a_NN - a_NN.T
    return difference_NN.fill_diagonal_(0).square().sum() / (n * (n - 1))


def compactness(q_ND: Tensor, k_ND: Tensor) -> Tensor:
    """c_i = q_i·(k_i − mean_{j≠i} k_j), (N,): POT's node compactness of one view (arXiv 2309.13944)."""
    others_ND = (k_ND.sum(0) - k_ND) / (len(k_ND) - 1)
    return (q_ND * (k_ND - others_ND)).sum(1)


def worst_compactness(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """mean_i log(1 + exp(−min_v c_vi)) of pairs (q, k) of views (arXiv 2309.13944)."""
    worst_N = torch.stack([compactness(q_ND, k_ND) for q_ND, k_ND in pairs]).amin(0)
    return torch.nn.functional.softplus(-worst_N).mean()


def batch_uniformity(q_ND: Tensor, k_MD: Tensor, first: int, temperature: float) -> Tensor:
    """mean_i KL( U ‖ softmax_{j≠i}(q_i·k_j/τ) ) over the M−1 other images' keys; query i's own key is row first+i."""
    s_NM = q_ND @ k_MD.T / temperature
    rows_N1 = torch.arange(len(q_ND), device=s_NM.device)[:, None]
    own_NM = torch.arange(len(k_MD), device=s_NM.device) == rows_N1 + first
    negatives = len(k_MD) - 1
    lse_N = s_NM.masked_fill(own_NM, -math.inf).logsumexp(1)
    mean_N = s_NM.masked_fill(own_NM, 0).sum(1) / negatives
    return (lse_N - mean_N - math.log(negatives)).mean()


def barlow(x_MD: Tensor, y_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_i (C_ii − 1)² and Σ_{i≠j} C_ij²,  C = x̂ᵀŷ/M, x̂ = (x − mean)/√(var + ε) (Barlow Twins, arXiv 2103.03230)."""
    x, y = ((z - z.mean(0)) / (z.var(0, correction=0) + BATCH_NORM_EPS).sqrt() for z in (x_MD, y_MD))
    c_DD = x.T @ y / len(x)
    on_DD = torch.eye(len(c_DD), dtype=torch.bool, device=c_DD.device)
    return (c_DD.diagonal() - 1).square().sum(), c_DD.masked_fill(on_DD, 0).square().sum()


def vicreg(x_MD: Tensor, y_MD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mean (x − y)²,  ½ Σ_views mean_d max(0, 1 − √(var_d + ε)),  Σ_views Σ_{a≠b} cov_ab² / D (arXiv 2105.04906)."""
    variance, covariance = x_MD.new_zeros(()), x_MD.new_zeros(())
    for z in (x_MD, y_MD):
        variance = variance + (1 - (z.var(0) + VARIANCE_EPS).sqrt()).clamp(min=0).mean() / 2
        covariance = covariance + z.T.cov().fill_diagonal_(0).square().sum() / z.shape[1]
    return (x_MD - y_MD).square().mean(), variance, covariance


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
