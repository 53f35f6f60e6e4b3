"""The similarity losses against slow loops and closed-form gradients, in fp64."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fasttrain.losses import batch
from fasttrain.losses import queue as queue_losses
from fasttrain.losses.batch import Gram, batch_consistency, batch_uniformity, gram, gram_consistency, worst_compactness
from fasttrain.losses.queue import Decoupled, InfoNCE, QueueConsistency, QueueTerm, QueueUniformity, queue_terms
from fasttrain.losses.regularisers import Regularisers, regularised
from fasttrain.system.errors import UserError

IMPLS = ["reference", "cpu"]
SIZES = [(1, 1, 8), (3, 7, 16), (8, 63, 32), (16, 257, 128)]  # N, K, D


def rows(n: int, d: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)


def inputs(n: int, k: int, d: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return rows(n, d, 1).requires_grad_(), rows(n, d, 2), rows(k, d, 3)


def value(
    term: QueueTerm, q: torch.Tensor, keys: torch.Tensor, queue: torch.Tensor, impl: str = "auto"
) -> torch.Tensor:
    """A term alone."""
    return queue_terms([term], q, keys, queue, impl)[0]


def readout(x: torch.Tensor, keys: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
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
def test_info_nce_value_and_gradient(n: int, k: int, d: int, temperature: float, impl: str) -> None:
    q, keys, queue = inputs(n, k, d)
    loss = value(InfoNCE(temperature), q, keys, queue, impl)
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
def test_queue_terms_value_and_gradient(n: int, k: int, d: int, temperature: float, impl: str) -> None:
    q, keys, queue = inputs(n, k, d)
    consistency = value(QueueConsistency(temperature, temperature), q, keys, queue, impl)
    uniformity = value(QueueUniformity(temperature), q, q, queue, impl)
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
@pytest.mark.parametrize("within", [False, True])
def test_batch_consistency_is_the_sum_over_pairs(n: int, impl: str, within: bool) -> None:
    q, keys, _ = inputs(n, 1, 16)
    loss = batch_consistency(q, keys, within, impl)
    slow = torch.zeros((), dtype=torch.float64)
    for i, j in itertools.permutations(range(n), 2):
        difference = q[i] @ q[j] - keys[i] @ keys[j] if within else q[i] @ keys[j] - q[j] @ keys[i]
        slow = slow + difference**2 / (n * (n - 1))
    assert torch.allclose(loss, slow, atol=1e-13)
    fast, slow = torch.autograd.grad(loss, q)[0], torch.autograd.grad(slow, q)[0]
    assert torch.allclose(fast, slow, atol=1e-13)


@pytest.mark.parametrize(("impl", "most"), [("reference", 1e-30), ("cpu", 1e-15)])  # the Gram form cancels
@pytest.mark.parametrize("within", [False, True])
def test_batch_consistency_is_zero_when_the_views_agree(impl: str, most: float, within: bool) -> None:
    q = rows(9, 16, 4)
    assert batch_consistency(q, q, within, impl).abs() < most
    assert batch_consistency(q, rows(9, 16, 5), within, impl) > 1e-3
    rotated = q @ torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)).double())[0]
    assert (batch_consistency(q, rotated, within, impl).abs() < most) == within  # the same similarities in each view


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("n", "m", "first"), [(2, 2, 0), (4, 12, 8), (7, 21, 0)])
def test_batch_uniformity_leaves_the_own_key_out(
    n: int, m: int, first: int, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "first_row", lambda count: first)
    q, keys = rows(n, 16, 6).requires_grad_(), rows(m, 16, 7)
    loss = batch_uniformity(q, keys, 0.2, impl)
    slow = 0
    for i in range(n):
        s = torch.stack([q[i] @ keys[j] / 0.2 for j in range(m) if j != first + i])
        uniform = torch.full_like(s, 1 / (m - 1))
        slow = slow + F.kl_div(s.log_softmax(0), uniform, reduction="sum") / n
    assert torch.allclose(loss, slow, atol=1e-12)
    assert torch.allclose(*(torch.autograd.grad(x, q)[0] for x in (loss, slow)), atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_uniformity_is_zero_only_for_equal_similarities(impl: str) -> None:
    q = rows(3, 16, 8)
    equal = rows(1, 16, 9).expand(40, -1)
    assert value(QueueUniformity(0.01), q, q, equal, impl).abs() < 1e-12
    assert value(QueueUniformity(0.2), q, q, rows(40, 16, 9), impl) > 0.1
    assert batch_uniformity(q, equal, 0.01, impl).abs() < 1e-12


@pytest.mark.parametrize("impl", IMPLS)
def test_consistency_over_the_queue_is_zero_for_equal_views(impl: str) -> None:
    q, _, queue = inputs(5, 31, 16)
    assert value(QueueConsistency(0.05, 0.05), q, q.detach(), queue, impl).abs() < 1e-12


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_numbers_do_not_come_out_plausible(bad: float, impl: str) -> None:
    q, keys, queue = (x.detach() for x in inputs(4, 9, 16))
    q[1, 2] = bad
    assert not value(InfoNCE(0.1), q, keys, queue, impl).isfinite()
    assert not value(QueueConsistency(0.1, 0.1), q, keys, queue, impl).isfinite()
    assert not value(QueueUniformity(0.1), q, q, queue, impl).isfinite()
    assert not batch_consistency(q, keys, impl=impl).isfinite()
    assert not batch_uniformity(q, keys, 0.1, impl).isfinite()


@pytest.mark.parametrize("impl", IMPLS)
def test_small_temperature_stays_finite_in_fp32(impl: str) -> None:
    q, keys, queue = (x.detach().float() for x in inputs(4, 63, 16))
    assert value(InfoNCE(0.01), q, keys, queue, impl).isfinite()
    assert value(InfoNCE(0.01), q, q, q, impl).isfinite()


def test_unknown_implementation_names_the_choices() -> None:
    q, keys, queue = inputs(2, 3, 4)
    with pytest.raises(ValueError, match=r"'magic'.*auto, reference, cpu, triton"):
        value(InfoNCE(0.1), q, keys, queue, "magic")
    with pytest.raises(ValueError, match=r"'magic'.*auto, reference, cpu, triton"):
        batch_consistency(q, keys, impl="magic")


@pytest.mark.parametrize("temperature", [0.01, 0.2, 10.0])
def test_decoupled_leaves_the_positive_out(temperature: float) -> None:
    q, keys, queue = inputs(5, 33, 16)
    losses = [value(Decoupled(temperature), q, keys, queue, impl) for impl in IMPLS]
    slow = 0
    for i in range(5):
        negatives = torch.stack([q[i] @ key / temperature for key in queue])
        slow = slow + (negatives.exp().sum().log() - q[i] @ keys[i] / temperature) / 5
    for loss in losses:
        assert torch.allclose(loss, slow, atol=1e-10)
        assert torch.allclose(*(torch.autograd.grad(x, q, retain_graph=True)[0] for x in (loss, slow)), atol=1e-10)


@pytest.mark.parametrize("consistency", [None, 0.1, 0.3])
@pytest.mark.parametrize("uniformity", [None, 0.1, 0.3, 0.7])
@pytest.mark.parametrize("contrast", [InfoNCE, Decoupled])
def test_terms_that_share_a_pass_equal_each_term_alone(
    consistency: float | None, uniformity: float | None, contrast: type[Decoupled], monkeypatch: pytest.MonkeyPatch
) -> None:
    q, keys, queue = inputs(7, 65, 16)
    terms = [contrast(0.1)]
    terms += [QueueConsistency(consistency, consistency)] if consistency else []
    terms += [QueueUniformity(uniformity)] if uniformity else []
    passes = []

    def counted(x: torch.Tensor, *arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        passes.append(len(x))
        return whole(x, *arguments, **options)

    whole = queue_losses.readout_with_maximum
    monkeypatch.setattr(queue_losses, "readout_with_maximum", counted)
    ours = queue_terms(terms, q, keys, queue, "cpu")
    sides = {side for term in terms for side in term.sides}
    assert passes == [7 * len(sides)]  # the queue is read once, and no side twice
    for term, one in zip(terms, ours, strict=True):
        expected = value(term, q, keys, queue, "reference")
        assert torch.allclose(one, expected, atol=1e-12)
        assert torch.allclose(*(torch.autograd.grad(x, q, retain_graph=True)[0] for x in (one, expected)))


# Value, norm of the gradient and one of its elements of every term: what they were when the losses were functions of
# kernels/similarity, with all options in one call.
AS_BEFORE = {
    "info_nce": (5.5891736596945725, 3.2813891721804125, 0.20087274274377295),
    "decoupled": (5.57849264553444, 3.312555851913347, 0.20089207288474048),
    "consistency": (1.2381412157895086, 0.6312327377036413, 0.010330192221062582),
    "uniformity": (0.17355645523313964, 0.1179482342107288, -0.004805414011433547),
    "batch_consistency": (0.15353772425041995, 0.15729424573674478, -0.03281039314612941),
    "batch_uniformity": (0.19802772261171478, 0.16453291372533704, -0.03774399711184272),
}


def test_every_term_is_what_it_was() -> None:
    generator = torch.Generator().manual_seed(7)
    sizes = (12, 12, 40)
    q, keys, queue = (F.normalize(torch.randn(n, 16, generator=generator, dtype=torch.float64), dim=1) for n in sizes)
    q.requires_grad_()
    names = ("info_nce", "decoupled", "consistency", "uniformity")
    terms = [InfoNCE(0.1), Decoupled(0.1), QueueConsistency(0.2, 0.2), QueueUniformity(0.4)]
    values = dict(zip(names, queue_terms(terms, q, keys, queue), strict=True))
    values |= {"batch_consistency": batch_consistency(q, keys), "batch_uniformity": batch_uniformity(q, keys, 0.4)}
    for name, loss in values.items():
        (gradient,) = torch.autograd.grad(loss, q, retain_graph=True)
        found = float(loss.detach()), float(gradient.norm()), float(gradient[3, 5])
        assert found == pytest.approx(AS_BEFORE[name], rel=1e-12), name


@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize("queue_dtype", [torch.float32, torch.float16])
def test_losses_in_low_precision_stay_close_to_fp64(impl: str, queue_dtype: torch.dtype) -> None:
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    q, keys, queue = (x.detach().float().to(device) for x in inputs(17, 130, 32))
    q.requires_grad_()
    terms = [InfoNCE(0.1), QueueConsistency(0.1, 0.1), QueueUniformity(0.2)]
    ours = queue_terms(terms, q, keys, queue.to(queue_dtype), impl)
    exact = queue_terms(terms, q.double(), keys.double(), queue.double(), "reference")
    for one, expected in zip(ours, exact, strict=True):
        assert one.dtype == torch.float32
        assert torch.allclose(one.double(), expected, atol=1e-5 if queue_dtype == torch.float32 else 5e-3)
        gradient, true = (torch.autograd.grad(x, q, retain_graph=True)[0].double() for x in (one, expected))
        assert (gradient - true).abs().max() <= (1e-5 if queue_dtype == torch.float32 else 1e-2) * true.abs().max()


@pytest.mark.parametrize(
    ("difference", "within"),
    [(1.0, False), (1e-3, False), (1e-6, False), (1.0, True), (1e-3, True)],  # within, norms differ by roundings, too
)
def test_the_gram_form_keeps_its_digits_when_the_views_nearly_agree(difference: float, within: bool) -> None:
    q = rows(200, 32, 1)
    keys = F.normalize(q + difference * rows(200, 32, 2), dim=1).float()
    q = q.float().requires_grad_()
    exact = batch_consistency(q.double(), keys.double(), within, "reference")
    loss = batch_consistency(q, keys, within, "cpu")
    assert torch.allclose(loss.double(), exact, rtol=1e-2 if difference < 1e-5 else 1e-6)
    gradient, true = (torch.autograd.grad(x, q)[0] for x in (loss, exact))
    assert (gradient - true).abs().max() <= 1e-3 * true.abs().max()


def test_gram_sums_of_parts_add_up_to_the_whole() -> None:
    q, keys, _ = inputs(12, 1, 16)
    parts = [gram(q[i : i + 4], keys[i : i + 4]) for i in (0, 4, 8)]
    total = Gram(*(torch.stack(x).sum(0) for x in zip(*parts, strict=True)))
    for within in (False, True):
        assert torch.allclose(gram_consistency(total, 12, within), batch_consistency(q, keys, within), atol=1e-14)


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("n", [2, 7])
def test_compactness_is_that_of_an_images_worst_pair(n: int, impl: str) -> None:
    """Whose keys take no gradient."""
    generator = torch.Generator().manual_seed(n)
    rows = F.normalize(torch.randn(6, n, 8, generator=generator, dtype=torch.float64), dim=2).requires_grad_()
    pairs = [(rows[place], rows[place + 3]) for place in range(3)]
    ours = worst_compactness(pairs, impl)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(n):
        others = [j for j in range(n) if j != i]
        worst = min(q[i] @ (k[i] - torch.stack([k[j] for j in others]).mean(0)).detach() for q, k in pairs)
        total = total + (1 + (-worst).exp()).log() / n
    assert torch.allclose(ours, total, atol=1e-12)
    one, other = (torch.autograd.grad(loss, rows)[0] for loss in (ours, total))
    assert torch.allclose(one, other, atol=1e-12)
    assert one[:3].abs().max() > 0
    assert not one[3:].any()


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_compactness_of_images_apart_and_of_a_collapse(impl: str) -> None:
    apart, alike = torch.eye(5, dtype=torch.float64), torch.ones(5, 1, dtype=torch.float64)
    assert float(worst_compactness([(apart, apart)], impl)) == pytest.approx(0.3132617, abs=1e-7)
    assert float(worst_compactness([(alike, alike)], impl)) == pytest.approx(math.log(2), abs=1e-12)


def test_compactness_takes_its_part_of_the_contrast() -> None:
    q, keys, _ = inputs(6, 1, 16)
    own = (q * keys).sum()
    loss, terms = regularised(own, Regularisers(compactness=0.3), q, keys, keys, None)
    assert torch.allclose(loss, 0.7 * own + 0.3 * worst_compactness([(q, keys)]))
    assert set(terms) == {"contrast", "compactness"}
    both, _ = regularised(own, Regularisers(compactness=0.3), torch.cat([q, q]), torch.cat([keys, q]), None, None, 2)
    assert torch.allclose(both, 0.7 * own + 0.3 * worst_compactness([(q, keys), (q, q)]))


def test_the_regularisers_go_with_a_loss_that_has_no_queue() -> None:
    q, keys, _ = inputs(6, 1, 16)
    own = (q * keys).sum()
    loss, terms = regularised(own, Regularisers(cross="batch", cross_weight=2.0), q, keys, keys, None)
    assert torch.allclose(loss, own + 2 * batch_consistency(q, keys))
    assert set(terms) == {"contrast", "cross"}
    with pytest.raises(UserError, match="--cross queue and --uniform queue are for methods that have a queue"):
        regularised(own, Regularisers(uniform="queue"), q, keys, keys, None)


def test_terms_compile_without_a_graph_break() -> None:
    q, keys, queue = (x.detach().float() for x in inputs(6, 40, 16))
    q.requires_grad_()
    terms = [InfoNCE(0.1), QueueConsistency(0.2, 0.2), QueueUniformity(0.1)]

    def loss(q: torch.Tensor) -> torch.Tensor:
        contrast, consistency, uniformity = queue_terms(terms, q, keys, queue, "cpu")
        return contrast + consistency + uniformity + batch_uniformity(q, keys, 0.2, "cpu")

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(q), loss(q), atol=1e-6)
    assert torch.allclose(*(torch.autograd.grad(f(q), q)[0] for f in (compiled, loss)), atol=1e-6)
