"""Terms over an image's own two views, without negatives.

Shapes: q_ND, k_ND, z_ND (N, D): this rank's rows, L2-normalised, row i of k_ND the target of row i of q_ND. Targets
take no gradient. Values are scalars of the rows' dtype, means over rows, of which every rank holds as many.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fasttrain.system.collectives import sum_over_ranks, world_size


def negative_cosine(q_ND: Tensor, k_ND: Tensor) -> Tensor:
    """−mean_i q_i·k_i (SimSiam, arXiv 2011.10566, eq. 1): −1 where all agree, 1 where all are opposed."""
    return -(q_ND * k_ND.detach()).sum(1).mean()


def squared_distance(q_ND: Tensor, k_ND: Tensor) -> Tensor:
    """mean_i ‖q_i − k_i‖² = 2 − 2·mean_i q_i·k_i (BYOL, arXiv 2006.07733, eq. 2): from 0 to 4."""
    return 2 + 2 * negative_cosine(q_ND, k_ND)


@torch.no_grad()
def spread(z_ND: Tensor) -> Tensor:
    """√D · mean_d std_i z_id over the rows of all ranks (SimSiam, arXiv 2011.10566, section 4.1).

    1 for rows spread over the sphere, 0 where they have collapsed to one: a gauge, without gradient.
    """
    mean_D, square_D = sum_over_ranks(torch.stack([z_ND.sum(0), z_ND.square().sum(0)])) / (world_size() * len(z_ND))
    return (square_D - mean_D.square()).clamp(min=0).sqrt().mean() * z_ND.shape[1] ** 0.5
