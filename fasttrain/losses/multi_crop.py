"""The loss of all views of an image against targets that the views of full size give.

    L = mean over pairs (a, v ≠ a) and images of −Σ_p target_a[p] · log softmax_p(x_v·w / τ)

Shapes: x_VND, embeddings of V views, those of full size first; target_ANP, rows that sum to 1, of the first A ≤ V
views; weight_PD, the directions that are compared with. Values are scalars, fp32 (fp64 for fp64).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def crop_cross_entropy(x_VND: Tensor, weight_PD: Tensor, target_ANP: Tensor, temperature: float) -> Tensor:
    """L, with gradients to x and the weights.

    A view's cross-entropies against several targets are one against their sum. One view comes after the other, and its
    logits are made again in backward: of the N×P matrices of fp32 that autograd would keep for every view, only one
    view's exist at a time. Under autocast the products are of its dtype, and nothing else is.
    """
    views, images, _ = x_VND.shape
    all_NP, sums = target_ANP.sum(0), []
    for view, x_ND in enumerate(x_VND):
        own = view < len(target_ANP)
        target_NP = torch.cat([target_ANP[:view], target_ANP[view + 1 :]]).sum(0) if own else all_NP
        arguments = x_ND, weight_PD, target_NP, len(target_ANP) - own, temperature
        sums.append(checkpoint(_cross_entropy, *arguments, use_reentrant=False, preserve_rng_state=False))
    return torch.stack(sums).sum() / (images * len(target_ANP) * (views - 1))


def _cross_entropy(x_ND: Tensor, weight_PD: Tensor, target_NP: Tensor, targets: int, temperature: float) -> Tensor:
    """Sum over the images; each row of the target sums to `targets`."""
    logits_NP = F.linear(x_ND / temperature, weight_PD)
    logits_NP = logits_NP.to(torch.promote_types(logits_NP.dtype, torch.float32))
    return targets * logits_NP.logsumexp(1).sum() - (target_NP * logits_NP).sum()


@torch.no_grad()
def cross_entropy_terms(loss: Tensor, target_ANP: Tensor) -> dict[str, Tensor]:
    """The loss in two parts, detached: the targets' mean entropy, and what is left, the mean KL divergence from them.

    An entropy near log P that stays there: all images have the same uniform target. Near 0 with little left: the same
    single direction.
    """
    entropy = torch.special.entr(target_ANP).sum(2).mean()
    return {"entropy": entropy, "kl": loss.detach() - entropy}
