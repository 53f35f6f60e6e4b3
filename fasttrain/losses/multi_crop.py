"""The loss of all views of an image against targets that the views of full size give.

    L = mean over pairs (a, v ≠ a) and images of −Σ_p target_a[p] · log softmax_p(x_v·w / τ)

Shapes: x_VND, embeddings of V views, those of full size first; target_ANP, rows that sum to 1, of the first A ≤ V
views; weight_PD, the directions that are compared with. Values are scalars, fp32 (fp64 for fp64).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def crop_cross_entropy(x_VND: Tensor, weight_PD: Tensor, target_ANP: Tensor, temperature: float) -> Tensor:
    """L, with gradients to x and the weights.

    A view's cross-entropies against several targets are one against their sum; A views at a time are compared, which
    bounds what is there for a moment. Under autocast the products are of its dtype, and nothing else is.
    """
    count = len(target_ANP)
    all_1NP = target_ANP.sum(0, keepdim=True)
    parts = [_cross_entropy(x_VND[:count], weight_PD, all_1NP - target_ANP, count - 1, temperature)]
    if len(x_VND) > count:
        parts += [_cross_entropy(x, weight_PD, all_1NP, count, temperature) for x in x_VND[count:].split(count)]
    return torch.stack(parts).sum() / (x_VND.shape[1] * count * (len(x_VND) - 1))


def _cross_entropy(x_CND: Tensor, weight_PD: Tensor, target_CNP: Tensor, total: int, temperature: float) -> Tensor:
    """Sum over views and images; each row of the target sums to `total`."""
    logits_CNP = F.linear(x_CND / temperature, weight_PD)
    logits_CNP = logits_CNP.to(torch.promote_types(logits_CNP.dtype, torch.float32))
    return total * logits_CNP.logsumexp(2).sum() - (target_CNP * logits_CNP).sum()


@torch.no_grad()
def cross_entropy_terms(loss: Tensor, target_ANP: Tensor) -> dict[str, Tensor]:
    """The loss in two parts, detached: the targets' mean entropy, and what is left, the mean KL divergence from them.

    An entropy near log P that stays there: all images have the same uniform target. Near 0 with little left: the same
    single direction.
    """
    entropy = torch.special.entr(target_ANP).sum(2).mean()
    return {"entropy": entropy, "kl": loss.detach() - entropy}
