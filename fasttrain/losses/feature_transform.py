"""Feature transformation (Zhu et al., arXiv 2108.02982): positives that are moved apart, negatives that are mixed.

    q' = λq + (1 − λ)k,  k' = λk + (1 − λ)q,  λ ≤ 1 + Beta(2, 2): the contrast has to win against harder positives
    Q' = μQ + (1 − μ)Q_π,  μ = Beta(1.6, 1.6), π a permutation: and against negatives that are new at every step

Nothing is normalised again; k takes no gradient, but k' has q in it, which does. λ and μ are drawn for each
micro-batch, for all rows and ranks alike. The queue itself keeps the keys as they are.

Shapes: q_ND, k_ND (N, D), queue_KD (K, D), rows L2-normalised.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasttrain.losses.figures import queue_figures
from fasttrain.losses.queue import QueueTerm, Side, dot, read_queue
from fasttrain.system.collectives import common_generator, sent, sum_over_ranks, world_size

POSITIVE_ALPHA, NEGATIVE_ALPHA = 2.0, 1.6  # of the Beta distributions, as in the authors' code


class Transform(NamedTuple):
    """What a micro-batch draws. positive: λ, a number or a scalar on the device. negative: μ. order_K: int64, on the
    device."""

    positive: float | Tensor
    negative: float
    order_K: Tensor


def draw(keys: int, device: torch.device) -> Transform:
    """Of a queue of so many keys, from the generator that all ranks draw from alike."""
    seed = int(torch.randint(2**62, (), generator=common_generator))
    random = np.random.default_rng(seed)
    extrapolated = 1 + random.beta(POSITIVE_ALPHA, POSITIVE_ALPHA)
    mixed = random.beta(NEGATIVE_ALPHA, NEGATIVE_ALPHA)
    return Transform(extrapolated, mixed, sent(torch.randperm(keys, generator=common_generator), device))


@torch.no_grad()
def drawn_for(
    contrast: QueueTerm, q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor, is_full: Tensor, impl: str = "auto"
) -> tuple[Transform, dict[str, Tensor]]:
    """What a micro-batch draws for its rows, and figures of them before they are transformed, as of any contrast over a
    queue: one more pass over it. is_full: scalar, whether all of the queue is keys; until then λ is 1."""
    drawn = draw(len(queue_KD), queue_KD.device)
    read = read_queue([contrast], q_ND, k_ND, queue_KD, impl)
    positive = bounded(drawn.positive, q_ND, k_ND, read[Side("q", contrast.temperature)].out_ND)
    positive = positive.where(is_full, torch.ones_like(positive))
    figures = queue_figures(contrast, q_ND, k_ND, read) | {"extrapolation": positive}
    return drawn._replace(positive=positive), figures


@torch.no_grad()
def bounded(weight: float | Tensor, q_ND: Tensor, k_ND: Tensor, out_ND: Tensor) -> Tensor:
    """The least of λ and 1 + (s⁺ − s⁻) / 2(1 − s⁺): scalar, the same on all ranks. s⁺ is the mean similarity of queries
    to their keys, s⁻ to the negatives as the contrast weighs them, whose average for each query is out_ND.

    q' is drawn to its own key by A = λ² + (1 − λ)², but away from negatives by λ alone. Where a query lies among rows
    that are nearly alike, with c = (s⁺ − s⁻) / (1 − s⁻) what its image's views have in common beyond them, its
    difference from them grows by Ac − (A − λ). That is c for λ = 1, and for a large λ below 0 unless c is large: such
    rows would stay alike for good. At the bound it is c/2.
    """
    rows = len(q_ND) * world_size()
    positive, negative = sum_over_ranks(torch.stack([dot(q_ND, k_ND).sum(), dot(q_ND, out_ND).sum()])) / rows
    return (1 + (positive - negative).relu() / (2 * (1 - positive)).clamp(min=1e-6)).clamp(max=weight)


def transformed_pair(q_ND: Tensor, k_ND: Tensor, weight: float | Tensor) -> tuple[Tensor, Tensor]:
    """q' and k'. Their product is s + 2λ(1 − λ)(1 − s), s = q·k."""
    return weight * q_ND + (1 - weight) * k_ND, weight * k_ND + (1 - weight) * q_ND


def mixed_queue(queue_KD: Tensor, weight: float, order_K: Tensor) -> Tensor:
    """Q', in the queue's dtype."""
    return weight * queue_KD + (1 - weight) * queue_KD[order_K]


def transformed(q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor, drawn: Transform) -> tuple[Tensor, Tensor, Tensor]:
    """q', k' and Q'."""
    return (
        *transformed_pair(q_ND, k_ND.detach(), drawn.positive), mixed_queue(queue_KD, drawn.negative, drawn.order_K)
    )  # fmt: skip


def transformed_contrast(
    contrast: QueueTerm, q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor, drawn: Transform, impl: str = "auto"
) -> tuple[Tensor, dict[str, Tensor]]:
    """The contrast of transformed rows, scalar, and figures without gradient: those of `scores`, and the mean of
    exp(s/τ) over a query's negatives, as a logarithm."""
    hard_ND, key_ND, new_KD = transformed(q_ND, k_ND, queue_KD, drawn)
    read = read_queue([contrast], hard_ND, key_ND, new_KD, impl)
    figures = scores(hard_ND, key_ND, new_KD)
    lse_N = read[Side("q", contrast.temperature)].lse_N.detach()
    figures["score_negative_log_exp"] = (lse_N - math.log(len(new_KD))).mean()
    return contrast.value(hard_ND, key_ND, read), figures


@torch.no_grad()
def scores(hard_ND: Tensor, key_ND: Tensor, new_KD: Tensor) -> dict[str, Tensor]:
    """What a contrast of q', k' and Q' sees: the mean of positives, the mean and the variance of a query's negatives.
    The authors hold a low mean of positives and a high variance of negatives to be healthy."""
    wide_KD = new_KD.to(torch.promote_types(new_KD.dtype, torch.float32))
    mean_N = dot(hard_ND, wide_KD.mean(0))
    square_N = dot(hard_ND @ (wide_KD.T @ wide_KD / len(wide_KD)), hard_ND)
    return {
        "score_positive": dot(hard_ND, key_ND).mean(),
        "score_negative": mean_N.mean(),
        "score_negative_variance": (square_N - mean_N.square()).mean(),
    }
