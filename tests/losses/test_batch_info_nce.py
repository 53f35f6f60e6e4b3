"""InfoNCE against the keys of the batch: slow loops, closed forms, the queue's InfoNCE."""

import math

import pytest
import torch
from torch.nn import functional as F

from fasttrain.losses import batch
from fasttrain.losses.batch import batch_info_nce
from fasttrain.losses.queue import InfoNCE, queue_terms

IMPLS = ["reference", "cpu"]


def rows(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, 16, generator=generator, dtype=torch.float64), dim=1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
@pytest.mark.parametrize(("n", "m", "first"), [(1, 1, 0), (4, 12, 8), (7, 21, 0), (9, 9, 0)])
def test_value_and_gradient_are_those_of_a_loop(
    n: int, m: int, first: int, temperature: float, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "first_row", lambda count: first)
    q, keys = rows(n, 1).requires_grad_(), rows(m, 2).requires_grad_()
    loss = batch_info_nce(q, keys, temperature, impl)
    loss.backward()
    assert keys.grad is None
    value, gradient = 0.0, torch.zeros_like(q)
    for i in range(n):
        weights = [math.exp(float((q[i] @ keys[j]).detach()) / temperature) for j in range(m)]
        value -= math.log(weights[first + i] / sum(weights)) / n
        for j in range(m):
            p = weights[j] / sum(weights) - (j == first + i)
            gradient[i] += p * keys[j].detach() / temperature / n
    assert abs(float(loss.detach()) - value) < 1e-12
    assert torch.allclose(q.grad, gradient.detach(), atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_it_is_the_queue_s_info_nce_with_the_other_keys_as_queue(impl: str) -> None:
    q, keys = rows(6, 3).requires_grad_(), rows(6, 4)
    loss = batch_info_nce(q, keys, 0.2, impl)
    each = [
        queue_terms([InfoNCE(0.2)], q[i : i + 1], keys[i : i + 1], torch.cat([keys[:i], keys[i + 1 :]]))[0]
        for i in range(6)
    ]
    expected = torch.stack(each).mean()
    assert torch.allclose(loss, expected, atol=1e-12)
    assert torch.allclose(*(torch.autograd.grad(x, q)[0] for x in (loss, expected)), atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("m", "temperature"), [(2, 1.0), (4, 0.2), (9, 0.5)])
def test_closed_forms_of_distinct_and_of_equal_images(m: int, temperature: float, impl: str) -> None:
    axes = torch.eye(m, 16, dtype=torch.float64)
    distinct = math.log1p((m - 1) * math.exp(-1 / temperature))
    assert abs(float(batch_info_nce(axes, axes, temperature, impl)) - distinct) < 1e-12
    same = axes[:1].expand(m, -1)
    assert abs(float(batch_info_nce(same, same, temperature, impl)) - math.log(m)) < 1e-12


@pytest.mark.parametrize("impl", IMPLS)
def test_the_order_of_images_and_a_rotation_of_all_change_nothing(impl: str) -> None:
    q, keys = rows(8, 5), rows(8, 6)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    turn, _ = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)).double())
    loss = batch_info_nce(q, keys, 0.1, impl)
    assert torch.allclose(batch_info_nce(q[order], keys[order], 0.1, impl), loss, atol=1e-12)
    assert torch.allclose(batch_info_nce(q @ turn, keys @ turn, 0.1, impl), loss, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_number_does_not_come_out_plausible(bad: float, impl: str) -> None:
    q, keys = rows(4, 7), rows(4, 8)
    q[1, 2] = bad
    assert not batch_info_nce(q, keys, 0.2, impl).isfinite()
