"""Sinkhorn's assignments, in fp64: against the algorithm as it is written, and closed forms."""

import pathlib

import pytest
import torch
from support.forks import on_ranks, succeed
from torch import Tensor
from torch.nn import functional as F

from fasttrain.engine.ranks import Ranks
from fasttrain.losses import reference, swapped
from fasttrain.losses.swapped import sinkhorn
from fasttrain.system.collectives import max_over_ranks

TRUE, FALSE = torch.tensor(True), torch.tensor(False)


def scores(images: int = 12, prototypes: int = 5, seed: int = 0) -> Tensor:
    """Cosines (2, N, P) of two views."""
    generator = torch.Generator().manual_seed(seed)
    rows = F.normalize(torch.randn(2, images, 3, generator=generator, dtype=torch.float64), dim=2)
    generator.manual_seed(99)
    return rows @ F.normalize(torch.randn(prototypes, 3, generator=generator, dtype=torch.float64), dim=1).T


@pytest.mark.parametrize(("images", "prototypes"), [(12, 5), (3, 40), (1, 1)])
@pytest.mark.parametrize("epsilon", [0.05, 0.5])
def test_assignments_are_the_algorithm_s_of_each_view(images: int, prototypes: int, epsilon: float) -> None:
    given = scores(images, prototypes)
    expected = torch.stack([reference.sinkhorn(view, epsilon) for view in given])
    assert torch.allclose(sinkhorn(given, epsilon), expected, atol=1e-13)
    assert torch.allclose(sinkhorn(given + 1000, epsilon), expected, atol=1e-8)  # the exponential would overflow
    assert sinkhorn(given.float(), 0.01).isfinite().all()


def test_older_images_fill_the_prototypes_where_they_count() -> None:
    given, older = scores(), scores(30, seed=1)
    joint = torch.stack([reference.sinkhorn(view, 0.05)[:12] for view in torch.cat([given, older], 1)])
    assert torch.allclose(sinkhorn(given, 0.05, older, TRUE), joint, atol=1e-13)
    assert torch.allclose(sinkhorn(given, 0.05, older, FALSE), sinkhorn(given, 0.05), atol=1e-13)
    assert torch.allclose(sinkhorn(given, 0.05, older[:, :0], TRUE), sinkhorn(given, 0.05), atol=1e-13)


def test_rows_sum_to_one_and_prototypes_are_used_evenly_as_iterations_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    given, uneven = scores(), []
    for iterations in (1, 3, 300):
        monkeypatch.setattr(swapped, "ITERATIONS", iterations)
        plan = sinkhorn(given, 0.5)
        assert torch.allclose(plan.sum(2), torch.ones(2, 12, dtype=torch.float64), atol=1e-12)
        uneven.append(float((plan.sum(1) - 12 / 5).abs().max()))
    assert uneven[0] > uneven[1] > uneven[2]
    assert uneven[2] < 1e-9


def test_closed_forms() -> None:
    assert torch.allclose(sinkhorn(torch.full((2, 4, 8), 0.3), 0.05), torch.tensor(1 / 8))
    order = torch.randperm(5)
    assert torch.allclose(sinkhorn(scores()[:, :, order], 0.05), sinkhorn(scores(), 0.05)[:, :, order], atol=1e-13)
    best = torch.eye(6)[torch.randperm(6)][None]
    assert torch.allclose(sinkhorn(best, 0.02), best, atol=1e-6)


def test_assignments_take_no_gradient_and_pass_on_what_is_not_finite() -> None:
    given = scores().requires_grad_()
    assert not sinkhorn(given, 0.05).requires_grad
    broken = given.detach().clone()
    broken[0, 0, 0] = torch.nan
    assert sinkhorn(broken, 0.05)[0].isnan().any()


def _share(folder: pathlib.Path) -> None:
    ranks = Ranks("cpu")
    given, older = torch.load(folder / "scores.pt")
    at = slice(ranks.rank * 12 // ranks.world_size, (ranks.rank + 1) * 12 // ranks.world_size)
    plan = sinkhorn(given[:, at], 0.05, older[:, ranks.rank :: ranks.world_size], TRUE)
    torch.save(plan, folder / f"plan{ranks.rank}.pt")
    assert max_over_ranks(torch.tensor([ranks.rank, -ranks.rank])).tolist() == [ranks.world_size - 1, 0]
    ranks.close()


def test_ranks_assign_their_shares_as_one_process_assigns_all(tmp_path: pathlib.Path) -> None:
    given, older = scores(), scores(7, seed=1)  # seven older ones can't be shared out evenly
    torch.save((given, older), tmp_path / "scores.pt")
    succeed(on_ranks(tmp_path, 2, _share, tmp_path))
    parts = torch.cat([torch.load(tmp_path / f"plan{rank}.pt") for rank in range(2)], 1)
    assert torch.allclose(parts, sinkhorn(given, 0.05, older, TRUE), atol=1e-12)
