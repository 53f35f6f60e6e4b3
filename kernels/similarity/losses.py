"""The losses on the readout: what is left to do for each is O(N·D), and its gradient follows from (lse, O).

Equations and shapes: kernels/similarity/reference.py. Scalars are fp32 (fp64 for fp64), whatever the rows' dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttrain.kernels.similarity.readout import readout


@dataclass(frozen=True)
class QueueTerms:
    """The terms of one pass over the queue, scalars; None where not asked for."""

    contrast: Tensor
    consistency: Tensor | None = None
    uniformity: Tensor | None = None


def queue_terms(
    q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor, temperature: float, *, consistency_temperature: float | None,
    uniformity_temperature: float | None, decoupled: bool, impl: str,
) -> QueueTerms:  # fmt: skip
    """All terms over the queue, which is read once: the sides that they need are stacked, equal ones shared.

    Rows are rounded to the queue's dtype for the products with it, and for nothing else.
    """
    sides = [("q", temperature)]
    if consistency_temperature is not None:
        sides += [("q", consistency_temperature), ("k", consistency_temperature)]
    if uniformity_temperature is not None:
        sides += [("q", uniformity_temperature)]
    sides = list(dict.fromkeys(sides))
    rows = {"q": q_ND.to(queue_KD.dtype), "k": k_ND.detach().to(queue_KD.dtype)}
    lse, out = _stacked(sides, rows, queue_KD, impl)

    contrast = lse["q", temperature] - _dot(q_ND, k_ND) / temperature
    if not decoupled:  # log(exp s⁺ + exp lse) − s⁺, which keeps its digits where the positive outweighs the queue
        contrast = -F.logsigmoid(-contrast)
    consistency = uniformity = None
    if (t := consistency_temperature) is not None:
        pull_N = _dot(k_ND - q_ND, out["k", t]) / t
        consistency = (pull_N - lse["k", t] + lse["q", t]).mean()
    if (t := uniformity_temperature) is not None:
        mean_D = queue_KD.mean(0, dtype=lse["q", t].dtype)
        uniformity = _uniformity(lse["q", t], q_ND, mean_D, len(queue_KD), t)
    return QueueTerms(contrast.mean(), consistency, uniformity)


def _stacked(
    sides: list[tuple[str, float]], rows: dict[str, Tensor], queue_KD: Tensor, impl: str
) -> tuple[dict[tuple[str, float], Tensor], dict[tuple[str, float], Tensor]]:
    """The readout of each (rows' name, temperature), by one call."""
    count = len(rows["q"])
    x_RD = torch.cat([rows[name] for name, _ in sides]) if len(sides) > 1 else rows[sides[0][0]]
    temperature: float | Tensor = sides[0][1]
    if len({temperature for _, temperature in sides}) > 1:
        dtype = torch.promote_types(x_RD.dtype, torch.float32)
        temperature = torch.cat([torch.full((count,), t, dtype=dtype, device=x_RD.device) for _, t in sides])
    lse_R, out_RD = readout(x_RD, queue_KD, temperature, impl=impl)
    # The keys' gradient would end at a detached tensor; cutting it here leaves their rows out of the backward.
    cut = {side: slice(i * count, (i + 1) * count) for i, side in enumerate(sides)}
    lse = {side: lse_R[at] if side[0] == "q" else lse_R[at].detach() for side, at in cut.items()}
    return lse, {side: out_RD[at].detach() for side, at in cut.items()}


def _dot(a_ND: Tensor, b_ND: Tensor) -> Tensor:
    """Row by row, at least in fp32."""
    accumulate = torch.promote_types(a_ND.dtype, torch.float32)
    return (a_ND.to(accumulate) * b_ND.to(accumulate)).sum(1)


def _uniformity(lse_N: Tensor, q_ND: Tensor, mean: Tensor, negatives: int, temperature: float) -> Tensor:
    """mean_i [ lse_i − q_i·mean/τ − log M ], the mean of the M negatives being (D,) or (N, D)."""
    return (lse_N - (q_ND.to(mean.dtype) * mean).sum(1) / temperature - math.log(negatives)).mean()


def batch_uniformity(q_ND: Tensor, k_MD: Tensor, first: int, temperature: float, impl: str) -> Tensor:
    lse_N, _ = readout(q_ND.to(k_MD.dtype), k_MD, temperature, own=first, impl=impl)
    k_MD = k_MD.detach().to(lse_N.dtype)
    mean_ND = (k_MD.sum(0) - k_MD[first : first + len(q_ND)]) / (len(k_MD) - 1)
    return _uniformity(lse_N, q_ND, mean_ND, len(k_MD) - 1, temperature)


class Gram(NamedTuple):
    """The three D×D sums over rows that batch consistency needs; those of all ranks may be added up. In fp64."""

    queries_DD: Tensor  # qᵀq
    keys_DD: Tensor  # kᵀk
    mixed_DD: Tensor  # kᵀq


def gram(q_ND: Tensor, k_ND: Tensor) -> Gram:
    q, k = q_ND.double(), k_ND.detach().double()
    return Gram(q.T @ q, k.T @ k, k.T @ q)


def gram_consistency(sums: Gram, count: int) -> Tensor:
    """Σ_{i≠j} (A_ij − A_ji)² = 2 (Σ_ab G_q[a,b] G_k[a,b] − Σ_ab M[a,b] M[b,a]), over count·(count − 1).

    The difference cancels when A is nearly symmetric, hence fp64.
    """
    square = (sums.queries_DD * sums.keys_DD).sum() - (sums.mixed_DD * sums.mixed_DD.T).sum()
    return 2 * square / (count * (count - 1))
