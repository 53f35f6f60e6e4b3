"""The similarity losses against slow loops and closed-form gradients, in fp64."""

import math

import pytest
import torch
from torch.nn import functional as F

from fasttrain.kernels import similarity

IMPLS = ["reference", "cpu"]
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


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("n", "k", "d"), SIZES)
@pytest.mark.parametrize("temperature", [0.07, 0.2, 10.0])
def test_info_nce_value_and_gradient(n, k, d, temperature, impl):
    q, keys, queue = inputs(n, k, d)
    loss = similarity.info_nce(q, keys, queue, temperature, impl=impl)
    loss.backward()
    with torch.no_grad():
        lse, out = readout(q, queue, temperature)
        positive = (q * keys).sum(1) / temperature
        total = torch.logaddexp(positive, lse)
        p = (positive - total).exp()[:, None]
        gradient = ((p - 1) * keys + (1 - p) * out) / temperature / n
    assert torch.allclose(loss, (total - positive).mean(), atol=1e-12)
    assert torch.allclose(q.grad, gradient, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("n", "k", "d"), SIZES)
@pytest.mark.parametrize("temperature", [0.07, 0.2, 10.0])
def test_queue_terms_value_and_gradient(n, k, d, temperature, impl):
    q, keys, queue = inputs(n, k, d)
    consistency = similarity.queue_consistency(q, keys, queue, temperature, impl=impl)
    uniformity = similarity.queue_uniformity(q, queue, temperature, impl=impl)
    gradients = [torch.autograd.grad(loss, q)[0] for loss in (consistency, uniformity)]
    with torch.no_grad():
        (lse_q, out_q), (lse_k, out_k) = readout(q, queue, temperature), readout(keys, queue, temperature)
        mean = queue.mean(0)
        expected = ((keys - q) * out_k).sum(1) / temperature - lse_k + lse_q
        assert torch.allclose(consistency, expected.mean(), atol=1e-11)
        assert torch.allclose(uniformity, (lse_q - q @ mean / temperature - math.log(k)).mean(), atol=1e-11)
    assert torch.allclose(gradients[0], (out_q - out_k) / temperature / n, atol=1e-11)
    assert torch.allclose(gradients[1], (out_q - mean) / temperature / n, atol=1e-11)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("n", [2, 5, 33])
def test_batch_consistency_is_the_sum_over_pairs(n, impl):
    q, keys, _ = inputs(n, 1, 16)
    loss = similarity.batch_consistency(q, keys, impl=impl)
    slow = sum((q[i] @ keys[j] - q[j] @ keys[i]) ** 2 for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    assert torch.allclose(loss, slow, atol=1e-13)
    fast, slow = torch.autograd.grad(loss, q)[0], torch.autograd.grad(slow, q)[0]
    assert torch.allclose(fast, slow, atol=1e-13)


@pytest.mark.parametrize(("impl", "most"), [("reference", 1e-30), ("cpu", 1e-15)])  # the Gram form cancels
def test_batch_consistency_is_zero_when_the_views_agree(impl, most):
    q = rows(9, 16, 4)
    assert similarity.batch_consistency(q, q, impl=impl).abs() < most
    assert similarity.batch_consistency(q, rows(9, 16, 5), impl=impl) > 1e-3


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("n", "m", "first"), [(2, 2, 0), (4, 12, 8), (7, 21, 0)])
def test_batch_uniformity_leaves_the_own_key_out(n, m, first, impl):
    q, keys = rows(n, 16, 6).requires_grad_(), rows(m, 16, 7)
    loss = similarity.batch_uniformity(q, keys, first, 0.2, impl=impl)
    slow = 0
    for i in range(n):
        s = torch.stack([q[i] @ keys[j] / 0.2 for j in range(m) if j != first + i])
        uniform = torch.full_like(s, 1 / (m - 1))
        slow = slow + F.kl_div(s.log_softmax(0), uniform, reduction="sum") / n
    assert torch.allclose(loss, slow, atol=1e-12)
    assert torch.allclose(*(torch.autograd.grad(x, q)[0] for x in (loss, slow)), atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_uniformity_is_zero_only_for_equal_similarities(impl):
    q = rows(3, 16, 8)
    equal = rows(1, 16, 9).expand(40, -1)
    assert similarity.queue_uniformity(q, equal, 0.01, impl=impl).abs() < 1e-12
    assert similarity.queue_uniformity(q, rows(40, 16, 9), 0.2, impl=impl) > 0.1
    assert similarity.batch_uniformity(q, equal, 0, 0.01, impl=impl).abs() < 1e-12


@pytest.mark.parametrize("impl", IMPLS)
def test_consistency_over_the_queue_is_zero_for_equal_views(impl):
    q, _, queue = inputs(5, 31, 16)
    assert similarity.queue_consistency(q, q.detach(), queue, 0.05, impl=impl).abs() < 1e-12


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_numbers_do_not_come_out_plausible(bad, impl):
    q, keys, queue = (x.detach() for x in inputs(4, 9, 16))
    q[1, 2] = bad
    assert not similarity.info_nce(q, keys, queue, 0.1, impl=impl).isfinite()
    assert not similarity.queue_consistency(q, keys, queue, 0.1, impl=impl).isfinite()
    assert not similarity.queue_uniformity(q, queue, 0.1, impl=impl).isfinite()
    assert not similarity.batch_consistency(q, keys, impl=impl).isfinite()
    assert not similarity.batch_uniformity(q, keys, 0, 0.1, impl=impl).isfinite()


@pytest.mark.parametrize("impl", IMPLS)
def test_small_temperature_stays_finite_in_fp32(impl):
    q, keys, queue = (x.detach().float() for x in inputs(4, 63, 16))
    assert similarity.info_nce(q, keys, queue, 0.01, impl=impl).isfinite()
    assert similarity.info_nce(q, q, q, 0.01, impl=impl).isfinite()


def test_unknown_implementation_names_the_choices():
    q, keys, queue = inputs(2, 3, 4)
    with pytest.raises(ValueError, match=r"'magic'.*auto, reference, cpu, triton"):
        similarity.info_nce(q, keys, queue, 0.1, impl="magic")
    with pytest.raises(ValueError, match=r"'magic'.*auto, reference, cpu, triton"):
        similarity.batch_consistency(q, keys, impl="magic")


@pytest.mark.parametrize("temperature", [0.01, 0.2, 10.0])
def test_decoupled_leaves_the_positive_out(temperature):
    q, keys, queue = inputs(5, 33, 16)
    losses = [similarity.decoupled(q, keys, queue, temperature, impl=impl) for impl in IMPLS]
    slow = 0
    for i in range(5):
        negatives = torch.stack([q[i] @ key / temperature for key in queue])
        slow = slow + (negatives.exp().sum().log() - q[i] @ keys[i] / temperature) / 5
    for loss in losses:
        assert torch.allclose(loss, slow, atol=1e-10)
        assert torch.allclose(*(torch.autograd.grad(x, q, retain_graph=True)[0] for x in (loss, slow)), atol=1e-10)


@pytest.mark.parametrize("consistency", [None, 0.1, 0.3])
@pytest.mark.parametrize("uniformity", [None, 0.1, 0.3, 0.7])
@pytest.mark.parametrize("decoupled", [False, True])
def test_terms_that_share_a_pass_equal_each_term_alone(consistency, uniformity, decoupled):
    q, keys, queue = inputs(7, 65, 16)
    options = {"consistency_temperature": consistency, "uniformity_temperature": uniformity, "decoupled": decoupled}
    ours, alone = (similarity.queue_terms(q, keys, queue, 0.1, **options, impl=impl) for impl in ("cpu", "reference"))
    for name in ("contrast", "consistency", "uniformity"):
        value, expected = getattr(ours, name), getattr(alone, name)
        assert (value is None) == (expected is None)
        if value is not None:
            assert torch.allclose(value, expected, atol=1e-12)
            assert torch.allclose(*(torch.autograd.grad(x, q, retain_graph=True)[0] for x in (value, expected)))


@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize("queue_dtype", [torch.float32, torch.float16])
def test_losses_in_low_precision_stay_close_to_fp64(impl, queue_dtype):
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    q, keys, queue = (x.detach().float().to(device) for x in inputs(17, 130, 32))
    q.requires_grad_()
    options = {"consistency_temperature": 0.1, "uniformity_temperature": 0.2}
    ours = similarity.queue_terms(q, keys, queue.to(queue_dtype), 0.1, **options, impl=impl)
    exact = similarity.queue_terms(q.double(), keys.double(), queue.double(), 0.1, **options, impl="reference")
    for name in ("contrast", "consistency", "uniformity"):
        value, expected = getattr(ours, name), getattr(exact, name)
        assert value.dtype == torch.float32
        assert torch.allclose(value.double(), expected, atol=1e-5 if queue_dtype == torch.float32 else 5e-3)
        gradient, true = (torch.autograd.grad(x, q, retain_graph=True)[0].double() for x in (value, expected))
        assert (gradient - true).abs().max() <= (1e-5 if queue_dtype == torch.float32 else 1e-2) * true.abs().max()


@pytest.mark.parametrize("difference", [1.0, 1e-3, 1e-6])
def test_the_gram_form_keeps_its_digits_when_the_views_nearly_agree(difference):
    q = rows(200, 32, 1)
    keys = F.normalize(q + difference * rows(200, 32, 2), dim=1).float()
    q = q.float().requires_grad_()
    exact = similarity.batch_consistency(q.double(), keys.double(), impl="reference")
    loss = similarity.batch_consistency(q, keys, impl="cpu")
    assert torch.allclose(loss.double(), exact, rtol=1e-2 if difference < 1e-5 else 1e-6)
    gradient, true = (torch.autograd.grad(x, q)[0] for x in (loss, exact))
    assert (gradient - true).abs().max() <= 1e-3 * true.abs().max()


def test_gram_sums_of_parts_add_up_to_the_whole():
    q, keys, _ = inputs(12, 1, 16)
    parts = [similarity.gram(q[i : i + 4], keys[i : i + 4]) for i in (0, 4, 8)]
    total = similarity.Gram(*(torch.stack(x).sum(0) for x in zip(*parts, strict=True)))
    assert torch.allclose(similarity.gram_consistency(total, 12), similarity.batch_consistency(q, keys), atol=1e-14)
