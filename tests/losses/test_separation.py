"""Common and salient codes kept apart: a slow loop, closed forms, one process against several."""

import math
import pathlib

import pytest
import torch
from support.forks import on_ranks, succeed
from torch import Tensor
from torch.nn import functional as F

from fasttrain.engine.ranks import Ranks
from fasttrain.losses.separation import Separation, separation

IMPLS = ["reference", "auto"]
BACKGROUND = torch.tensor([True, False, False, True, False, True, False, False, False, True, False, False])
NONE, ALL = torch.zeros(12, dtype=torch.bool), torch.ones(12, dtype=torch.bool)


def inputs(n: int = 12) -> tuple[Tensor, Tensor]:
    """Codes of two views of each image, the common ones on the sphere."""
    generator = torch.Generator().manual_seed(1)
    c, s = (
        torch.randn(1, n, d, generator=generator, dtype=torch.float64)
        + torch.randn(2, n, d, generator=generator, dtype=torch.float64) / 2
        for d in (8, 5)
    )
    return F.normalize(c, dim=2).requires_grad_(), s.requires_grad_()


def slow(c: Tensor, s: Tensor, background: Tensor, temperature: float) -> Separation:
    """A pair at a time."""
    images = range(len(background))

    def half(difference: Tensor) -> Tensor:
        return difference @ difference / (2 * temperature)

    def mean(values: list[Tensor]) -> Tensor:
        return torch.stack(values).mean() if values else torch.zeros((), dtype=c.dtype)

    def uniformity(x: Tensor) -> Tensor:
        return mean([(-half(x[i] - x[j])).exp() for i in images for j in images if i < j]).log()

    kept = torch.stack([torch.stack([x * 0 if b else x for x, b in zip(view, background, strict=True)]) for view in s])
    joint = [
        mean([(-half(c[v, i] - c[v, j]) - half(kept[v, i] - kept[v, j])).exp() for j in images]).log()
        for v in (0, 1)
        for i in images
    ]
    return Separation(
        mean([half(c[0, i] - c[1, i]) for i in images]) + 2 * mean([uniformity(view) for view in c]),
        mean([half(s[0, i] - s[1, i]) for i in images if not background[i]])
        + 2 * mean([uniformity(view) for view in kept]),
        mean([half(view[i]) for view in s for i in images if background[i]]),
        mean(joint),
    )


def gradients_of(loss: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
    """With zeros where a term has nothing to do with a code."""
    return torch.autograd.grad(loss, given, retain_graph=True, allow_unused=True, materialize_grads=True)


def assert_same(ours: Tensor, expected: Tensor, *given: Tensor) -> None:
    assert torch.allclose(ours, expected, atol=1e-11)
    gradients = (gradients_of(loss, *given) for loss in (ours, expected))
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-11)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", [0.1, 0.5, 10.0])
def test_value_and_gradient_of_each_term(temperature: float, impl: str) -> None:
    given = inputs()
    ours = separation(*given, BACKGROUND, temperature, impl=impl)
    for one, other in zip(ours, slow(*given, BACKGROUND, temperature), strict=True):
        assert_same(one, other, *given)
    for gradient in torch.autograd.grad(sum(ours), given):
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("background", [NONE, ALL])
def test_a_batch_of_one_kind_has_terms_that_are_numbers_and_so_are_their_gradients(
    background: Tensor, impl: str
) -> None:
    given = inputs()
    ours = separation(*given, background, 0.5, impl=impl)
    for one, other in zip(ours, slow(*given, background, 0.5), strict=True):
        assert_same(one, other + 0 * sum(x.sum() for x in given), *given)  # a mean over nothing has no gradient
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(sum(ours), given))
    missing = ours.background if background is NONE else ours.salient
    assert float(missing.detach()) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_codes_on_axes_of_their_own(impl: str) -> None:
    """At a temperature of 0.5 orthogonal common codes are at a uniformity of −2."""
    c = torch.eye(12, dtype=torch.float64).expand(2, 12, 12)
    s = torch.zeros(2, 12, 4, dtype=torch.float64)
    found = separation(c, s, BACKGROUND, 0.5, impl=impl)
    assert float(found.common) == pytest.approx(-4, abs=1e-12)
    assert (float(found.salient), float(found.background)) == pytest.approx((0, 0), abs=1e-12)
    assert float(found.joint) == pytest.approx(math.log((1 + 11 * math.exp(-2)) / 12), abs=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_common_term_is_wang_and_isola_s_alignment_and_uniformity(impl: str) -> None:
    """At a temperature of 0.5 their α is 2 and their t is 1: arXiv 2005.10242, with a weight of 2 for uniformity."""
    c, s = inputs()
    ours = separation(c, s, NONE, 0.5, impl=impl).common
    uniform = torch.stack([torch.pdist(view).square().neg().exp().mean().log() for view in c]).mean()
    assert_same(ours, (c[0] - c[1]).norm(dim=1).square().mean() + 2 * uniform, c)


@pytest.mark.parametrize("impl", IMPLS)
def test_targets_keep_away_from_the_origin_at_which_background_lies(impl: str) -> None:
    """All targets in one place, and all background at 0: of the pairs, those of two kinds alone are apart."""
    c, s = (x.detach() for x in inputs())
    s = torch.full_like(s, 0.7) * ~BACKGROUND[:, None]
    found = separation(c, s, BACKGROUND, 0.5, impl=impl)
    mixed, square = 4 * 8 / (12 * 11 / 2), 5 * 0.7**2
    assert float(found.salient) == pytest.approx(2 * math.log(1 - mixed + mixed * math.exp(-square)), abs=1e-12)
    assert float(found.background) == 0


def test_what_background_images_have_of_their_own_is_in_their_term_alone() -> None:
    c, s = inputs()
    other = (s + 3 * BACKGROUND[:, None]).detach()
    found, again = separation(c, s, BACKGROUND, 0.5), separation(c, other, BACKGROUND, 0.5)
    for name in ("common", "salient", "joint"):
        assert torch.allclose(getattr(found, name), getattr(again, name), atol=1e-12)
    assert not torch.allclose(found.background, again.background)


def test_images_may_be_permuted_and_views_exchanged() -> None:
    given = inputs()
    found = separation(*given, BACKGROUND, 0.5)
    order = torch.randperm(12)
    again = separation(*(x.flip(0)[:, order] for x in given), BACKGROUND[order], 0.5)
    for one, other in zip(found, again, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_targets_that_are_far_apart_do_not_underflow() -> None:
    """Nothing holds salient codes to a length: their kernels may all be too small for fp32."""
    c, s = (x.detach().float().requires_grad_() for x in inputs())
    exact = separation(c.double(), 40 * s.double(), NONE, 0.5)
    found = separation(c, 40 * s, NONE, 0.5)
    for one, other in zip(found, exact, strict=True):
        assert float(one.detach()) == pytest.approx(float(other.detach()), rel=1e-5)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(sum(found), (c, s)))


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("image", [0, 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_numbers_do_not_come_out_plausible(bad: float, image: int, place: int) -> None:
    given = [x.detach().clone() for x in inputs()]
    given[place][1, image, 2] = bad
    assert not sum(separation(*given, BACKGROUND, 0.5)).isfinite()


def _own_rows(folder: pathlib.Path) -> None:
    """One rank's share of a loss, and its gradient, averaged over ranks as DDP does."""
    ranks = Ranks("cpu")
    own = slice(ranks.rank * 12 // ranks.world_size, (ranks.rank + 1) * 12 // ranks.world_size)
    given = [x.detach()[:, own].clone().requires_grad_() for x in inputs()]
    found = separation(*given, BACKGROUND[own], 0.5)
    gradients = [[gradient / ranks.world_size for gradient in gradients_of(term, *given)] for term in found]
    torch.save(([term.detach() for term in found], gradients), folder / f"rank{ranks.rank}.pt")
    ranks.close()


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_with_rows_of_their_own_have_the_terms_and_gradients_of_one(tmp_path: pathlib.Path, count: int) -> None:
    """The ranks differ in how many background images they have."""
    given = inputs()
    expected = separation(*given, BACKGROUND, 0.5)
    succeed(on_ranks(tmp_path, count, _own_rows, tmp_path))
    found = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(count)]
    for number, term in enumerate(expected):
        assert torch.allclose(torch.stack([terms[number] for terms, _ in found]).mean(), term.detach(), atol=1e-12)
        for place, gradient in enumerate(gradients_of(term, *given)):
            whole = torch.cat([of_terms[number][place] for _, of_terms in found], 1)
            assert torch.allclose(whole, gradient, atol=1e-12)
