"""Is a representation healthy? Figures that need no labels, of features of a fixed set of images in evaluation mode.

z_ND, x_ND, y_ND (N, D): features as an encoder or a projection head gives them, a row an image, N ≥ 2, any float dtype,
not normalised; what takes directions alone normalises them itself, and there a row of zeros counts as one fixed
direction, so that a collapse to zero looks like any other. Figures are scalars on the features' device, NaN where a
feature is not finite; none raises for that, and none needs a gradient. Figures of a spectrum compare runs of one method
and width, not methods.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttrain.kernels.similarity import log_sum_exp

RANKME_EPSILON = 1e-7  # added to every share: RankMe's and LiDAR's
WITHIN_EPSILON = 1e-4  # LiDAR's, added to the scatter within an image
POWER_LAW = 11, 100  # eigenvalues that α-ReQ's line is put through, counted from 1, both ends included


class Spectrum(NamedTuple):
    """Of features (N, D), K = min(N, D); fp64, the largest first, what is below the Gram matrix's rounding is 0.

    singular_K: singular values of the features as they are, not centred. variance_K: eigenvalues of their covariance,
    which is centred. The two are never to be mixed: an effective rank of one may be several times that of the other.
    """

    singular_K: Tensor
    variance_K: Tensor


class PowerLaw(NamedTuple):
    """alpha: exponent of the decay of the variances. r2: share of log variance, weighted, that a power law explains."""

    alpha: Tensor
    r2: Tensor


@torch.no_grad()
def spectrum(z_ND: Tensor) -> Spectrum:
    """Both spectra from one Gram matrix in fp64, of the features' shorter side: fp32 would lose the small values."""
    rows, width = z_ND.shape
    z_ND = z_ND.double()
    mean_D = z_ND.mean(0)
    if width <= rows:
        gram_KK = z_ND.T @ z_ND
        centred_KK = gram_KK - rows * torch.outer(mean_D, mean_D)
    else:
        gram_KK = z_ND @ z_ND.T
        towards_N = z_ND @ mean_D
        centred_KK = gram_KK - towards_N - towards_N[:, None] + mean_D.square().sum()
    rounding = gram_KK.trace() * len(gram_KK) * torch.finfo(torch.float64).eps
    square_K, scatter_K = (_eigenvalues(each_KK, rounding) for each_KK in (gram_KK, centred_KK))
    return Spectrum(square_K.sqrt(), scatter_K / (rows - 1))


def rank_me(spectrum: Spectrum) -> Tensor:
    """RankMe (Garrido et al., arXiv 2210.02885, eq. 3): 1 collapsed … min(N, D), from singular values, not centred."""
    return _exp_entropy(spectrum.singular_K, RANKME_EPSILON)


def effective_rank(spectrum: Spectrum) -> Tensor:
    """RankMe without its ε: the effective rank of Roy & Vetterli (EUSIPCO 2007) of features that are not centred."""
    return _exp_entropy(spectrum.singular_K)


def alpha_req(spectrum: Spectrum) -> PowerLaw:
    """α-ReQ (Agrawal et al., arXiv 2202.05808): about 1 is best, far above collapsed, far below noise.

    The slope of log λ_k over −log k by least squares with weights 1/k, where λ are the centred variances and k goes
    from 11 to 100. NaN where fewer of them are above 0: a line through others would be another figure.
    """
    first, last = POWER_LAW
    variance_K = spectrum.variance_K
    if len(variance_K) < last:
        return PowerLaw(variance_K.new_tensor(math.nan), variance_K.new_tensor(math.nan))
    k_M = torch.arange(first, last + 1, device=variance_K.device, dtype=variance_K.dtype)
    weight_M = 1 / k_M / (1 / k_M).sum()
    x_M, y_M = -k_M.log(), variance_K[first - 1 : last].log()
    x_M, y_M = (each_M - (weight_M * each_M).sum() for each_M in (x_M, y_M))
    xx, xy, yy = ((weight_M * a_M * b_M).sum() for a_M, b_M in ((x_M, x_M), (x_M, y_M), (y_M, y_M)))
    return PowerLaw(xy / xx, xy.square() / (xx * yy))


@torch.no_grad()
def lidar(z_NVD: Tensor) -> Tensor:
    """LiDAR (Thilak et al., arXiv 2312.04000): the rank of what tells images apart, 1 collapsed … min(D, N − 1).

    z_NVD: (N, V, D), V ≥ 2 views of each of N images. exp of the entropy of Σ_w^(−1/2) Σ_b Σ_w^(−1/2)'s D eigenvalues,
    Σ_b the covariance of the images' means, Σ_w that of views about theirs. With Σ_w = L Lᵀ they are the squares of
    the singular values of L⁻¹ (the centred means).
    """
    images, views, width = z_NVD.shape
    z_NVD = z_NVD.double()
    finite = z_NVD.isfinite().all()
    z_NVD = torch.where(finite, z_NVD, 0.0)
    mean_ND = z_NVD.mean(1)
    about_RD = (z_NVD - mean_ND[:, None]).flatten(0, 1)
    within_DD = about_RD.T @ about_RD / (images * (views - 1))
    within_DD.diagonal().add_(WITHIN_EPSILON)
    between_DN = (mean_ND - mean_ND.mean(0)).T / math.sqrt(images - 1)
    factor_DD, _ = torch.linalg.cholesky_ex(within_DD)
    apart_DN = torch.linalg.solve_triangular(factor_DD, between_DN, upper=False)
    gram_KK = apart_DN @ apart_DN.T if width <= images else apart_DN.T @ apart_DN
    value_K = _eigenvalues(gram_KK, gram_KK.trace() * len(gram_KK) * torch.finfo(torch.float64).eps)
    value_D = F.pad(value_K, (0, width - len(value_K)))
    return torch.where(finite, _exp_entropy(value_D, RANKME_EPSILON), math.nan)


@torch.no_grad()
def standard_deviation(z_ND: Tensor) -> Tensor:
    """Mean over the dimensions of the directions' standard deviation, times √D (Chen & He, arXiv 2011.10566, §4.1).

    0 collapsed … 1 as of directions drawn evenly from the sphere.
    """
    return _directions(z_ND).std(0).mean() * math.sqrt(z_ND.shape[1])


@torch.no_grad()
def alignment(x_ND: Tensor, y_ND: Tensor) -> Tensor:
    """Mean squared distance of directions of two views' rows, row i of both from one image: 0 alike … 4 opposite.

    Wang & Isola (arXiv 2005.10242), α = 2; 2 − 2 × the mean cosine.
    """
    return (_directions(x_ND) - _directions(y_ND)).square().sum(1).mean()


class Compactness(NamedTuple):
    """Of the images: the mean, and the 5 % quantile."""

    mean: Tensor
    low: Tensor


@torch.no_grad()
def compactness(z_NVD: Tensor) -> Compactness:
    """How much nearer an image's first view is to its furthest other view than to the mean of other images there.

    z_NVD: (N, V, D), V ≥ 2 views of each of N images. c_i = min_v x_i·(y_vi − mean_{j≠i} y_vj) of their directions, x
    of the first view and y of the others: −2 … 2, 0 collapsed, 1 where images are at right angles and views alike. A
    reading of POT's node compactness (arXiv 2309.13944), whose least is over all changes of a graph.
    """
    x_NVD = _directions(z_NVD.flatten(0, 1)).view(z_NVD.shape)
    first_ND, other_NVD = x_NVD[:, 0], x_NVD[:, 1:]
    mean_NVD = (other_NVD.sum(0) - other_NVD) / (len(x_NVD) - 1)
    c_N = torch.einsum("nd,nvd->nv", first_ND, other_NVD - mean_NVD).amin(1)
    return Compactness(c_N.mean(), c_N.quantile(0.05))


@torch.no_grad()
def uniformity(z_ND: Tensor, t: float = 2.0, impl: str = "auto") -> Tensor:
    """log of the mean over pairs of rows of exp(−t ‖x_i − x_j‖²), x their directions (arXiv 2005.10242).

    0 collapsed … about −2t spread evenly in many dimensions. ‖x_i − x_j‖² is 2 − 2 x_i·x_j, so that the kernel of the
    losses sums it; impl: as of `log_sum_exp`.
    """
    x_ND = _directions(z_ND)
    pairs = len(x_ND) * (len(x_ND) - 1)
    value = log_sum_exp(x_ND, x_ND, 1 / (2 * t), own=0, impl=impl).logsumexp(0) - math.log(pairs) - 2 * t
    return torch.where(x_ND.isfinite().all(), value, math.nan)


def _directions(z_ND: Tensor) -> Tensor:
    """Rows of length 1 in fp32, or fp64 for fp64; a row of zeros is the first unit vector."""
    z_ND = z_ND.to(torch.promote_types(z_ND.dtype, torch.float32))
    largest_N1 = z_ND.abs().amax(1, keepdim=True)
    first_D = F.one_hot(z_ND.new_zeros((), dtype=torch.int64), z_ND.shape[1]).to(z_ND.dtype)
    scaled_ND = torch.where(largest_N1 == 0, first_D, z_ND / largest_N1)  # squares of tiny or huge ones are lost
    return scaled_ND / scaled_ND.norm(dim=1, keepdim=True)


def _eigenvalues(gram_KK: Tensor, rounding: Tensor) -> Tensor:
    """Of a symmetric matrix, the largest first; 0 for those up to `rounding`, NaN for a matrix that is not finite."""
    finite = gram_KK.isfinite().all()
    value_K = torch.linalg.eigvalsh(torch.where(finite, gram_KK, 0.0)).flip(0)
    return torch.where(finite, torch.where(value_K > rounding, value_K, 0.0), math.nan)


def _exp_entropy(value_K: Tensor, epsilon: float = 0.0) -> Tensor:
    """exp(−Σ p log p), p the values' shares of their sum, plus ε; 1 for values that are all 0."""
    total = value_K.sum()
    share_K = value_K / torch.where(total == 0, 1.0, total)
    return torch.special.entr(share_K + epsilon).sum().exp()
