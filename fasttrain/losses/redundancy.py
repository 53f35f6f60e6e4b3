"""Redundancy reduction: what Barlow Twins and VICReg ask of the columns of two views' embeddings.

Shapes: x_ND, y_ND (N, D): this rank's embeddings of view 0 and view 1, as the projector gives them; row i of both is of
one image. Both take gradient. Statistics and products are over the M rows of all ranks, of which every rank holds as
many, and so are their gradients. Values are scalars, fp32 (fp64 for fp64).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttrain.kernels.autograd import Context
from fasttrain.losses.reference import BATCH_NORM_EPS, VARIANCE_EPS
from fasttrain.system.collectives import gather_rows, sum_over_ranks, world_size


def barlow(x_ND: Tensor, y_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_i (C_ii − 1)² and Σ_{i≠j} C_ij² of Barlow Twins (arXiv 2103.03230, eq. 1), C the views' cross-correlation.

    The gradient is that of the loss over all ranks. The published code (facebookresearch/barlowtwins) sums C over W
    ranks where autograd does not see it, so that its gradient is 1/W of this one.
    """
    a_ND, b_ND = _standardised(x_ND), _standardised(y_ND)
    rows = world_size() * len(a_ND)
    diagonal_D = sum_over_ranks((a_ND * b_ND).sum(0)) / rows
    return (diagonal_D - 1).square().sum(), off_diagonal(a_ND, b_ND) / rows**2


def vicreg(x_ND: Tensor, y_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Invariance, variance and covariance of VICReg (arXiv 2105.04906, eq. 1, 3, 5), scaled as its code has them.

    mean (x − y)²;  ½ Σ_views mean_d max(0, 1 − √(var_d + 1e-4));  Σ_views Σ_{a≠b} cov_ab² / D.  M ≥ 2. The first is of
    this rank's rows: its mean over the ranks is that of all.
    """
    (variance_x, covariance_x), (variance_y, covariance_y) = _spread(x_ND), _spread(y_ND)
    invariance = F.mse_loss(_wide(x_ND), _wide(y_ND))
    return invariance, (variance_x + variance_y) / 2, covariance_x + covariance_y


def _standardised(z_ND: Tensor) -> Tensor:
    """As batch norm without scale and shift over all ranks: biased variance."""
    mean_D, var_D = _moments(z_ND)
    return (_wide(z_ND) - mean_D) * (var_D + BATCH_NORM_EPS).rsqrt()


def _spread(z_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Variance and covariance term of one view."""
    mean_D, var_D = _moments(z_ND)
    centred_ND, rows = _wide(z_ND) - mean_D, world_size() * len(z_ND)
    std_D = (var_D * (rows / (rows - 1)) + VARIANCE_EPS).sqrt()
    covariance = off_diagonal(centred_ND, centred_ND) / ((rows - 1) ** 2 * z_ND.shape[1])
    return F.relu(1 - std_D).mean(), covariance


def _moments(z_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each column over the rows of all ranks."""
    own_2D = torch.stack(torch.var_mean(_wide(z_ND), 0, correction=0))
    var_WD, mean_WD = gather_rows(own_2D.flatten()[None]).unflatten(1, own_2D.shape).unbind(1)
    mean_D = mean_WD.mean(0)
    return mean_D, (var_WD + (mean_WD - mean_D).square()).mean(0)


def _wide(z_ND: Tensor) -> Tensor:
    return z_ND.to(torch.promote_types(z_ND.dtype, torch.float32))


def off_diagonal(a_ND: Tensor, b_ND: Tensor) -> Tensor:
    """Σ_{i≠j} C_ij² of C = aᵀb, over the rows of all ranks, with gradient. a, b: fp32 or fp64; they may be the same.

    Two forms, of which the one with fewer products is taken. By columns: C, summed over the ranks, its diagonal set to
    0; three products of N·D². By rows: the Gram matrices a aᵀ and b bᵀ of this rank's rows with all, for
    Σ_ij C_ij² = Σ_nm (a aᵀ)_nm (b bᵀ)_nm; four products of N·M·D, less communication, and nothing of D×D. With a = b it
    is two and two. The second form takes the diagonal off afterwards; as C has at most M of D possible ranks, enough is
    left: in fp32 its gradient is less than twice as far from fp64 as the first form's.

    Gradients are found with the value, so that between forward and backward two N×D matrices are kept, and at most one
    D×D matrix exists at any time, two while it is summed over ranks. Products are of fp32: bf16 ones would save a
    hundredth of a ResNet-50's step at M = 2048, D = 8192, and put the gradient off by 3e-3; where columns are hardly
    correlated any more, by all of itself.
    """
    return _OffDiagonal.apply(a_ND, b_ND)


class _OffDiagonal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, a_ND: Tensor, b_ND: Tensor) -> Tensor:  # type: ignore[override]
        rows, dim = world_size() * len(a_ND), a_ND.shape[1]
        by_rows = rows < dim if a_ND is b_ND else 4 * rows < 3 * dim
        half_a_ND, half_b_ND = (_halves_by_rows if by_rows else _halves_by_columns)(a_ND, b_ND)
        ctx.save_for_backward(half_a_ND, half_b_ND)
        return sum_over_ranks((a_ND * half_a_ND).sum())  # quadratic in a: ½⟨a, gradient of a⟩

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        scale = 2 * world_size() * grad  # as of sum_over_ranks: every rank computes this value
        half_a_ND, half_b_ND = ctx.saved_tensors
        return scale * half_a_ND, scale * half_b_ND


def _halves_by_columns(a_ND: Tensor, b_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Half the gradients of a and b: b C₀ᵀ and a C₀, C₀ = C without its diagonal."""
    c_DD = sum_over_ranks(a_ND.T @ b_ND).fill_diagonal_(0)
    half_a_ND = b_ND @ c_DD.T
    return half_a_ND, half_a_ND if a_ND is b_ND else a_ND @ c_DD


def _halves_by_rows(a_ND: Tensor, b_ND: Tensor) -> tuple[Tensor, Tensor]:
    """The same, as (b bᵀ) a − b·diag C and (a aᵀ) b − a·diag C."""
    a_MD = gather_rows(a_ND)
    b_MD = a_MD if a_ND is b_ND else gather_rows(b_ND)
    diagonal_D = sum_over_ranks((a_ND * b_ND).sum(0))
    half_a_ND = (b_ND @ b_MD.T @ a_MD).addcmul_(b_ND, diagonal_D, value=-1)
    if a_ND is b_ND:
        return half_a_ND, half_a_ND
    return half_a_ND, (a_ND @ a_MD.T @ b_MD).addcmul_(a_ND, diagonal_D, value=-1)
