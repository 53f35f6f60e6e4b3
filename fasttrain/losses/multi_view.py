"""Contrast of any number of views in one term, over the images of all ranks (Koromilas et al., arXiv 2507.06979).

Shapes: z_VND (V, N, D): this rank's rows of V ≥ 2 views, z_VND[:, i] those of one image; rows L2-normalised, the same N
on every rank, at least 2 images over all. All rows take gradient, and no matrix of all similarities is formed. The mean
of a loss over the ranks is that of one process that holds all rows. Values are scalars, fp32 (fp64 for fp64).

impl: "reference" is plain torch as the formulas read, of one rank; others are versions of `log_sum_exp`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fasttrain.kernels.similarity import log_sum_exp
from fasttrain.losses import reference
from fasttrain.system.collectives import first_row, gather_rows


def mv_info_nce(z_VND: Tensor, temperature: float, impl: str = "auto") -> Tensor:
    """MV-InfoNCE: the pairs of an image's views against its views with those of all images, both sums of exponentials.

    As the paper's equation has it: similarities within a view are no part of it, in its code they are.
    """
    if impl == "reference":
        return reference.mv_info_nce(z_VND, temperature)
    z_VMD = gather_views(z_VND)
    lse_VN = torch.stack(
        [
            log_sum_exp(z_ND, torch.cat([*z_VMD[:view], *z_VMD[view + 1 :]]), temperature, impl=impl)
            for view, z_ND in enumerate(z_VND)
        ]
    )
    # each pair of views stands in the sum over ordered pairs twice, which is log 2
    pairs_N = pair_similarities(z_VND, temperature).logsumexp(0)
    return (lse_VN.logsumexp(0) - torch.logaddexp(pairs_N, pairs_N)).mean()


def mv_dhel(z_VND: Tensor, temperature: float, impl: str = "auto") -> Tensor:
    """MV-DHEL: one term for all pairs of an image's views, and for each view one over the other images' same view, from
    which the first is decoupled. May be negative."""
    if impl == "reference":
        return reference.mv_dhel(z_VND, temperature)
    first = first_row(z_VND.shape[1])
    lse_N = sum(
        log_sum_exp(z_ND, z_MD, temperature, own=first, impl=impl)
        for z_ND, z_MD in zip(z_VND, gather_views(z_VND), strict=True)
    )
    return (lse_N - pair_similarities(z_VND, temperature).logsumexp(0)).mean()


def gather_views(z_VND: Tensor) -> Tensor:
    """The rows of all ranks, (V, M, D), by one exchange; with gradient."""
    views, _, dim = z_VND.shape
    return gather_rows(z_VND.transpose(0, 1).flatten(1)).unflatten(1, (views, dim)).transpose(0, 1)


def pair_similarities(z_VND: Tensor, temperature: float) -> Tensor:
    """z_li·z_mi/τ of the V(V−1)/2 pairs of an image's views: (pairs, N)."""
    views = range(len(z_VND))
    return torch.stack([(z_VND[one] * z_VND[other]).sum(1) for one in views for other in views[:one]]) / temperature
