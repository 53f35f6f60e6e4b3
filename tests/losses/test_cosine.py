"""Terms over an image's own two views: slow loops, closed forms, a published implementation."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from fasttrain.losses.cosine import negative_cosine, spread, squared_distance

N, D = 7, 16


def rows(seed: int, count: int = N, width: int = D) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=1)


def test_negative_cosine_and_its_gradient_are_those_of_a_loop() -> None:
    q, k = rows(1).requires_grad_(), rows(2)
    loss = negative_cosine(q, k)
    loss.backward()
    numbers, others = q.detach().tolist(), k.tolist()
    slow = -sum(numbers[i][d] * others[i][d] for i in range(N) for d in range(D)) / N
    assert abs(float(loss.detach()) - slow) < 1e-12
    assert torch.allclose(q.grad, -k / N, atol=1e-14)


def test_squared_distance_and_its_gradient_are_those_of_the_differences() -> None:
    """The gradient along the sphere, as all that reaches a row before it is normalised."""
    x, k = rows(1).requires_grad_(), rows(2)
    q = F.normalize(3 * x, dim=1)
    loss, slow = squared_distance(q, k), (q - k).square().sum(1).mean()
    assert torch.allclose(loss, slow, atol=1e-13)
    gradients = [torch.autograd.grad(each, x, retain_graph=True)[0] for each in (loss, slow)]
    assert torch.allclose(*gradients, atol=1e-13)


def test_the_bounds_are_reached_by_equal_and_by_opposed_rows() -> None:
    q = rows(3)
    for k, cosine in ((q, 1.0), (-q, -1.0)):
        assert torch.allclose(negative_cosine(q, k), torch.tensor(-cosine).double(), atol=1e-13)
        assert torch.allclose(squared_distance(q, k), torch.tensor(2 - 2 * cosine).double(), atol=1e-13)


@pytest.mark.parametrize("term", [negative_cosine, squared_distance])
def test_targets_take_no_gradient(term: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    q, k = rows(4).requires_grad_(), rows(5).requires_grad_()
    term(q, k).backward()
    assert k.grad is None
    assert q.grad is not None


def test_spread_is_the_scaled_mean_of_each_dimension_s_deviation() -> None:
    z = rows(6, 40)
    assert torch.allclose(spread(z), z.std(0, correction=0).mean() * D**0.5, atol=1e-12)
    assert not spread(z.requires_grad_()).requires_grad


def test_spread_is_1_over_all_axes_and_0_where_all_have_collapsed() -> None:
    axes = torch.eye(D, dtype=torch.float64)
    assert torch.allclose(spread(torch.cat([axes, -axes])), torch.tensor(1.0).double(), atol=1e-12)
    assert spread(rows(7, 1).float().expand(512, -1)) < 1e-3


def test_negative_cosine_is_lightly_s() -> None:
    peer = pytest.importorskip("lightly.loss").NegativeCosineSimilarity()
    generator = torch.Generator().manual_seed(8)
    p, z = torch.randn(2, N, D, generator=generator, dtype=torch.float64)
    own = negative_cosine(F.normalize(p, dim=1), F.normalize(z, dim=1))
    assert torch.allclose(own, peer(p, z), atol=1e-12)
