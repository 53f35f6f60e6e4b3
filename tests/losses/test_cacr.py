"""Contrastive attraction and repulsion: slow loops, closed forms, limits, one process against several."""

import itertools
import math
import pathlib

import pytest
import torch
from support.forks import on_ranks, succeed
from torch import Tensor
from torch.nn import functional as F

from fasttrain.engine.ranks import Ranks
from fasttrain.losses.cacr import QueueCACR, cacr
from fasttrain.losses.queue import queue_terms


def rows(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def views(v: int, n: int, d: int) -> Tensor:
    """Views of an image are nearer to each other than to other images'."""
    return F.normalize(rows(n, d, seed=1) + 0.7 * rows(v, n, d, seed=2), dim=-1).requires_grad_()


def distance(u: Tensor, v: Tensor) -> Tensor:
    return (u - v).square().sum()


def weighted(d: list[Tensor], sharpness: float) -> Tensor:
    """Their mean, weighted by softmax(sharpness · d)."""
    every = torch.stack(d)
    return ((sharpness * every).softmax(0) * every).sum()


def slow(z: Tensor, near: float, far: float) -> tuple[Tensor, Tensor]:
    """An image and a view at a time."""
    v, n = z.shape[:2]
    attraction = [
        weighted([distance(z[a, i], z[b, i]) for b in range(v) if b != a], near) for a in range(v) for i in range(n)
    ]
    pairs = list(itertools.combinations(range(v), 2))
    repulsion = [
        -weighted([distance(z[a, i], z[b, j]) for j in range(n) if j != i], -far) for a, b in pairs for i in range(n)
    ]
    return torch.stack(attraction).mean(), torch.stack(repulsion).mean()


def assert_same(ours: Tensor, expected: Tensor, z: Tensor, atol: float = 1e-11) -> None:
    """Equal values, and gradients but for what points along a row: ‖z‖² is 1, whether it is said or not."""
    assert torch.allclose(ours, expected, atol=atol)
    gradients = (torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in (ours, expected))
    one, other = (gradient - (gradient * z).sum(-1, keepdim=True) * z for gradient in gradients)
    assert torch.allclose(one, other, atol=atol)
    assert one.abs().max() > 1e-3


@pytest.mark.parametrize(("near", "far"), [(1.0, 0.9), (0.0, 0.0), (3.0, 20.0)])
@pytest.mark.parametrize(("v", "n"), [(2, 2), (3, 5), (5, 4)])
def test_value_and_gradient(v: int, n: int, near: float, far: float) -> None:
    z = views(v, n, 8)
    ours, expected = cacr(z, near, far), slow(z, near, far)
    assert_same(ours[1], expected[1], z)
    assert_same(ours[0], expected[0], z)


def test_closed_forms() -> None:
    """Every image on an axis of its own with equal views, and all rows alike."""
    apart, alike = torch.eye(4, dtype=torch.float64).expand(3, 4, 4), rows(1, 1, 8).expand(3, 4, 8)
    assert [float(x) for x in cacr(apart, 1.0, 2.0)] == pytest.approx([0, -2], abs=1e-12)
    assert [float(x) for x in cacr(alike, 1.0, 2.0)] == pytest.approx([0, 0], abs=1e-12)


def test_without_sharpness_all_pairs_weigh_the_same() -> None:
    z = views(3, 6, 8).detach()
    d = torch.cdist(z.transpose(0, 1), z.transpose(0, 1)).square()  # (N, V, V)
    near, apart = cacr(z, 0.0, 0.0)
    assert float(near) == pytest.approx(float(d.sum() / (6 * 3 * 2)), abs=1e-12)
    other = ~torch.eye(6, dtype=torch.bool)
    means = [torch.cdist(z[a], z[b]).square()[other].mean() for a, b in itertools.combinations(range(3), 2)]
    assert float(apart) == pytest.approx(-float(torch.stack(means).mean()), abs=1e-12)


def test_the_sharpest_weights_are_on_the_furthest_positive_and_the_nearest_negative() -> None:
    z = views(4, 6, 8).detach()
    near, apart = cacr(z, 1e6, 1e6)
    d = torch.cdist(z.transpose(0, 1), z.transpose(0, 1)).square()
    assert float(near) == pytest.approx(float(d.amax(2).mean()), abs=1e-9)
    nearest = [
        (torch.cdist(z[a], z[b]).square() + 9 * torch.eye(6)).amin(1).mean()
        for a, b in itertools.combinations(range(4), 2)
    ]
    assert float(apart) == pytest.approx(-float(torch.stack(nearest).mean()), abs=1e-9)


def test_rows_may_be_turned_and_permuted() -> None:
    z = views(4, 9, 16).detach()
    loss = torch.stack(cacr(z, 1.0, 2.0))
    for other in (z @ torch.linalg.qr(rows(16, 16, seed=5)).Q, z[:, torch.arange(9).flip(0)]):
        assert torch.allclose(torch.stack(cacr(other, 1.0, 2.0)), loss, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize(("near", "far"), [(1.0, 0.9), (0.0, 0.1), (3.0, 20.0)])
def test_over_a_queue_value_and_gradient(near: float, far: float, impl: str) -> None:
    """Of which the weights have none."""
    q, positives, queue = rows(5, 16, seed=1).requires_grad_(), rows(3, 5, 16, seed=2), rows(33, 16, seed=3)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(5):
        close = torch.stack([distance(q[i], positive[i]) for positive in positives])
        away = torch.stack([distance(q[i], key) for key in queue])
        a, b = (near * close).softmax(0).detach(), (-far * away).softmax(0).detach()
        total = total + ((a * close).sum() - (b * away).sum()) / 5
    (ours,) = queue_terms([QueueCACR(0.5 / far, positives, near)], q, positives[0], queue, impl)
    assert_same(ours, total, q)


def test_of_one_positive_and_no_sharpness_the_queue_repels_by_its_mean() -> None:
    q, k, queue = rows(5, 16, seed=1), rows(1, 5, 16, seed=2), rows(33, 16, seed=3)
    (ours,) = queue_terms([QueueCACR(0.5 / 1e-9, k, 1.0)], q, k[0], queue)
    assert float(ours) == pytest.approx(float(2 * (q @ queue.mean(0) - (q * k[0]).sum(1)).mean()), abs=1e-8)


def test_bad_numbers_do_not_come_out_plausible() -> None:
    for bad in (math.nan, math.inf):
        z = views(3, 6, 8).detach().clone()
        z[2, 1, 2] = bad
        assert not torch.stack(cacr(z, 1.0, 2.0)).sum().isfinite()


def _own_rows(folder: pathlib.Path) -> None:
    """One rank's share of a loss: its gradient, averaged over ranks as DDP does."""
    ranks = Ranks("cpu")
    whole = torch.load(folder / "inputs.pt")
    own = slice(ranks.rank * 12 // ranks.world_size, (ranks.rank + 1) * 12 // ranks.world_size)
    z = whole[:, own].clone().requires_grad_()
    loss = sum(cacr(z, 1.0, 2.0))
    loss.backward()
    torch.save((loss.detach(), z.grad / ranks.world_size), folder / f"rank{ranks.rank}.pt")
    ranks.close()


def test_ranks_with_rows_of_their_own_have_the_gradient_of_one(tmp_path: pathlib.Path) -> None:
    z = views(3, 12, 8)
    torch.save(z.detach(), tmp_path / "inputs.pt")
    expected = sum(cacr(z, 1.0, 2.0))
    expected.backward()
    succeed(on_ranks(tmp_path, 3, _own_rows, tmp_path))
    found = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(3)]
    assert torch.allclose(torch.stack([loss for loss, _ in found]).mean(), expected.detach(), atol=1e-12)
    assert torch.allclose(torch.cat([grad for _, grad in found], 1), z.grad, atol=1e-12)
