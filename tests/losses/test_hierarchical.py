"""Views that grow stronger: a slow loop, equivalences, and the direction of the gradient."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fasttrain.losses.hierarchical import hierarchical
from fasttrain.losses.queue import InfoNCE, queue_terms


def rows(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def inputs(levels: int = 3, n: int = 5, k: int = 33, d: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    keys = rows(n, d, seed=2)
    q = F.normalize(keys + rows(levels, n, d, seed=1), dim=2)
    return q.requires_grad_(), keys, rows(k, d, seed=3)


def distribution(q: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    return torch.stack([q @ key, *(q @ other for other in queue)]).div(temperature).softmax(0)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("temperature", [0.05, 0.2, 5.0])
@pytest.mark.parametrize("levels", [2, 3, 4])
def test_value_and_gradient(levels: int, temperature: float, impl: str) -> None:
    q, keys, queue = inputs(levels)
    contrast, led, _ = hierarchical(q, keys, queue, temperature, impl)
    total, own = torch.zeros(2, dtype=torch.float64).unbind()
    for i in range(5):
        p = [distribution(q[level, i], keys[i], queue, temperature) for level in range(levels)]
        own = own - p[0][0].log() / 5
        for weak, strong in itertools.pairwise(p):
            total = total - (weak.detach() * strong.log()).sum() / 2 / 5
    for ours, expected in ((contrast, own), (led, total)):
        assert torch.allclose(ours, expected, atol=1e-10)
        one, other = (torch.autograd.grad(loss, q, retain_graph=True)[0] for loss in (ours, expected))
        assert torch.allclose(one, other, atol=1e-10)
        assert one.abs().max() > 0


def test_the_weakest_query_is_led_by_none_and_learns_from_its_key_alone() -> None:
    q, keys, queue = inputs()
    contrast, led, _ = hierarchical(q, keys, queue, 0.2)
    assert not torch.autograd.grad(led, q, retain_graph=True)[0][0].any()
    assert not torch.autograd.grad(contrast, q, retain_graph=True)[0][1:].any()
    assert torch.allclose(contrast, queue_terms([InfoNCE(0.2)], q[0], keys, queue)[0], atol=1e-12)


def test_of_equal_views_the_rest_is_the_entropy() -> None:
    q, keys, queue = inputs()
    same = q[:1].detach().expand(3, -1, -1)
    _, led, _ = hierarchical(same, keys, queue, 0.2)
    p = [distribution(same[0, i], keys[i], queue, 0.2) for i in range(5)]
    entropy = torch.stack([torch.special.entr(each).sum() for each in p]).mean()
    assert float(led) == pytest.approx(float(entropy), abs=1e-12)


def test_figures_are_those_of_the_weakest_query() -> None:
    q, keys, queue = inputs()
    _, _, figures = hierarchical(q, keys, queue, 0.2)
    assert float(figures["positive_similarity"]) == pytest.approx(float((q[0].detach() * keys).sum(1).mean()))
    nearest = (q[0].detach() @ queue.T).amax(1)
    assert float(figures["contrastive_accuracy"]) == float(((q[0].detach() * keys).sum(1) > nearest).double().mean())
