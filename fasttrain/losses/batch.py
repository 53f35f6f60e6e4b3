"""Terms over the global batch: the rows of all ranks. Loss and gradients are those of one process that holds them all.

Shapes: q_ND, k_ND (N, D): this rank's rows, row i of k_ND the positive of row i of q_ND; k_MD (M, D): the keys of all
ranks. Rows L2-normalised. Keys take no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttrain.kernels.similarity import IMPLEMENTATIONS, readout
from fasttrain.losses import reference
from fasttrain.losses.queue import uniformity
from fasttrain.system.collectives import first_row, gather_rows, sum_over_ranks, world_size


def batch_consistency(q_ND: Tensor, k_ND: Tensor, within: bool = False, impl: str = "auto") -> Tensor:
    """Cross-similarity consistency over the pairs of a batch, Σ_{i≠j} (q_i·k_j − q_j·k_i)² / (M(M−1)); M ≥ 2.

    within: Σ_{i≠j} (q_i·q_j − k_i·k_j)² instead, of the similarities in each view.
    "reference" forms N×N, of one rank. All others form N×M, or, where the rows of all ranks are more numbers than
    three D×D sums in fp64, add up these. Scalar, fp32 (fp64 for fp64).
    """
    if impl == "reference":
        return reference.batch_consistency(q_ND, k_ND, within)
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"unknown impl {impl!r}; choose from: {', '.join(IMPLEMENTATIONS)}")
    count, width = world_size() * len(q_ND), q_ND.shape[1]
    if count <= 3 * width:
        return _pair_consistency(q_ND, k_ND.detach(), within)
    sums = Gram(*sum_over_ranks(torch.stack(gram(q_ND, k_ND))))
    accumulate = torch.promote_types(q_ND.dtype, torch.float32)
    return gram_consistency(sums, count, within).to(accumulate)


def _pair_consistency(q_ND: Tensor, k_ND: Tensor, within: bool) -> Tensor:
    """The same from the differences of this rank's rows with all: the others' part in each row's gradient is equal to
    its own part, as a difference and its sign's other are of the same pair."""
    q_MD, k_MD = gather_rows(q_ND.detach()), gather_rows(k_ND)
    left_NM, right_NM = (q_ND @ q_MD.T, k_ND @ k_MD.T) if within else (q_ND @ k_MD.T, k_ND @ q_MD.T)
    part = (left_NM - right_NM).square().sum() / (len(q_MD) * (len(q_MD) - 1))  # an image's own are equal
    return sum_over_ranks(2 * part - part.detach())


def batch_uniformity(q_ND: Tensor, k_MD: Tensor, temperature: float, impl: str = "auto") -> Tensor:
    """Uniformity of a query's similarities to the other images' keys (M ≥ 2); its own key is left out.

    k_MD may be of a narrower dtype than the queries, which are then rounded to it for the products with it.
    """
    first = first_row(len(q_ND))
    if impl == "reference":
        return reference.batch_uniformity(q_ND, k_MD, first, temperature)
    lse_N, _ = readout(q_ND.to(k_MD.dtype), k_MD, temperature, own=first, impl=impl)
    k_MD = k_MD.detach().to(lse_N.dtype)
    mean_ND = (k_MD.sum(0) - k_MD[first : first + len(q_ND)]) / (len(k_MD) - 1)
    return uniformity(lse_N, q_ND, mean_ND, len(k_MD) - 1, temperature)


def batch_info_nce(q_ND: Tensor, k_MD: Tensor, temperature: float, impl: str = "auto") -> Tensor:
    """InfoNCE whose negatives are the other images' keys: mean_i [ logsumexp_j s_ij − s_i,own ],  s_ij = q_i·k_j/τ.

    One direction of MoCo v3 (arXiv 2104.02057, eq. 1), without its factor 2τ. Scalar, fp32 (fp64 for fp64).
    """
    first = first_row(len(q_ND))
    if impl == "reference":
        return reference.batch_info_nce(q_ND, k_MD, first, temperature)
    lse_N, _ = readout(q_ND, k_MD, temperature, impl=impl)
    own_ND = k_MD.detach()[first : first + len(q_ND)]
    return (lse_N - (q_ND * own_ND).sum(1) / temperature).mean()


def worst_compactness(pairs: Sequence[tuple[Tensor, Tensor]], impl: str = "auto") -> Tensor:
    """mean_i log(1 + exp(−c_i)), c_i the least q_i·(k_i − mean_{j≠i} k_j) over an image's pairs of views; M ≥ 2.

    A reading for images of POT's node compactness (arXiv 2309.13944): how much nearer a view is to its image's other
    view than to the mean of other images, of its worst pair. There the least is a bound over all changes of a graph's
    edges; here it is that of the views that were drawn. pairs: q_ND, k_ND of each direction. Scalar, fp32 (fp64 for
    fp64).
    """
    if impl == "reference":
        return reference.worst_compactness([(q_ND, k_ND.detach()) for q_ND, k_ND in pairs])
    others = world_size() * len(pairs[0][0]) - 1
    sum_PD = sum_over_ranks(torch.stack([k_ND.detach().sum(0) for _, k_ND in pairs]))
    # q·(k − (sum − k)/others), without the mean of the others of each row
    c_PN = torch.stack(
        [
            (q_ND * (k_ND.detach() * (1 + 1 / others) - sum_D / others)).sum(1)
            for (q_ND, k_ND), sum_D in zip(pairs, sum_PD, strict=True)
        ]
    )
    return F.softplus(-c_PN.amin(0)).mean()


class Gram(NamedTuple):
    """The three D×D sums over rows that batch consistency needs; those of all ranks may be added up. In fp64."""

    queries_DD: Tensor  # qᵀq
    keys_DD: Tensor  # kᵀk
    mixed_DD: Tensor  # kᵀq


def gram(q_ND: Tensor, k_ND: Tensor) -> Gram:
    q, k = q_ND.double(), k_ND.detach().double()
    return Gram(q.T @ q, k.T @ k, k.T @ q)


def gram_consistency(sums: Gram, count: int, within: bool = False) -> Tensor:
    """Σ_{i≠j} (A_ij − A_ji)² = 2 (Σ_ab G_q[a,b] G_k[a,b] − Σ_ab M[a,b] M[b,a]), over count·(count − 1).

    within: Σ_{i≠j} (q_i·q_j − k_i·k_j)² = Σ_ab (G_q[a,b]² + G_k[a,b]² − 2 M[a,b]²); of rows of norm 1, that is. The
    differences cancel when both similarities are nearly equal, hence fp64.
    """
    queries, keys, mixed = sums
    if within:
        square = queries.square().sum() + keys.square().sum() - 2 * mixed.square().sum()
    else:
        square = 2 * ((queries * keys).sum() - (mixed * mixed.T).sum())
    return square / (count * (count - 1))
