"""Label-free figures: plain definitions in fp64, closed forms, invariances, collapsed and damaged features."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fasttrain.evaluation.label_free import (
    alignment,
    alpha_req,
    compactness,
    effective_rank,
    lidar,
    rank_me,
    spectrum,
    standard_deviation,
    uniformity,
)

SIZES = [(60, 24), (24, 60), (130, 130), (300, 110)]
Figure = Callable[[Tensor], Tensor]
FIGURES: dict[str, Figure] = {
    "rank_me": lambda z: rank_me(spectrum(z)),
    "effective_rank": lambda z: effective_rank(spectrum(z)),
    "alpha": lambda z: alpha_req(spectrum(z)).alpha,
    "r2": lambda z: alpha_req(spectrum(z)).r2,
    "lidar": lambda z: lidar(z.unflatten(0, (-1, 2))),
    "standard_deviation": standard_deviation,
    "alignment": lambda z: alignment(z[::2], z[1::2]),
    "uniformity": uniformity,
    "compactness": lambda z: compactness(z.unflatten(0, (-1, 2))).mean,
    "compactness_low": lambda z: compactness(z.unflatten(0, (-1, 4))).low,
}


def features(rows: int, width: int, seed: int = 0, offset: float = 0.5) -> Tensor:
    """Correlated, not centred, of uneven scale, as an encoder's are; fp64."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, width + 1, dtype=torch.float64) ** -0.6
    mix = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    return torch.randn(rows, width, generator=generator, dtype=torch.float64) * scale @ mix + offset


def orthogonal(rows: int, width: int) -> Tensor:
    """Columns of one length, each at right angles to all others and to the constant one."""
    random = torch.randn(rows, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.linalg.qr(torch.cat([torch.ones(rows, 1, dtype=torch.float64), random], 1))[0][:, 1:]


def entropy_rank(values: Tensor, epsilon: float) -> float:
    return math.exp(-sum(p * math.log(p) for p in (values / values.sum() + epsilon).tolist()))


@pytest.mark.parametrize("size", SIZES)
def test_ranks_are_those_of_singular_values_by_definition(size: tuple[int, int]) -> None:
    z = features(*size)
    both = spectrum(z.float())
    singular = torch.linalg.svdvals(z.float().double())
    assert torch.allclose(both.singular_K, singular, rtol=1e-9)
    assert float(rank_me(both)) == pytest.approx(entropy_rank(singular, 1e-7), rel=1e-9)
    assert float(effective_rank(both)) == pytest.approx(entropy_rank(singular, 0.0), rel=1e-9)


@pytest.mark.parametrize("size", SIZES)
def test_variances_are_those_of_the_centred_covariance(size: tuple[int, int]) -> None:
    z = features(*size)
    expected = torch.linalg.eigvalsh(torch.cov(z.T)).flip(0)[: min(size)].clamp_min(0)
    assert torch.allclose(spectrum(z).variance_K, expected, rtol=1e-8, atol=1e-14)


def test_alpha_is_the_slope_of_a_weighted_line_with_its_r2() -> None:
    z = features(300, 110)
    variance = torch.linalg.eigvalsh(torch.cov(z.T)).flip(0)[10:100]
    k = torch.arange(11, 101, dtype=torch.float64)
    root = (1 / k).sqrt()
    design = torch.stack([-k.log(), torch.ones_like(k)], 1)
    slope, height = torch.linalg.lstsq(design * root[:, None], (variance.log() * root)[:, None]).solution[:, 0]
    rest = (variance.log() - design @ torch.stack([slope, height])).square()
    around = (variance.log() - (variance.log() / k).sum() / (1 / k).sum()).square()
    law = alpha_req(spectrum(z))
    assert float(law.alpha) == pytest.approx(float(slope), rel=1e-9)
    assert float(law.r2) == pytest.approx(float(1 - (rest / k).sum() / (around / k).sum()), rel=1e-9)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.3])
def test_an_exact_power_law_is_found(exponent: float) -> None:
    z = orthogonal(400, 128) * torch.arange(1, 129, dtype=torch.float64) ** (-exponent / 2)
    law = alpha_req(spectrum(z))
    assert float(law.alpha) == pytest.approx(exponent, abs=1e-9)
    assert float(law.r2) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("size", [(300, 99), (100, 300), (90, 90)])
def test_alpha_is_no_number_where_fewer_than_a_hundred_dimensions_vary(size: tuple[int, int]) -> None:
    assert all(map(math.isnan, alpha_req(spectrum(features(*size)))))
    assert not any(map(math.isnan, alpha_req(spectrum(features(size[0] + 300, size[1] + 300)))))


@pytest.mark.parametrize(("images", "views", "width"), [(40, 3, 12), (9, 4, 30), (30, 2, 30)])
def test_lidar_is_that_of_whitened_scatter_by_definition(images: int, views: int, width: int) -> None:
    z = features(images, width)[:, None] + 0.3 * features(images * views, width, 7, 0.0).view(images, views, width)
    means = z.mean(1)
    between = sum(torch.outer(m, m) for m in means - means.mean(0)) / (images - 1)
    about = (z - means[:, None]).flatten(0, 1)
    within = sum(torch.outer(x, x) for x in about) / (images * (views - 1)) + 1e-4 * torch.eye(width)
    values, vectors = torch.linalg.eigh(within)
    root = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    expected = entropy_rank(torch.linalg.eigvalsh(root @ between @ root).clamp_min(0), 1e-7)
    assert float(lidar(z)) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(("rows", "width"), [(50, 7), (8, 40), (500, 32)])
def test_pairs_distances_are_those_of_a_matrix_of_them(rows: int, width: int) -> None:
    z = features(rows, width)
    x = F.normalize(z, dim=1)
    for t in (2.0, 0.5):
        expected = torch.pdist(x).square().mul(-t).exp().mean().log()
        assert float(uniformity(z, t)) == pytest.approx(float(expected), abs=1e-12)
        assert float(uniformity(z.float(), t, "reference")) == pytest.approx(float(expected), abs=1e-5)
    y = F.normalize(features(rows, width, 3), dim=1)
    assert float(alignment(z, y)) == pytest.approx(2 - 2 * float((x * y).sum(1).mean()), abs=1e-12)


@pytest.mark.parametrize("width", [5, 32])
def test_orthogonal_columns_have_full_rank(width: int) -> None:
    both = spectrum(3 * orthogonal(100, width))
    assert float(effective_rank(both)) == pytest.approx(width, rel=1e-12)
    assert float(rank_me(both)) == pytest.approx(width, rel=1e-4)  # its ε counts each dimension a little more


@pytest.mark.parametrize("rows", [4, 64])
def test_orthonormal_rows_are_as_uniform_as_can_be(rows: int) -> None:
    assert float(uniformity(torch.eye(rows, 64, dtype=torch.float64))) == pytest.approx(-4, abs=1e-12)


@pytest.mark.parametrize(("images", "width"), [(30, 6), (7, 40)])
def test_lidar_of_what_is_alike_in_all_directions_is_the_number_of_them(images: int, width: int) -> None:
    """Views about their means: plus and minus each axis, so that their scatter is isotropic."""
    directions = min(width, images - 1)
    means = F.pad(orthogonal(images, directions), (0, width - directions))
    axes = torch.eye(width, dtype=torch.float64)
    z = means[:, None] + 0.01 * torch.cat([axes, -axes])
    assert float(lidar(z)) == pytest.approx(directions, rel=1e-4)


def test_compactness_is_that_of_the_worst_view() -> None:
    """By a loop; and of images at right angles, whose views are alike but for one."""
    z = F.normalize(features(20 * 5, 12).view(20, 5, 12) + 2 * features(20, 12, 4)[:, None], dim=2)
    worst = []
    for i in range(20):
        others = [j for j in range(20) if j != i]
        worst.append(min(float(z[i, 0] @ (z[i, v] - z[others, v].mean(0))) for v in range(1, 5)))
    mean, low = compactness(3 * z)
    assert float(mean) == pytest.approx(sum(worst) / 20, abs=1e-12)
    assert float(low) == pytest.approx(float(torch.tensor(worst, dtype=torch.float64).quantile(0.05)), abs=1e-12)
    axes = torch.eye(6, dtype=torch.float64)[:, None].repeat(1, 3, 1)
    assert [float(c) for c in compactness(axes)] == pytest.approx([1, 1], abs=1e-12)
    axes[2, 1] = axes[2, 0].neg()
    assert float(compactness(axes).mean) == pytest.approx(4 / 6, abs=1e-12)


def test_directions_drawn_evenly_from_a_sphere_have_the_deviation_one() -> None:
    drawn = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    assert float(standard_deviation(drawn)) == pytest.approx(1, abs=0.01)
    assert float(standard_deviation(drawn + 5)) < 0.3


def test_what_takes_directions_does_not_mind_each_rows_length_nor_others_that_of_all() -> None:
    z, generator = features(60, 24), torch.Generator().manual_seed(5)
    lengths = torch.rand(60, 1, generator=generator, dtype=torch.float64) + 0.1
    for name in ("standard_deviation", "alignment", "uniformity", "compactness", "compactness_low"):
        assert float(FIGURES[name](z * lengths)) == pytest.approx(float(FIGURES[name](z)), abs=1e-12)
    wide = features(300, 110)
    for name in ("rank_me", "effective_rank", "alpha", "r2"):
        assert float(FIGURES[name](7 * wide)) == pytest.approx(float(FIGURES[name](wide)), rel=1e-9)


@pytest.mark.parametrize("name", [name for name in FIGURES if name != "standard_deviation"])
def test_a_rotation_changes_nothing(name: str) -> None:
    z = features(300, 110)
    rotation = torch.linalg.qr(features(110, 110, 9))[0]
    assert float(FIGURES[name](z @ rotation)) == pytest.approx(float(FIGURES[name](z)), rel=1e-6)


COLLAPSED = {"rank_me": 1.01, "effective_rank": 1.0, "lidar": 1.01, "standard_deviation": 0.0, "alignment": 0.0,
             "uniformity": 0.0, "compactness": 0.0, "compactness_low": 0.0}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 1.7, -1e-30, 1e30])
@pytest.mark.parametrize("name", COLLAPSED)
def test_a_collapse_to_one_point_is_told_in_figures(name: str, value: float, dtype: torch.dtype) -> None:
    z = torch.full((200, 128), value, dtype=dtype)
    figure = float(FIGURES[name](z))
    assert figure == pytest.approx(COLLAPSED[name], abs=0.011 if COLLAPSED[name] else 1e-5)


def test_a_line_has_the_rank_one_however_long() -> None:
    line = torch.outer(torch.linspace(-3, 90, 300, dtype=torch.float64), features(1, 110)[0])
    assert float(effective_rank(spectrum(line))) == pytest.approx(1, abs=1e-9)
    assert math.isnan(alpha_req(spectrum(line)).alpha)


def test_one_row_of_zeros_among_others_leaves_a_number() -> None:
    z = features(200, 128)
    z[3] = 0
    assert all(math.isfinite(FIGURES[name](z)) for name in FIGURES)


@pytest.mark.parametrize("odd", [math.nan, math.inf])
@pytest.mark.parametrize("name", FIGURES)
def test_features_that_are_not_finite_give_no_number(name: str, odd: float) -> None:
    z = features(200, 128).float()
    assert math.isfinite(FIGURES[name](z))
    z[7, 3] = odd
    assert math.isnan(FIGURES[name](z))
