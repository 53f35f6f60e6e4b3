"""NNCLR's contrast: a slow loop, closed forms, equivalences, several ranks."""

import math
import pathlib

import pytest
import torch
from support.forks import on_ranks, succeed
from torch import Tensor
from torch.nn import functional as F

from fasttrain.engine.ranks import Ranks
from fasttrain.kernels.similarity import nearest
from fasttrain.losses.neighbours import neighbour_contrast

IMPLS = ["reference", "cpu"]
SIZES = [(2, 4), (3, 8), (17, 16)]  # N, D


def rows(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)


def pairs(n: int, d: int) -> tuple[Tensor, Tensor]:
    """Neighbours, and predictions that are nearer to their own."""
    neighbours = rows(n, d, 1)
    return neighbours, F.normalize(neighbours + rows(n, d, 2), dim=1).requires_grad_()


def slow(neighbours: Tensor, p: Tensor, temperature: float, decoupled: bool, weighted: bool) -> Tensor:
    n, loss = len(p), torch.zeros((), dtype=p.dtype)
    alike = [(neighbours[i] @ p[i] / 0.5).exp().detach() for i in range(n)]
    for i in range(n):
        s = [neighbours[i] @ p[j] / temperature for j in range(n)]
        weight = 2 - n * alike[i] / sum(alike) if weighted else 1
        others = [x.exp() for j, x in enumerate(s) if j != i or not (decoupled or weighted)]
        loss = loss + (sum(others).log() - weight * s[i]) / n
    return loss


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("n", "d"), SIZES)
@pytest.mark.parametrize("temperature", [0.07, 0.5, 10.0])
@pytest.mark.parametrize(("decoupled", "weighted"), [(False, False), (True, False), (False, True), (True, True)])
def test_value_and_gradient(n: int, d: int, temperature: float, decoupled: bool, weighted: bool, impl: str) -> None:
    neighbours, p = pairs(n, d)
    ours = neighbour_contrast(neighbours, p, temperature, decoupled, weighted, impl)
    expected = slow(neighbours, p, temperature, decoupled, weighted)
    assert torch.allclose(ours, expected, atol=1e-11)
    gradients = [torch.autograd.grad(loss, p)[0] for loss in (ours, expected)]
    assert torch.allclose(*gradients, atol=1e-11)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("n", "temperature"), [(2, 1.0), (4, 0.2), (9, 0.1)])
def test_closed_forms(n: int, temperature: float, impl: str) -> None:
    apart = torch.eye(n, dtype=torch.float64)
    one_point = rows(1, 8, 3).expand(n, -1)
    own = math.log1p((n - 1) * math.exp(-1 / temperature))
    for z, expected in ((apart, own), (one_point, math.log(n))):
        assert float(neighbour_contrast(z, z, temperature, impl=impl)) == pytest.approx(expected, abs=1e-12)
    for z, expected in ((apart, math.log(n - 1) - 1 / temperature), (one_point, math.log(n - 1))):
        assert float(neighbour_contrast(z, z, temperature, True, impl=impl)) == pytest.approx(expected, abs=1e-12)
        assert float(neighbour_contrast(z, z, temperature, False, True, impl)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_it_is_softplus_of_the_decoupled_row(impl: str) -> None:
    neighbours, p = pairs(2, 8)
    s = neighbours @ p.T / 0.1
    gap = torch.stack([s[0, 1] - s[0, 0], s[1, 0] - s[1, 1]])
    assert torch.allclose(neighbour_contrast(neighbours, p, 0.1, True, impl=impl), gap.mean())
    assert torch.allclose(neighbour_contrast(neighbours, p, 0.1, impl=impl), F.softplus(gap).mean())


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_support_set_that_holds_the_batch_makes_it_cross_view_contrast(decoupled: bool) -> None:
    """What enqueueing before the look-up would lead to: a view finds itself."""
    z, p = pairs(9, 8)
    support = torch.cat([rows(20, 8, 5) * 0.5, z.flip(0)])
    found = support[nearest(z, support)]
    assert torch.equal(found, z)
    s = z @ p.T / 0.1
    own = s.diagonal()
    others = s.masked_fill(torch.eye(9, dtype=torch.bool), -math.inf).logsumexp(1)
    expected = others - own if decoupled else F.cross_entropy(s, torch.arange(9), reduction="none")
    assert torch.allclose(neighbour_contrast(found, p, 0.1, decoupled), expected.mean())


def test_neighbours_take_no_gradient() -> None:
    neighbours, p = pairs(4, 8)
    neighbours.requires_grad_()
    neighbour_contrast(neighbours, p, 0.1).backward()
    assert neighbours.grad is None
    assert p.grad.abs().min() > 0


def test_digits_are_kept_where_the_own_term_outweighs_the_others() -> None:
    apart = torch.eye(4).requires_grad_()
    loss = neighbour_contrast(torch.eye(4), apart, 0.02)
    assert float(loss.detach()) == pytest.approx(3 * math.exp(-50), rel=1e-4)


def test_one_image_has_nothing_to_be_told_from() -> None:
    with pytest.raises(ValueError, match="leaves none to compare with"):
        neighbour_contrast(rows(1, 8, 1), rows(1, 8, 2), 0.1)


FORMS = {"plain": {}, "decoupled": {"decoupled": True}, "weighted": {"weighted": True}}


def _share(folder: pathlib.Path, form: str) -> None:
    """One rank's share of the loss; its gradient averaged over ranks, as DDP does."""
    ranks = Ranks("cpu")
    neighbours, p = torch.load(folder / "inputs.pt")
    mine = slice(ranks.rank * 12 // ranks.world_size, (ranks.rank + 1) * 12 // ranks.world_size)
    own = p[mine].clone().requires_grad_()
    loss = neighbour_contrast(neighbours[mine], own, 0.1, **FORMS[form])
    loss.backward()
    torch.save((loss.detach(), own.grad / ranks.world_size), folder / f"rank{ranks.rank}.pt")
    ranks.close()


@pytest.mark.parametrize(("form", "world_size"), [("plain", 2), ("decoupled", 4), ("weighted", 2)])
def test_several_ranks_equal_one_process(tmp_path: pathlib.Path, form: str, world_size: int) -> None:
    neighbours, p = (x.detach() for x in pairs(12, 8))
    torch.save((neighbours, p), tmp_path / "inputs.pt")
    succeed(on_ranks(tmp_path, world_size, _share, tmp_path, form))
    whole = p.clone().requires_grad_()
    loss = neighbour_contrast(neighbours, whole, 0.1, **FORMS[form])
    loss.backward()
    parts = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(world_size)]
    assert torch.allclose(torch.stack([part[0] for part in parts]).mean(), loss.detach(), atol=1e-12)
    assert torch.allclose(torch.cat([part[1] for part in parts]), whole.grad, atol=1e-12)
