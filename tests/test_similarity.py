"""The similarity losses against slow loops and closed-form gradients, in fp64."""

import math

import pytest
import torch
from torch.nn import functional as F

from kernels import similarity

SIZES = [(1, 1, 8), (3, 7, 16), (8, 63, 32), (16, 257, 128)]  # N, K, D


def rows(n, d, seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)


def inputs(n, k, d):
    return rows(n, d, 1).requires_grad_(), rows(n, d, 2), rows(k, d, 3)


def readout(x, keys, temperature):
    """lse_i = log Σ_j exp(x_i·Q_j/τ) and O_i = Σ_j softmax_j Q_j, one row and one key at a time."""
    lse, out = [], []
    for row in x:
        weights = [math.exp(float(row @ key) / temperature) for key in keys]
        lse.append(math.log(sum(weights)))
        out.append(sum(w / sum(weights) * key for w, key in zip(weights, keys, strict=True)))
    return torch.tensor(lse, dtype=torch.float64), torch.stack(out)


@pytest.mark.parametrize(("n", "k", "d"), SIZES)
@pytest.mark.parametrize("temperature", [0.07, 0.2, 10.0])
def test_info_nce_value_and_gradient(n, k, d, temperature):
    q, keys, queue = inputs(n, k, d)
    loss = similarity.info_nce(q, keys, queue, temperature)
    loss.backward()
    with torch.no_grad():
        lse, out = readout(q, queue, temperature)
        positive = (q * keys).sum(1) / temperature
        total = torch.logaddexp(positive, lse)
        p = (positive - total).exp()[:, None]
        gradient = ((p - 1) * keys + (1 - p) * out) / temperature / n
    assert torch.allclose(loss, (total - positive).mean(), atol=1e-12)
    assert torch.allclose(q.grad, gradient, atol=1e-12)


@pytest.mark.parametrize(("n", "k", "d"), SIZES)
@pytest.mark.parametrize("temperature", [0.07, 0.2, 10.0])
def test_queue_terms_value_and_gradient(n, k, d, temperature):
    q, keys, queue = inputs(n, k, d)
    consistency = similarity.queue_consistency(q, keys, queue, temperature)
    uniformity = similarity.queue_uniformity(q, queue, temperature)
    gradients = [torch.autograd.grad(loss, q)[0] for loss in (consistency, uniformity)]
    with torch.no_grad():
        (lse_q, out_q), (lse_k, out_k) = readout(q, queue, temperature), readout(keys, queue, temperature)
        mean = queue.mean(0)
        expected = ((keys - q) * out_k).sum(1) / temperature - lse_k + lse_q
        assert torch.allclose(consistency, expected.mean(), atol=1e-11)
        assert torch.allclose(uniformity, (lse_q - q @ mean / temperature - math.log(k)).mean(), atol=1e-11)
    assert torch.allclose(gradients[0], (out_q - out_k) / temperature / n, atol=1e-11)
    assert torch.allclose(gradients[1], (out_q - mean) / temperature / n, atol=1e-11)


@pytest.mark.parametrize("n", [2, 5, 33])
def test_batch_consistency_is_the_sum_over_pairs(n):
    q, keys, _ = inputs(n, 1, 16)
    loss = similarity.batch_consistency(q, keys)
    slow = sum((q[i] @ keys[j] - q[j] @ keys[i]) ** 2 for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    assert torch.allclose(loss, slow, atol=1e-13)
    fast, slow = torch.autograd.grad(loss, q)[0], torch.autograd.grad(slow, q)[0]
    assert torch.allclose(fast, slow, atol=1e-13)


def test_batch_consistency_is_zero_when_the_views_agree():
    q = rows(9, 16, 4)
    assert similarity.batch_consistency(q, q) < 1e-30
    assert similarity.batch_consistency(q, rows(9, 16, 5)) > 1e-3


@pytest.mark.parametrize(("n", "m", "first"), [(2, 2, 0), (4, 12, 8), (7, 21, 0)])
def test_batch_uniformity_leaves_the_own_key_out(n, m, first):
    q, keys = rows(n, 16, 6).requires_grad_(), rows(m, 16, 7)
    loss = similarity.batch_uniformity(q, keys, first, 0.2)
    slow = 0
    for i in range(n):
        s = torch.stack([q[i] @ keys[j] / 0.2 for j in range(m) if j != first + i])
        uniform = torch.full_like(s, 1 / (m - 1))
        slow = slow + F.kl_div(s.log_softmax(0), uniform, reduction="sum") / n
    assert torch.allclose(loss, slow, atol=1e-12)
    assert torch.allclose(*(torch.autograd.grad(x, q)[0] for x in (loss, slow)), atol=1e-12)


def test_uniformity_is_zero_only_for_equal_similarities():
    q = rows(3, 16, 8)
    equal = rows(1, 16, 9).expand(40, -1)
    assert similarity.queue_uniformity(q, equal, 0.01).abs() < 1e-12
    assert similarity.queue_uniformity(q, rows(40, 16, 9), 0.2) > 0.1
    assert similarity.batch_uniformity(q, equal, 0, 0.01).abs() < 1e-12


def test_consistency_over_the_queue_is_zero_for_equal_views():
    q, _, queue = inputs(5, 31, 16)
    assert similarity.queue_consistency(q, q.detach(), queue, 0.05).abs() < 1e-12


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_numbers_do_not_come_out_plausible(bad):
    q, keys, queue = (x.detach() for x in inputs(4, 9, 16))
    q[1, 2] = bad
    assert not similarity.info_nce(q, keys, queue, 0.1).isfinite()
    assert not similarity.queue_consistency(q, keys, queue, 0.1).isfinite()
    assert not similarity.queue_uniformity(q, queue, 0.1).isfinite()
    assert not similarity.batch_consistency(q, keys).isfinite()
    assert not similarity.batch_uniformity(q, keys, 0, 0.1).isfinite()


def test_small_temperature_stays_finite_in_fp32():
    q, keys, queue = (x.detach().float() for x in inputs(4, 63, 16))
    assert similarity.info_nce(q, keys, queue, 0.01).isfinite()
    assert similarity.info_nce(q, q, q, 0.01).isfinite()


def test_unknown_implementation_names_the_choices():
    q, keys, queue = inputs(2, 3, 4)
    with pytest.raises(ValueError, match=r"'magic'.*auto, reference"):
        similarity.info_nce(q, keys, queue, 0.1, impl="magic")
