"""A contrast with communities: a slow loop, limits, one process against several."""

import pathlib

import pytest
import torch
from support.forks import on_ranks, succeed
from torch import Tensor
from torch.nn import functional as F

from fasttrain.engine.ranks import Ranks
from fasttrain.losses.communities import community_contrast

IMPLS = ["reference", "auto"]


def rows(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)


def shares(n: int, c: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, c, generator=generator, dtype=torch.float64).mul(3).softmax(1)


@pytest.mark.parametrize("impl", IMPLS)
def test_contrast_value_and_gradient(impl: str) -> None:
    """Of five communities, of which some have no row."""
    a, b = rows(7, 8, 1).requires_grad_(), rows(7, 8, 2).requires_grad_()
    ra, rb = shares(7, 5, 3), shares(7, 5, 4)
    total = torch.zeros((), dtype=torch.float64)
    for x, y, r in ((a, b, rb), (b, a, ra)):
        community = r.argmax(1).tolist()
        centroid = {c: y[[j for j in range(7) if community[j] == c]].mean(0).detach() for c in set(community)}
        assert len(centroid) < 5
        for i in range(7):
            among = torch.stack([x[i] @ centroid[c] / 0.2 for c in centroid]).logsumexp(0)
            total = total + (among - x[i] @ centroid[community[i]] / 0.2) / 14
    ours = community_contrast(a, b, ra, rb, 0.2, impl)
    assert torch.allclose(ours, total, atol=1e-12)
    for one, other in zip(*(torch.autograd.grad(loss, (a, b)) for loss in (ours, total)), strict=True):
        assert torch.allclose(one, other, atol=1e-12)
        assert one.abs().max() > 0


@pytest.mark.parametrize("impl", IMPLS)
def test_where_each_row_is_a_community_it_is_the_contrast_of_views(impl: str) -> None:
    a, b = rows(6, 8, 1), rows(6, 8, 2)
    own = torch.eye(6, dtype=torch.float64)
    expected = F.cross_entropy(a @ b.T / 0.2, torch.arange(6)) + F.cross_entropy(b @ a.T / 0.2, torch.arange(6))
    assert torch.allclose(community_contrast(a, b, own, own, 0.2, impl), expected / 2, atol=1e-12)


def test_where_all_rows_are_one_community_there_is_nothing_to_tell_apart() -> None:
    a, b = rows(6, 8, 1), rows(6, 8, 2)
    alone = F.one_hot(torch.ones(6, dtype=torch.int64), 3).double()
    assert float(community_contrast(a, b, alone, alone, 0.2)) == pytest.approx(0, abs=1e-12)


def _own_rows(folder: pathlib.Path) -> None:
    ranks = Ranks("cpu")
    whole = torch.load(folder / "inputs.pt")
    own = slice(ranks.rank * 12 // ranks.world_size, (ranks.rank + 1) * 12 // ranks.world_size)
    inputs = [x[own].clone().requires_grad_() for x in whole]
    loss = _loss(*inputs)
    loss.backward()
    torch.save((loss.detach(), [x.grad / ranks.world_size for x in inputs[:2]]), folder / f"rank{ranks.rank}.pt")
    ranks.close()


def _loss(a: Tensor, b: Tensor, ra: Tensor, rb: Tensor) -> Tensor:
    return community_contrast(a, b, ra, rb, 0.2)


def test_ranks_with_rows_of_their_own_have_the_gradient_of_one(tmp_path: pathlib.Path) -> None:
    inputs = [rows(12, 8, 1), rows(12, 8, 2), shares(12, 4, 3), shares(12, 4, 4)]
    torch.save(inputs, tmp_path / "inputs.pt")
    for x in inputs[:2]:
        x.requires_grad_()
    expected = _loss(*inputs)
    expected.backward()
    succeed(on_ranks(tmp_path, 3, _own_rows, tmp_path))
    found = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(3)]
    assert torch.allclose(torch.stack([loss for loss, _ in found]).mean(), expected.detach(), atol=1e-12)
    for place, x in enumerate(inputs[:2]):
        assert torch.allclose(torch.cat([grads[place] for _, grads in found]), x.grad, atol=1e-12)
