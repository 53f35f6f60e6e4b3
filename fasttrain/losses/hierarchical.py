"""Queries of views that grow stronger, each led by the one before it (HiCLR; Zhang et al., arXiv 2211.13466).

    L = InfoNCE(q_1, k, Q) + ½ Σ_l H(sg p(q_l), p(q_{l+1})),  p(q) = softmax([q·k, q·Q_1, …]/τ)

H is the cross-entropy, and the gradient goes to the stronger view alone: what a weak view tells of an image is the
target of a strong one's, and never the reverse.

Shapes: q_LND (L, N, D): the queries of L ≥ 2 views, the weakest first; k_ND (N, D): their key; queue_KD (K, D); rows
L2-normalised. Key and queue take no gradient. Scalars, fp32 (fp64 for fp64).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttrain.losses import reference
from fasttrain.losses.figures import queue_figures
from fasttrain.losses.queue import InfoNCE, QueueRead, Read, Side, dot, read_queue


def hierarchical(
    q_LND: Tensor, k_ND: Tensor, queue_KD: Tensor, temperature: float, impl: str = "auto"
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """InfoNCE of the weakest query, half the sum of the cross-entropies, and the figures of the weakest query; all by
    one pass over the queue.

    With p0 = σ(s⁺ − lse) of the weaker query, p0 k + (1 − p0) O is its softmax average of key and queue, so the
    cross-entropy is logaddexp(s⁺, lse) − q·(p0 k + (1 − p0) O)/τ, s⁺ and lse of the stronger one.
    """
    contrast, levels = InfoNCE(temperature), len(q_LND)
    if impl == "reference":
        info_nce = reference.info_nce(q_LND[0], k_ND, queue_KD, temperature)
        led = reference.directed_distillation(q_LND, k_ND, queue_KD, temperature)
        return info_nce, led, {}
    read = read_queue([contrast], q_LND.flatten(0, 1), k_ND, queue_KD, impl)  # whose sides have no keys
    lse_LN, out_LND, maximum_LN = (part.unflatten(0, (levels, -1)) for part in read[Side("q", temperature)])
    of_first = Read(lse_LN[0], out_LND[0], maximum_LN[0])
    first = QueueRead(queue_KD, {Side("q", temperature): of_first})
    k_ND = k_ND.detach()
    positive_LN = torch.stack([dot(q_ND, k_ND) for q_ND in q_LND]) / temperature
    p0_LN1 = (positive_LN - lse_LN).sigmoid()[..., None].detach()
    target_LND = p0_LN1 * k_ND + (1 - p0_LN1) * out_LND
    led_LN = [
        torch.logaddexp(positive_LN[strong], lse_LN[strong]) - dot(q_LND[strong], target_LND[strong - 1]) / temperature
        for strong in range(1, levels)
    ]
    figures = queue_figures(contrast, q_LND[0], k_ND, first)
    info_nce = -F.logsigmoid(positive_LN[0] - lse_LN[0]).mean()
    return info_nce, torch.stack(led_LN).mean(1).sum() / 2, figures
