"""Codes of what all images have in common and of what only targets have, kept apart (SepCLR; Louiset et al., arXiv
2402.11928).

    common     = align(c) + 2 unif(c)
    salient    = align(s of targets) + 2 unif(s')
    background = mean over background images of ‖s_i‖²/(2τ)
    joint      = mean_i log mean_j k(c_i, c_j) k(s'_i, s'_j)
    align(x) = mean_i ‖x_i − y_i‖²/(2τ),  unif(x) = log mean_{i<j} k(x_i, x_j),  k(x, y) = exp(−‖x − y‖²/(2τ))

c and s are an image's two codes, y its other view's, and s' is s with the rows of background images at 0. A low `joint`
is a high entropy of both together: neither then tells the other. What is not of two views is the mean over both.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fasttrain.losses import reference
from fasttrain.losses.multi_view import gather_views
from fasttrain.system.collectives import first_row, gather_rows, sum_over_ranks, world_size


class Separation(NamedTuple):
    """Scalars, fp32 (fp64 for fp64); their means over the ranks are those of one process that holds all rows."""

    common: Tensor
    salient: Tensor
    background: Tensor
    joint: Tensor


def separation(
    c_VND: Tensor, s_VNE: Tensor, background_N: Tensor, temperature: float, impl: str = "auto"
) -> Separation:
    """The four terms over the images of all ranks, at least 2. All rows take gradient.

    c_VND (2, N, D), s_VNE (2, N, E): this rank's rows of two views, those of c L2-normalised and those of s not;
    background_N: bool; the same N on every rank. A mean over no image is 0. Forms N×M, M rows being of all ranks: a
    pair's two kernels meet in a product. impl: "reference" is plain torch as the formulas read, of one rank.
    """
    if impl == "reference":
        return Separation(*reference.separation(c_VND, s_VNE, background_N, temperature))
    kept_VNE = s_VNE.masked_fill(background_N[:, None], 0)
    c_VMD, kept_VME = gather_views(torch.cat([c_VND, kept_VNE], 2)).tensor_split([c_VND.shape[2]], 2)
    logs = _log_kernel(c_VND, c_VMD, temperature), _log_kernel(kept_VNE, kept_VME, temperature)
    count, first = c_VMD.shape[1], first_row(c_VND.shape[1])
    every_M = torch.arange(count, device=c_VND.device)
    own_NM = every_M == every_M[: c_VND.shape[1], None] + first
    lse_PN = torch.cat([log_VNM.masked_fill(own_NM, -math.inf).logsumexp(2) for log_VNM in logs])
    # every rank sums up the rows of all, so that distant ones do not underflow
    unif_P = gather_rows(lse_PN.T).logsumexp(0) - math.log(count * (count - 1))
    unif_c, unif_s = unif_P.chunk(2)
    aligned_c, aligned_s = ((x_VND[0] - x_VND[1]).square().sum(1) / (2 * temperature) for x_VND in (c_VND, s_VNE))
    length_N = s_VNE.square().sum(2).mean(0) / (2 * temperature)
    backgrounds = sum_over_ranks(background_N.sum())
    return Separation(
        common=aligned_c.mean() + 2 * unif_c.mean(),
        salient=_mean_of(aligned_s, ~background_N, count - backgrounds) + 2 * unif_s.mean(),
        background=_mean_of(length_N, background_N, backgrounds),
        # a row is at no distance from itself, which differences of long rows' squares are not
        joint=(logs[0] + logs[1]).masked_fill(own_NM, 0).logsumexp(2).mean() - math.log(count),
    )


def _log_kernel(x_VND: Tensor, y_VMD: Tensor, temperature: float) -> Tensor:
    """−‖x_i − y_j‖²/(2τ), (V, N, M)."""
    square_VN, square_VM = x_VND.square().sum(2), y_VMD.square().sum(2)
    return (2 * x_VND @ y_VMD.mT - square_VN[:, :, None] - square_VM[:, None]) / (2 * temperature)


def _mean_of(value_N: Tensor, counted_N: Tensor, count: Tensor) -> Tensor:
    """This rank's part of the mean over the rows of all ranks that are counted, of which there are `count`."""
    return world_size() * value_N.where(counted_N, 0).sum() / count.clamp_min(1)
