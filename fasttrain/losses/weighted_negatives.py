"""A contrast whose negatives weigh by how unlike the query's image they are: MEOW and AdaMEOW (arXiv 2212.13847).

    L = mean_i [ log Σ_j γ_ij exp s_ij − s⁺_i ],  s_ij = q_i·Q_j/τ,  s⁺_i = q_i·k_i/τ

MEOW: γ_ij is the number of clusterings in which image i and key j are in different clusters, 0 … G. AdaMEOW:
γ_ij = σ(MLP(k_i + Q_j)), divided by its mean over j, since a gate that closes would take L to −∞. Image i is told by
its key k_i, which is of the network that made the queue's keys. It takes no gradient, so none reaches q through γ. The
paper's ProtoNCE term is left out.

The N×K matrix is made in tiles of PAIRS similarities, forward and, once more, backward. What is kept of a tile between
them is its inputs and seven numbers for each query.

Shapes: q_ND, k_ND (N, D), queue_KD (K, D), rows L2-normalised. The queue may be of a narrower dtype, to which rows are
rounded for what is made with it. The queue takes no gradient, k through s⁺ alone. Scalars, fp32 (fp64 for fp64).

Feature transformation (losses/feature_transform.py) mixes keys: MEOW's γ of a mixture is the mixture of what both keys
have, AdaMEOW's network sees the mixture. An image is told by its key as it was before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fasttrain.losses.feature_transform import Transform
from fasttrain.losses.figures import figures_of_rows
from fasttrain.losses.queue import QueueRead, dot

PAIRS = 2**20  # of a tile: with a gate's 16 numbers for each, 64 MiB of fp32

LogWeights = Callable[[slice], Tensor]  # log γ (N, k) of all queries and a tile of keys


class WeightedRead(NamedTuple):
    """(N,) each: log Σ_j γ_ij exp s_ij and log Σ_j γ_ij, with gradient; log Σ_j γ_ij² and max_j s_ij, without."""

    lse_N: Tensor
    total_N: Tensor
    square_N: Tensor
    maximum_N: Tensor


def clustered_contrast(
    q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor, temperature: float, own_GN: Tensor, key_GK: Tensor, full: Tensor,
    mixed: Transform | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """MEOW's loss, scalar, and its figures. mixed: how the rows of queue_KD are mixtures of those that key_GK is of.

    own_GN, key_GK: int64, the clusters of each image and of each key at G granularities. full: 0-dim bool; where false,
    γ = G throughout. So it is for a query that shares all clusters with all keys, whose sum would be 0: it is
    decoupled InfoNCE and log G.
    """
    dtype = torch.promote_types(q_ND.dtype, torch.float32)
    alike_GN = (own_GN == key_GK.amin(1, keepdim=True)) & (own_GN == key_GK.amax(1, keepdim=True))
    weighed_N1 = (full & ~alike_GN.all(0))[:, None]

    def counted(key_Gk: Tensor) -> Tensor:
        gamma_Nk = torch.zeros((), dtype=dtype, device=q_ND.device)
        for own_N, key_k in zip(own_GN, key_Gk, strict=True):
            gamma_Nk = gamma_Nk + (own_N[:, None] != key_k)
        return gamma_Nk

    def log_weights(keys: slice) -> Tensor:
        gamma_Nk = counted(key_GK[:, keys])
        if mixed:
            gamma_Nk = mixed.negative * gamma_Nk + (1 - mixed.negative) * counted(key_GK[:, mixed.order_K[keys]])
        return gamma_Nk.where(weighed_N1, len(own_GN)).log()

    read = _read(q_ND, queue_KD, temperature, log_weights)
    loss = (read.lse_N - dot(q_ND, k_ND) / temperature).mean()
    return loss, _figures(q_ND, k_ND, queue_KD, temperature, read)


def gated_contrast(
    q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor, temperature: float, gate: Callable[[Tensor, Tensor], Tensor],
    own_ND: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """AdaMEOW's loss, scalar, and its figures.

    gate: of rows (N, D) and keys (k, D) the numbers (N, k) whose sigmoid is γ. Its parameters take a gradient, what it
    is given takes none. own_ND: the rows that tell an image: its key as it is, where k_ND is a transformed one.
    """
    image_ND = own_ND.detach().to(queue_KD.dtype)

    def log_weights(keys: slice) -> Tensor:
        return F.logsigmoid(gate(image_ND, queue_KD[keys].detach()))

    read = _read(q_ND, queue_KD, temperature, log_weights)
    lse_N = read.lse_N - read.total_N + math.log(len(queue_KD))
    loss = (lse_N - dot(q_ND, k_ND) / temperature).mean()
    return loss, _figures(q_ND, k_ND, queue_KD, temperature, read)


@torch.no_grad()
def _figures(q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor, temperature: float, read: WeightedRead) -> dict[str, Tensor]:
    """Of the rows as they are; the mean of γ, before it is divided by it; and (Σ_j γ)² / (K Σ_j γ²), the share of
    negatives that count, 1 where all do alike."""
    keys = len(queue_KD)
    return {
        **figures_of_rows(q_ND, k_ND, temperature * read.maximum_N, QueueRead(queue_KD, {})),
        "negative_weight": (read.total_N - math.log(keys)).exp().mean(),
        "negatives_counted": (2 * read.total_N - read.square_N - math.log(keys)).exp().mean(),
    }


def _read(q_ND: Tensor, queue_KD: Tensor, temperature: float, log_weights: LogWeights) -> WeightedRead:
    dtype = torch.promote_types(q_ND.dtype, torch.float32)
    queue_KD = queue_KD.detach()
    scaled_ND = q_ND.to(queue_KD.dtype).to(dtype) / temperature
    step = max(1, PAIRS // len(q_ND))
    tiles = [
        # nothing is drawn in a tile, so no state of a generator need be kept
        checkpoint(
            _tile, scaled_ND, queue_KD, slice(first, first + step), log_weights, use_reentrant=False,
            preserve_rng_state=False,
        )
        for first in range(0, len(queue_KD), step)
    ]  # fmt: skip
    *sums, maximum_TN = (torch.stack(parts) for parts in zip(*tiles, strict=True))
    lse_N, total_N, square_N = map(_log, sums)
    return WeightedRead(lse_N, total_N, square_N, maximum_TN.amax(0))


def _tile(
    scaled_ND: Tensor, queue_KD: Tensor, keys: slice, log_weights: LogWeights
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s_Nk = scaled_ND @ queue_KD[keys].to(scaled_ND.dtype).T
    log_Nk = log_weights(keys)
    square = _sum(2 * log_Nk.detach())
    return _sum(s_Nk + log_Nk), _sum(log_Nk), square, s_Nk.detach().amax(1)


def _sum(x_Nk: Tensor) -> Tensor:
    """max_j x_ij, without gradient, and Σ_j exp(x_ij − max), stacked: (2, N).

    A row of −inf alone has the sum 0 and no gradient; torch.logsumexp's would not be a number.
    """
    top_N = x_Nk.detach().amax(1)
    finite_N1 = top_N.masked_fill(top_N == -math.inf, 0)[:, None]
    return torch.stack([top_N, (x_Nk - finite_N1).exp().sum(1)])


def _log(parts_T2N: Tensor) -> Tensor:
    """The logarithm of the sum of T tiles, (N,), from what `_sum` made of each."""
    top_TN, sum_TN = parts_T2N[:, 0].detach(), parts_T2N[:, 1]
    top_N = top_TN.amax(0)
    return top_N + ((top_TN - top_N).exp() * sum_TN).sum(0).log()
