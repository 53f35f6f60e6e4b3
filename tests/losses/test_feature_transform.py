"""Feature transformation: its formulas, its limits, and that it is drawn alike wherever and whenever it is drawn."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fasttrain.jobs.train import seed_step
from fasttrain.losses.feature_transform import (
    Transform,
    bounded,
    draw,
    drawn_for,
    mixed_queue,
    transformed_contrast,
    transformed_pair,
)
from fasttrain.losses.queue import Decoupled, DecoupledWeighted, InfoNCE, queue_terms


def rows(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)


def inputs(n: int = 6, k: int = 40, d: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    return rows(n, d, 1).requires_grad_(), rows(n, d, 2), rows(k, d, 3)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("contrast", [InfoNCE(0.2), Decoupled(0.07)])
def test_value_and_gradient(contrast: InfoNCE, impl: str) -> None:
    q, keys, queue = inputs()
    drawn = Transform(1.4, 0.3, torch.randperm(40, generator=torch.Generator().manual_seed(4)))
    ours, _ = transformed_contrast(contrast, q, keys, queue, drawn, impl)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(6):
        hard, key = 1.4 * q[i] - 0.4 * keys[i], 1.4 * keys[i] - 0.4 * q[i]
        negatives = [0.3 * queue[j] + 0.7 * queue[int(drawn.order_K[j])] for j in range(40)]
        s = torch.stack([hard @ negative for negative in negatives]) / contrast.temperature
        positive = hard @ key / contrast.temperature
        among = torch.cat([s, positive[None]]) if isinstance(contrast, InfoNCE) else s
        total = total + (among.logsumexp(0) - positive) / 6
    assert torch.allclose(ours, total, atol=1e-12)
    one, other = (torch.autograd.grad(loss, q)[0] for loss in (ours, total))
    assert torch.allclose(one, other, atol=1e-11)


def test_what_is_not_moved_and_not_mixed_is_the_contrast_to_the_bit() -> None:
    q, keys, queue = (x.float() for x in inputs())
    drawn = Transform(1.0, 1.0, torch.arange(40).flip(0))
    for contrast in (InfoNCE(0.2), Decoupled(0.2), DecoupledWeighted(0.2)):
        ours, _ = transformed_contrast(contrast, q, keys, queue, drawn)
        assert torch.equal(ours, queue_terms([contrast], q, keys, queue)[0])


@pytest.mark.parametrize("weight", [1.0, 1.5, 2.0])
def test_positives_are_moved_apart_as_their_similarity_says(weight: float) -> None:
    q, keys, _ = inputs()
    s = (q * keys).sum(1)
    hard, key = transformed_pair(q, keys, weight)
    assert torch.allclose((hard * key).sum(1), s + 2 * weight * (1 - weight) * (1 - s), atol=1e-12)
    s = torch.tensor([0.6], dtype=torch.float64)
    pair = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.stack([s, (1 - s**2).sqrt()], 1)
    assert float((lambda a, b: a @ b.T)(*transformed_pair(*pair, 1.5))) == pytest.approx(0, abs=1e-12)


def test_extrapolation_is_bounded_by_what_views_have_in_common() -> None:
    """Rows m + δ and m + cδ of many images: at the bound differences grow half as fast as without extrapolation."""
    m, c = F.one_hot(torch.tensor(0), 16).double(), 0.4
    delta = 1e-3 * torch.randn(400, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    delta[:, 0] = 0
    own = c * delta + (1 - c**2) ** 0.5 * delta.roll(1, 0)
    q, k = F.normalize(m + delta, dim=1), F.normalize(m + own, dim=1)
    mean = k.mean(0).expand(400, 16)
    weight = float(bounded(2.0, q, k, mean))
    assert weight == pytest.approx(1 + c / (2 * (1 - c)), rel=0.05)
    drawn_to = weight**2 + (1 - weight) ** 2
    assert drawn_to * c - (drawn_to - weight) == pytest.approx(c / 2, rel=0.2)
    assert float(bounded(1.2, q, k, mean)) == pytest.approx(1.2)


def test_nothing_in_common_or_nothing_apart_is_bounded_too() -> None:
    q, k, _ = inputs()
    mean = k.mean(0).expand(6, 16)
    assert float(bounded(2.0, q, -q.detach(), mean)) == 1
    same = F.one_hot(torch.zeros(6, dtype=torch.long), 16).double()
    assert float(bounded(2.0, same, same, same)) == 1
    assert float(bounded(1.7, q, q, mean)) == pytest.approx(1.7)


def test_a_query_moves_as_its_negatives_let_it_once_the_queue_is_full() -> None:
    """The negatives as the contrast weighs them: a query that can't be told from many of them isn't moved."""
    q, k, queue = (x.float() for x in inputs())
    k = F.normalize(q.detach() + 0.2 * k, dim=1)
    near = F.normalize(q.detach().repeat(7, 1)[:40] + 0.2 * queue, dim=1)
    full, filling = torch.tensor(True), torch.tensor(False)
    seed_step(3, 7, rank=0)
    free, figures = drawn_for(InfoNCE(0.05), q, k, queue, full)
    assert free.positive > 1.2
    assert figures["extrapolation"] == free.positive
    assert float(figures["positive_similarity"]) == pytest.approx(float((q * k).sum(1).mean().detach()))
    for negatives, is_full in ((near, full), (queue, filling)):
        seed_step(3, 7, rank=0)
        held, _ = drawn_for(InfoNCE(0.05), q, k, negatives, is_full)
        assert held.positive < 1.05
        assert held.negative == free.negative


def test_mixed_negatives_are_new_rows_and_keep_their_mean_and_dtype() -> None:
    _, _, queue = inputs()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(4))
    mixed = mixed_queue(queue, 0.3, order)
    assert torch.allclose(mixed.mean(0), queue.mean(0), atol=1e-12)
    assert mixed_queue(queue.bfloat16(), 0.3, order).dtype == torch.bfloat16
    assert (mixed[order != torch.arange(40)].norm(dim=1) < 1).all()


def test_draws_are_of_their_ranges_and_of_the_step_alone() -> None:
    found = []
    for step in range(200):
        seed_step(3, step, rank=0)
        found.append(draw(16, torch.device("cpu")))
    positives, negatives = (torch.tensor([each[place] for each in found]) for place in (0, 1))
    assert positives.min() > 1
    assert positives.max() < 2
    assert float(positives.mean()) == pytest.approx(1.5, abs=0.05)
    assert float(positives.var()) == pytest.approx(1 / 20, abs=0.015)
    assert float(negatives.mean()) == pytest.approx(0.5, abs=0.06)
    assert float(negatives.var()) == pytest.approx(1 / (4 * 4.2), abs=0.015)
    assert all(torch.equal(each.order_K.sort().values, torch.arange(16)) for each in found)
    seed_step(3, 7, rank=5)
    again = draw(16, torch.device("cpu"))
    assert again[:2] == found[7][:2]
    assert torch.equal(again.order_K, found[7].order_K)


def test_scores_are_of_what_the_contrast_sees_and_figures_of_what_there_is() -> None:
    q, keys, queue = inputs()
    drawn = Transform(1.4, 0.3, torch.arange(40).roll(1))
    _, figures = transformed_contrast(InfoNCE(0.2), q, keys, queue, drawn)
    assert not any(figure.requires_grad for figure in figures.values())
    hard, key = transformed_pair(q, keys, 1.4)
    s = hard @ mixed_queue(queue, 0.3, drawn.order_K).T
    assert float(figures["score_positive"]) == pytest.approx(float((hard * key).sum(1).mean().detach()))
    assert float(figures["score_negative"]) == pytest.approx(float(s.mean().detach()))
    assert float(figures["score_negative_variance"]) == pytest.approx(float(s.var(1, correction=0).mean()))
    assert float(figures["score_negative_log_exp"]) == pytest.approx(float((s / 0.2).exp().mean(1).log().mean()))
