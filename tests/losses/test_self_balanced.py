"""Self-balanced contrast: a slow loop, closed forms, SupCon, soft classes and their prior, ranks."""

import math
import pathlib

import pytest
import torch
from support.forks import on_ranks, succeed
from torch import Tensor
from torch.nn import functional as F

from fasttrain.engine.ranks import Ranks
from fasttrain.losses.contrast import nt_xent, sup_con
from fasttrain.losses.reference import BASE_TEMPERATURE
from fasttrain.losses.self_balanced import class_share, contrasts, move_prior, soft_classes

IMPLS = ["reference", "cpu"]


def rows(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)


def inputs(n: int = 9, d: int = 8, classes: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Two views, nearer to each other than to other images', and classes."""
    a = rows(n, d, 1)
    b = F.normalize(a + rows(n, d, 2), dim=1)
    return a.requires_grad_(), b.requires_grad_(), (4 * rows(n, classes, 3)).softmax(1)


def slow(a: Tensor, b: Tensor, p: Tensor, temperature: float) -> Tensor:
    """A pair of rows at a time."""
    z, n = torch.cat([a, b]), len(a)
    total = torch.zeros((), dtype=z.dtype)
    for i in range(2 * n):
        lse = sum((z[i] @ z[j] / temperature).exp() for j in range(2 * n) if j != i).log()
        weights, value = 0.0, torch.zeros((), dtype=z.dtype)
        for j in range(2 * n):
            if j != i:
                weight = 1.0 if j % n == i % n else float(p[i % n] @ p[j % n])
                weights, value = weights + weight, value - weight * (z[i] @ z[j] / temperature - lse)
        total = total + value / weights
    return total / (2 * n)


def assert_same(ours: Tensor, expected: Tensor, *inputs: Tensor, atol: float = 1e-11) -> None:
    assert torch.allclose(ours, expected, atol=atol)
    gradients = (torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (ours, expected))
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=atol)
        assert one.abs().max() > 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", [0.07, 0.5, 10.0])
@pytest.mark.parametrize(("n", "classes"), [(2, 3), (9, 5), (6, 1)])
def test_value_and_gradient(n: int, classes: int, temperature: float, impl: str) -> None:
    a, b, p = inputs(n, classes=classes)
    found = contrasts(a, b, p, temperature, impl=impl)
    assert_same(found.balanced, slow(a, b, p, temperature), a, b)
    assert_same(found.nt_xent, nt_xent(a, b, temperature, impl="reference"), a, b)


def test_more_rows_than_a_tile_are_as_the_formula() -> None:
    a, b, p = inputs(300, 32, 7)
    one, other = (contrasts(a, b, p, 0.1, impl=impl) for impl in ("auto", "reference"))
    assert_same(one.balanced, other.balanced, a, b)
    assert torch.allclose(one.positives, other.positives, atol=1e-11)


def test_classes_take_no_gradient() -> None:
    a, b, p = inputs()
    p.requires_grad_()
    found = contrasts(a, b, p, 0.1)
    assert torch.autograd.grad(found.balanced, p, allow_unused=True, retain_graph=True) == (None,)
    assert not found.positives.requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_of_classes_for_certain_it_is_supervised_contrast(impl: str) -> None:
    a, b, p = inputs(12)
    label = p.argmax(1)
    assert len(label.unique()) > 2
    found = contrasts(a, b, F.one_hot(label, 5).double(), 0.2, impl=impl)
    supervised = sup_con(torch.cat([a, b]), label.repeat(2), 0.2) * BASE_TEMPERATURE / 0.2
    assert_same(found.balanced, supervised, a, b)
    others = torch.stack([(label == own).sum() for own in label]).double() - 1
    assert float(found.positives) == pytest.approx(float(1 + 2 * others.mean()), abs=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_where_every_image_has_a_class_of_its_own_it_is_nt_xent(impl: str) -> None:
    a, b, _ = inputs()
    found = contrasts(a, b, torch.eye(9, dtype=torch.float64), 0.2, impl=impl)
    assert_same(found.balanced, found.nt_xent, a, b)
    assert float(found.positives) == 1


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("classes", [1, 4])
def test_of_uniform_classes_all_other_rows_weigh_one_in_so_many(classes: int, impl: str) -> None:
    """And of a single class, alike."""
    a, b, _ = inputs()
    found = contrasts(a, b, torch.full((9, classes), 1 / classes, dtype=torch.float64), 0.2, impl=impl)
    z = torch.cat([a, b])
    own = torch.eye(18, dtype=torch.bool)
    s = (z @ z.T / 0.2).masked_fill(own, 0)
    pair = (a * b).sum(1).repeat(2) / 0.2
    positive = (pair + (s.sum(1) - pair) / classes) / (1 + 16 / classes)
    expected = ((z @ z.T / 0.2).masked_fill(own, -math.inf).logsumexp(1) - positive).mean()
    assert_same(found.balanced, expected, a, b)
    assert float(found.positives) == pytest.approx(1 + 16 / classes, abs=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_images_on_axes_of_their_own_and_all_rows_alike(impl: str) -> None:
    _, _, p = inputs(4, classes=3)
    apart, alike = torch.eye(4, dtype=torch.float64), rows(1, 8, 5).expand(4, -1)
    weights = 1 + 2 * ((p @ p.T).sum(1) - p.square().sum(1))
    expected = (
        math.log(math.exp(1 / 0.2) + 6) - (1 / weights).mean() / 0.2
    )  # of the positives, the own view alone is near
    assert float(contrasts(apart, apart, p, 0.2, impl=impl).balanced) == pytest.approx(float(expected), abs=1e-12)
    assert float(contrasts(alike, alike, p, 0.2, impl=impl).balanced) == pytest.approx(math.log(7), abs=1e-12)


def test_images_may_be_permuted_and_views_exchanged_and_classes_too() -> None:
    a, b, p = inputs()
    expected, order = contrasts(a, b, p, 0.2), torch.randperm(9)
    for other in ((a[order], b[order], p[order]), (b, a, p), (a, b, p.flip(1))):
        for one, same in zip(contrasts(*other, 0.2), expected, strict=True):
            assert torch.allclose(one, same, atol=1e-12)


def test_many_images_in_fp32_lose_no_digits() -> None:
    given = inputs(300, 32, 7)
    narrow = [x.detach().float().requires_grad_() for x in given]
    ours, exact = contrasts(*narrow, 0.05).balanced, contrasts(*given, 0.05).balanced
    assert float(ours.detach()) == pytest.approx(float(exact.detach()), rel=1e-5)
    pairs = zip(torch.autograd.grad(ours, narrow[:2]), torch.autograd.grad(exact, given[:2]), strict=True)
    assert all(torch.allclose(one.double(), true, atol=1e-5) for one, true in pairs)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_numbers_do_not_come_out_plausible(bad: float, place: int) -> None:
    given = [x.detach().clone() for x in inputs()]
    given[place][1, 2] = bad
    assert not contrasts(*given, 0.1).balanced.isfinite()


def test_soft_classes_are_the_mean_of_both_views_with_frequent_ones_taken_down() -> None:
    scores = torch.stack([rows(6, 4, 1), rows(6, 4, 2)]).requires_grad_()
    even, prior = torch.full((4,), 0.25, dtype=torch.float64), torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=torch.float64)
    found = soft_classes(scores, prior, 0.1)
    views = [(view / 0.1).exp() / prior.sqrt() for view in scores]
    assert torch.allclose(found, sum(view / view.sum(1, keepdim=True) for view in views) / 2, atol=1e-12)
    assert torch.allclose(soft_classes(scores, even, 0.1), (scores / 0.1).softmax(2).mean(0), atol=1e-12)
    assert (found[:, 0] < soft_classes(scores, even, 0.1)[:, 0]).all()
    assert not found.requires_grad
    assert torch.allclose(class_share(scores, 0.1), (scores / 0.1).softmax(2).flatten(0, 1).mean(0), atol=1e-12)


def test_the_prior_moves_a_hundredth_of_the_way_after_a_good_step_alone() -> None:
    prior = torch.tensor([0.5, 0.5])
    move_prior(prior, torch.tensor([1.0, torch.nan]), torch.tensor(False))
    assert prior.tolist() == [0.5, 0.5]
    move_prior(prior, torch.tensor([1.0, 0.0]), torch.tensor(True))
    assert prior.tolist() == pytest.approx([0.505, 0.495])


def _own_rows(folder: pathlib.Path) -> None:
    """One rank's share of the losses and of the second one's gradient, averaged over ranks as DDP does."""
    ranks = Ranks("cpu")
    own = slice(ranks.rank * 12 // ranks.world_size, (ranks.rank + 1) * 12 // ranks.world_size)
    a, b, p = (x.detach()[own].clone().requires_grad_() for x in inputs(12))
    found = contrasts(a, b, p, 0.2)
    gradients = [grad / ranks.world_size for grad in torch.autograd.grad(found.balanced, (a, b))]
    torch.save((torch.stack(found).detach(), gradients), folder / f"rank{ranks.rank}.pt")
    ranks.close()


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_with_rows_of_their_own_have_the_gradient_of_one(tmp_path: pathlib.Path, count: int) -> None:
    a, b, p = inputs(12)
    expected = contrasts(a, b, p, 0.2)
    succeed(on_ranks(tmp_path, count, _own_rows, tmp_path))
    found = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(count)]
    assert torch.allclose(
        torch.stack([values for values, _ in found]).mean(0), torch.stack(expected).detach(), atol=1e-12
    )
    for place, gradient in enumerate(torch.autograd.grad(expected.balanced, (a, b))):
        assert torch.allclose(torch.cat([own[place] for _, own in found]), gradient, atol=1e-12)
