"""Augmentation that is learnt in feature space (MCLRec; Qin et al., arXiv 2304.07763), on top of NT-Xent.

    L_2 = con(z_a, z_b) + con(a, z_b) + con(b, z_a),  z = w(a): an augmenter w makes another view of a feature
    R = mean_i [ relu(σ_i⁺ − m_i) + max(σ_i⁺, m_i) − mean_j σ_ij⁻ ],  m_i = max_j σ_ij⁻

con is NT-Xent. R, of the similarities σ of z_a to z_b, keeps what is learnt from being trivial: it draws positives to
the nearest negative, and negatives to what is nearest. Augmenter and encoder learn from it differently: the one by
L_2 + γR, the other by its own loss + βL_2 + γR.

Shapes: a_ND, b_ND, z_ND (N, D): this rank's rows of two views, L2-normalised, the same N on every rank, at least 2
images over all. The mean of a loss over the ranks is that of one process that holds all rows. Scalars, fp32 (fp64 for
fp64).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fasttrain.losses import reference
from fasttrain.losses.contrast import nt_xent
from fasttrain.system.collectives import first_row, gather_rows


def slowed(x: Tensor, part: float) -> Tensor:
    """x itself, of whose gradient a part goes on."""
    return part * x + (1 - part) * x.detach()


def augmented_contrast(a_ND: Tensor, b_ND: Tensor, za_ND: Tensor, zb_ND: Tensor, temperature: float) -> Tensor:
    """L_2 of rows and what the augmenter made of them."""
    pairs = (za_ND, zb_ND), (a_ND, zb_ND), (b_ND, za_ND)
    return torch.stack([nt_xent(x_ND, y_ND, temperature) for x_ND, y_ND in pairs]).sum()


def restraint(za_ND: Tensor, zb_ND: Tensor) -> Tensor:
    """R of both directions, their mean; N×M similarities are formed, since the nearest negative takes a gradient."""
    first = first_row(len(za_ND))
    both = (
        reference.restraint(za_ND, gather_rows(zb_ND), first),
        reference.restraint(zb_ND, gather_rows(za_ND), first),
    )
    return torch.stack(both).mean()
