"""Margins beyond what a frozen encoder separates already (DBL; Diao et al., arXiv 2404.18114).

    absolute: 2 [γm + sᵃ_ii − s_ii]₊ + max_{j≠i} [(1 − γ)m + s_ij − sᵃ_ij]₊, the second of rows and of columns
    relative: max_{j≠i} [m + (sᵃ_ii − sᵃ_ij) − (s_ii − s_ij)]₊, of rows and of columns

s_ij is the cosine of image i's first view with image j's second one, sᵃ_ij the frozen encoder's of the same two views.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttrain.losses import reference
from fasttrain.losses.multi_view import gather_views
from fasttrain.system.collectives import own_rows


class Margins(NamedTuple):
    """absolute, relative: the losses. met: the share of rows and columns whose relative margin is met, detached."""

    absolute: Tensor
    relative: Tensor
    met: Tensor


def anchored_margins(z_2ND: Tensor, anchor_2ND: Tensor, margin: float, split: float, impl: str = "auto") -> Margins:
    """Both losses of an image, rows and columns added up, and their means over the images of all ranks.

    z_2ND, anchor_2ND (2, N, D): this rank's rows of two views, by the encoder and by the frozen one, L2-normalised, the
    same N on every rank; D may differ. All rows of z take gradient, the anchor's none. margin: m. split: γ, the part of
    m that is the positive's. The authors sum over a batch instead, so that a learning rate would depend on its size.
    Forms 2·N×M, M rows being of all ranks. The mean over the ranks is that of one process that holds all rows. impl:
    "reference" is plain torch as the formulas read, of one rank. Scalars, fp32 (fp64 for fp64).
    """
    anchor_2ND = anchor_2ND.detach()
    if impl == "reference":
        return Margins(*reference.anchored_margins(z_2ND[0], z_2ND[1], anchor_2ND[0], anchor_2ND[1], margin, split))
    # similarities count by what they have gained alone, and a column is a row of the other view
    gain_2NM = _with_the_other_view(z_2ND) - _with_the_other_view(anchor_2ND)
    own = own_rows(gain_2NM.shape[1])
    positive_2N = gain_2NM[:, :, own].diagonal(dim1=1, dim2=2)
    every_M = torch.arange(gain_2NM.shape[2], device=gain_2NM.device)
    most_2N = gain_2NM.masked_fill(every_M == every_M[own, None], -torch.inf).amax(2)
    absolute_2N = F.relu(split * margin - positive_2N) + F.relu((1 - split) * margin + most_2N)
    relative_2N = F.relu(margin + most_2N - positive_2N)
    met_2N = relative_2N.detach() == 0
    return Margins(absolute_2N.sum(0).mean(), relative_2N.sum(0).mean(), met_2N.to(gain_2NM.dtype).mean())


def _with_the_other_view(z_2ND: Tensor) -> Tensor:
    """Similarities of each view's rows with the rows of all ranks in the other view: (2, N, M)."""
    return z_2ND @ gather_views(z_2ND).flip(0).mT
