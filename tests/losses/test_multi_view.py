"""Contrast of any number of views: slow loops, closed forms, equivalences, one process against several."""

import itertools
import math
import pathlib
from collections.abc import Callable

import pytest
import torch
from support.forks import on_ranks, succeed
from torch import Tensor
from torch.nn import functional as F

from fasttrain.engine.ranks import Ranks
from fasttrain.losses.contrast import decoupled
from fasttrain.losses.multi_view import mv_dhel, mv_info_nce

KINDS: dict[str, Callable[..., Tensor]] = {"infonce": mv_info_nce, "dhel": mv_dhel}
IMPLS = ["reference", "cpu"]


def rows(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def views(v: int, n: int, d: int) -> Tensor:
    """Views of an image are nearer to each other than to other images'."""
    return F.normalize(rows(n, d, seed=1) + 0.7 * rows(v, n, d, seed=2), dim=-1).requires_grad_()


def slow(z: Tensor, temperature: float, kind: str) -> Tensor:
    """An image and a pair at a time, as the paper's equations read, but that an image is not its own negative in
    MV-DHEL."""
    v, n = z.shape[:2]
    total = torch.zeros((), dtype=z.dtype)
    for i in range(n):
        pairs = sum((z[a, i] @ z[b, i] / temperature).exp() for a, b in itertools.combinations(range(v), 2))
        if kind == "infonce":
            others = itertools.product(itertools.permutations(range(v), 2), range(n))
            total = total + (sum((z[a, i] @ z[b, j] / temperature).exp() for (a, b), j in others) / (2 * pairs)).log()
        else:
            for a in range(v):
                total = total + sum((z[a, i] @ z[a, j] / temperature).exp() for j in range(n) if j != i).log()
            total = total - pairs.log()
    return total / n


def assert_same(ours: Tensor, expected: Tensor, z: Tensor, atol: float = 1e-11) -> None:
    assert torch.allclose(ours, expected, atol=atol)
    one, other = (torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in (ours, expected))
    assert torch.allclose(one, other, atol=atol)
    assert one.abs().max() > 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.07, 0.5, 10.0])
@pytest.mark.parametrize(("v", "n"), [(2, 2), (2, 9), (3, 5), (5, 4)])
def test_value_and_gradient(v: int, n: int, temperature: float, kind: str, impl: str) -> None:
    z = views(v, n, 8)
    assert_same(KINDS[kind](z, temperature, impl=impl), slow(z, temperature, kind), z)


@pytest.mark.parametrize("kind", KINDS)
def test_more_rows_than_a_tile_are_as_the_formula(kind: str) -> None:
    z = views(3, 300, 32)
    assert_same(KINDS[kind](z, 0.1), KINDS[kind](z, 0.1, impl="reference"), z)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("v", "n", "temperature"), [(2, 4, 0.5), (4, 3, 0.2), (8, 2, 0.1)])
def test_closed_forms(v: int, n: int, temperature: float, impl: str) -> None:
    """Every image on an axis of its own, with equal views; and all rows alike."""
    apart = torch.eye(n, dtype=torch.float64).expand(v, n, n)
    alike = rows(1, 1, 8).expand(v, n, 8)
    pairs = math.log(v * (v - 1) / 2)
    for loss, value, collapse in (
        (mv_info_nce, math.log1p((n - 1) * math.exp(-1 / temperature)), math.log(n)),
        (mv_dhel, v * math.log(n - 1) - 1 / temperature - pairs, v * math.log(n - 1) + (v - 1) / temperature - pairs),
    ):
        assert float(loss(apart, temperature, impl=impl)) == pytest.approx(value, abs=1e-11)
        assert float(loss(alike, temperature, impl=impl)) == pytest.approx(collapse, abs=1e-11)


def test_numeric_anchor() -> None:
    assert float(mv_dhel(torch.eye(4, dtype=torch.float64).expand(2, 4, 4), 0.5)) == pytest.approx(0.1972246, abs=1e-7)


def test_of_two_views_the_sums_over_rows_and_columns_are_pooled() -> None:
    z = views(2, 9, 16)
    s = z[0] @ z[1].T / 0.2
    expected = (torch.logaddexp(s.logsumexp(0), s.logsumexp(1)) - math.log(2) - s.diagonal()).mean()
    assert_same(mv_info_nce(z, 0.2), expected, z)


def test_of_two_views_dhel_is_two_denominators_and_a_positive() -> None:
    z = views(2, 9, 16)
    own = torch.eye(9, dtype=torch.bool)
    lse = sum((x @ x.T / 0.2).masked_fill(own, -math.inf).logsumexp(1) for x in z)
    assert_same(mv_dhel(z, 0.2), (lse - (z[0] * z[1]).sum(1) / 0.2).mean(), z)


def test_of_equal_views_dhel_is_the_decoupled_contrast() -> None:
    """That takes both views as negatives, of which the second is the first again."""
    x = rows(9, 16)
    lse = mv_dhel(x.expand(2, -1, -1), 0.2) / 2 + 1 / 0.4
    assert float(decoupled(x, x, 0.2)) == pytest.approx(float(lse) + math.log(2) - 1 / 0.2, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_views_and_images_may_be_permuted_and_turned(kind: str) -> None:
    z = views(4, 9, 16).detach()
    loss = KINDS[kind](z, 0.2)
    for other in (z @ torch.linalg.qr(rows(16, 16, seed=5)).Q, z[[2, 0, 3, 1]], z[:, torch.arange(9).flip(0)]):
        assert torch.allclose(KINDS[kind](other, 0.2), loss, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_many_views_at_a_low_temperature_do_not_overflow(kind: str) -> None:
    """Products of V exponentials would, in fp32."""
    z = views(8, 6, 16)
    narrow = z.detach().float().requires_grad_()
    ours, exact = KINDS[kind](narrow, 0.02), KINDS[kind](z, 0.02)
    assert float(ours.detach()) == pytest.approx(float(exact.detach()), abs=5e-5)
    one, true = torch.autograd.grad(ours, narrow)[0], torch.autograd.grad(exact, z)[0]
    assert torch.allclose(one.double(), true, atol=5e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_numbers_do_not_come_out_plausible(bad: float, kind: str) -> None:
    z = views(3, 6, 8).detach().clone()
    z[2, 1, 2] = bad
    assert not KINDS[kind](z, 0.1).isfinite()


def _own_rows(folder: pathlib.Path, kind: str) -> None:
    """One rank's share of a loss: its gradient, averaged over ranks as DDP does."""
    ranks = Ranks("cpu")
    whole = torch.load(folder / "inputs.pt")
    own = slice(ranks.rank * 12 // ranks.world_size, (ranks.rank + 1) * 12 // ranks.world_size)
    z = whole[:, own].clone().requires_grad_()
    loss = KINDS[kind](z, 0.2)
    loss.backward()
    torch.save((loss.detach(), z.grad / ranks.world_size), folder / f"rank{ranks.rank}.pt")
    ranks.close()


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_with_rows_of_their_own_have_the_gradient_of_one(tmp_path: pathlib.Path, kind: str) -> None:
    z = views(3, 12, 8)
    torch.save(z.detach(), tmp_path / "inputs.pt")
    expected = KINDS[kind](z, 0.2)
    expected.backward()
    succeed(on_ranks(tmp_path, 3, _own_rows, tmp_path, kind))
    found = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(3)]
    assert torch.allclose(torch.stack([loss for loss, _ in found]).mean(), expected.detach(), atol=1e-12)
    assert torch.allclose(torch.cat([grad for _, grad in found], 1), z.grad, atol=1e-12)
