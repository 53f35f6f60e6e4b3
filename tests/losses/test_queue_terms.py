"""ReSSL, SCE and consistency both ways over the queue: slow loops, closed forms, equivalences, a published peer."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fasttrain.losses.batch import batch_consistency, batch_uniformity
from fasttrain.losses.queue import (
    SCE,
    Decoupled,
    DecoupledWeighted,
    InfoNCE,
    MutualConsistency,
    QueueConsistency,
    QueueTerm,
    QueueUniformity,
    ReSSL,
    queue_terms,
)
from fasttrain.losses.regularisers import Regularisers, regularised

IMPLS = ["reference", "cpu"]
SIZES = [(1, 2, 8), (3, 7, 16), (8, 63, 32), (16, 257, 128)]  # N, K, D
TERMS = {
    "ressl": ReSSL(0.1, 0.04), "sce": SCE(0.1, 0.07, 0.5), "both": MutualConsistency(0.05, 0.05),
    "info_nce": InfoNCE(0.2), "decoupled": Decoupled(0.2), "dclw": DecoupledWeighted(0.2),
    "queue": QueueConsistency(0.1, 0.1), "sharpened": QueueConsistency(0.1, 0.04), "uniform": QueueUniformity(0.2),
}  # fmt: skip


def rows(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)


def inputs(n: int, k: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, their keys, which are nearer to them than others, and a queue."""
    q = rows(n, d, 1)
    return q.requires_grad_(), F.normalize(q.detach() + rows(n, d, 2), dim=1), rows(k, d, 3)


def value(term: QueueTerm, q: Tensor, keys: Tensor, queue: Tensor, impl: str = "auto") -> Tensor:
    return queue_terms([term], q, keys, queue, impl)[0]


def assert_same(ours: Tensor, expected: Tensor, q: Tensor, atol: float = 1e-11) -> None:
    """Equal values, and equal gradients."""
    assert torch.allclose(ours, expected, atol=atol)
    gradients = [torch.autograd.grad(loss, q, retain_graph=True)[0] for loss in (ours, expected)]
    assert torch.allclose(*gradients, atol=atol)
    assert gradients[0].abs().max() > 0


def softmax(s: list[Tensor]) -> list[Tensor]:
    """exp(s_j) / Σ exp(s), one at a time."""
    total = sum(x.exp() for x in s)
    return [x.exp() / total for x in s]


def slow_ressl(q: Tensor, keys: Tensor, queue: Tensor, temperature: float, key_temperature: float) -> Tensor:
    loss = torch.zeros((), dtype=q.dtype)
    for i in range(len(q)):
        target = softmax([keys[i] @ key / key_temperature for key in queue])
        own = softmax([q[i] @ key / temperature for key in queue])
        loss = loss - sum(w * p.log() for w, p in zip(target, own, strict=True)) / len(q)
    return loss


def slow_sce(
    q: Tensor, keys: Tensor, queue: Tensor, temperature: float, key_temperature: float, weight: float,
    positive: float = -math.inf,
) -> Tensor:  # fmt: skip
    """positive: the key's own logit in the distribution that is the target's other part."""
    loss = torch.zeros((), dtype=q.dtype)
    for i in range(len(q)):
        similar = softmax([torch.tensor(positive), *(keys[i] @ key / key_temperature for key in queue)])
        target = [weight * (j == 0) + (1 - weight) * s for j, s in enumerate(similar)]
        own = softmax([q[i] @ key / temperature for key in (keys[i], *queue)])
        loss = loss - sum(w * p.log() for w, p in zip(target, own, strict=True)) / len(q)
    return loss


def slow_consistency(
    q: Tensor, keys: Tensor, queue: Tensor, temperature: float, key_temperature: float
) -> tuple[Tensor, Tensor]:
    """From the key's distribution to the query's, and the mean of both ways."""
    one, other = torch.zeros(2, dtype=q.dtype).unbind()
    for i in range(len(q)):
        p = softmax([keys[i] @ key / key_temperature for key in queue])
        r = softmax([q[i] @ key / temperature for key in queue])
        one = one + sum(a * (a / b).log() for a, b in zip(p, r, strict=True)) / len(q)
        other = other + sum(b * (b / a).log() for a, b in zip(p, r, strict=True)) / len(q)
    return one, (one + other) / 2


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("n", "k", "d"), SIZES)
@pytest.mark.parametrize(("temperature", "key_temperature"), [(0.1, 0.04), (0.2, 0.2), (1.0, 3.0)])
def test_terms_value_and_gradient(
    n: int, k: int, d: int, temperature: float, key_temperature: float, impl: str
) -> None:
    data = inputs(n, k, d)
    two = temperature, key_temperature
    assert_same(value(ReSSL(*two), *data, impl), slow_ressl(*data, *two), data[0])
    assert_same(value(SCE(*two, 0.3), *data, impl), slow_sce(*data, *two, 0.3), data[0])
    one, both = slow_consistency(*data, *two)
    assert_same(value(QueueConsistency(*two), *data, impl), one, data[0])
    assert_same(value(MutualConsistency(*two), *data, impl), both, data[0])


def test_gradients_are_the_closed_forms() -> None:
    q, keys, queue = inputs(6, 40, 16)
    with torch.no_grad():
        own, other = ((x @ queue.T / 0.1).softmax(1) for x in (q, keys))
        pull = (own - other) @ queue / 0.1
        centred = queue - (own @ queue)[:, None]  # N, K, D
        spread = torch.einsum("nk,nkd,nke,ne->nd", own, centred, centred, q - keys) / 0.1**2
    for term, expected in ((ReSSL(0.1, 0.1), pull), (MutualConsistency(0.1, 0.1), (pull + spread) / 2)):
        (gradient,) = torch.autograd.grad(value(term, q, keys, queue), q)
        assert torch.allclose(gradient, expected / len(q), atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_sce_is_info_nce_and_ressl_weighted(impl: str) -> None:
    q, keys, queue = inputs(7, 40, 16)
    info_nce, ressl, dcl = queue_terms([InfoNCE(0.1), ReSSL(0.1, 0.05), Decoupled(0.1)], q, keys, queue, impl)
    assert_same(value(SCE(0.1, 0.05, 1.0), q, keys, queue, impl), info_nce, q)
    rows_N = (q @ queue.T / 0.1).logsumexp(1) - (q * keys).sum(1) / 0.1
    assert torch.allclose(rows_N.mean(), dcl)
    ceiling = F.softplus(-rows_N).mean()
    assert_same(value(SCE(0.1, 0.05, 0.3), q, keys, queue, impl), 0.3 * info_nce + 0.7 * (ressl + ceiling), q)


@pytest.mark.parametrize("impl", IMPLS)
def test_sce_without_a_positive_is_ressl(impl: str) -> None:
    """Where the key is opposite at a low temperature, nothing of it is left in the denominator."""
    q, _, queue = inputs(7, 40, 16)
    keys = -q.detach()
    assert_same(value(SCE(0.02, 0.04, 0.0), q, keys, queue, impl), value(ReSSL(0.02, 0.04), q, keys, queue, impl), q)


def test_the_positive_of_sce_takes_no_share_of_the_relations() -> None:
    """The authors' code gives it a logit of 0 among them: a leak that shrinks with the queue, and is not here."""
    q, keys, queue = inputs(5, 8, 16)
    ours = value(SCE(0.1, 0.5, 0.5), q, keys, queue)
    assert torch.allclose(ours, slow_sce(q, keys, queue, 0.1, 0.5, 0.5), atol=1e-12)
    assert (ours - slow_sce(q, keys, queue, 0.1, 0.5, 0.5, positive=0.0)).abs() > 1e-2


@pytest.mark.parametrize("impl", IMPLS)
def test_sce_keeps_its_digits_where_the_positive_outweighs_the_queue(impl: str) -> None:
    """InfoNCE's part is softplus of -200 there; the rest is left to fp32."""
    q = rows(4, 16, 1).float()
    away = -q.mean(0, keepdim=True).expand(9, -1)
    loss = value(SCE(0.01, 0.05, 1.0), q, q, F.normalize(away, dim=1), impl)
    assert 0 <= float(loss) < 1e-20 if impl == "cpu" else 0 <= float(loss) < 1e-4


@pytest.mark.parametrize("impl", IMPLS)
def test_ressl_is_consistency_and_the_entropy_of_its_target(impl: str) -> None:
    q, keys, queue = inputs(7, 40, 16)
    p = (keys @ queue.T / 0.1).softmax(1)
    entropy = -(p * p.log()).sum(1).mean()
    ressl, consistency = queue_terms([ReSSL(0.1, 0.1), QueueConsistency(0.1, 0.1)], q, keys, queue, impl)
    assert_same(ressl, consistency + entropy, q)
    assert torch.allclose(value(ReSSL(0.1, 0.1), keys, keys, queue, impl), entropy)
    equal = rows(1, 16, 9).expand(40, -1)
    assert torch.allclose(value(ReSSL(0.1, 0.04), q, keys, equal, impl), torch.tensor(math.log(40)).double())


@pytest.mark.parametrize("impl", IMPLS)
def test_consistency_both_ways_is_the_mean_of_each_way(impl: str) -> None:
    q, keys, queue = inputs(7, 40, 16)
    keys.requires_grad_()
    forward = value(QueueConsistency(0.1, 0.1), q, keys.detach(), queue, impl)
    backward = value(QueueConsistency(0.1, 0.1), keys, q.detach(), queue, impl)
    both = value(MutualConsistency(0.1, 0.1), q, keys.detach(), queue, impl)
    assert torch.allclose(both, (forward + backward) / 2)
    assert torch.allclose(both, value(MutualConsistency(0.1, 0.1), keys, q.detach(), queue, impl))
    assert both > 0
    assert value(MutualConsistency(0.1, 0.1), q, q.detach(), queue, impl).abs() < 1e-14


def test_consistency_both_ways_tends_to_a_variance() -> None:
    q, _, queue = inputs(7, 40, 16)
    step = 1e-4 * rows(7, 16, 5)
    keys = q.detach() + step
    p = (q @ queue.T / 0.1).softmax(1)
    moved = step @ queue.T / 0.1
    variance = ((p * moved.square()).sum(1) - (p * moved).sum(1).square()).mean()
    assert torch.allclose(2 * value(MutualConsistency(0.1, 0.1), q, keys, queue), variance, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", TERMS)
def test_the_order_of_the_queue_does_not_matter_and_a_rotation_turns_the_gradient(name: str) -> None:
    q, keys, queue = inputs(7, 40, 16)
    turn = torch.linalg.qr(rows(16, 16, 6))[0]
    turned = (q.detach() @ turn).requires_grad_()
    loss, shuffled = (value(TERMS[name], q, keys, each) for each in (queue, queue.flip(0)))
    assert_same(shuffled, loss, q)
    rotated = value(TERMS[name], turned, keys @ turn, queue @ turn)
    assert torch.allclose(rotated, loss)
    gradient, of_turned = (torch.autograd.grad(x, y)[0] for x, y in ((loss, q), (rotated, turned)))
    assert torch.allclose(gradient @ turn, of_turned, atol=1e-11)


@pytest.mark.parametrize("name", ["ressl", "sce", "both"])
def test_keys_and_queue_take_no_gradient(name: str) -> None:
    q, keys, queue = (x.detach().requires_grad_() for x in inputs(4, 9, 16))
    loss = value(TERMS[name], q, keys, queue)
    loss.backward()
    assert queue.grad is None
    detached = value(TERMS[name], q, keys.detach(), queue)
    assert torch.allclose(q.grad, torch.autograd.grad(detached, q)[0])
    assert q.grad.abs().max() > 0


@pytest.mark.parametrize("together", [("info_nce", "ressl"), ("sce", "queue"), ("ressl", "sce"), ("sce", "uniform")])
def test_terms_share_one_pass_unless_an_average_takes_a_gradient(
    together: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    q, keys, queue = inputs(7, 65, 16)
    passes = counted(monkeypatch)
    terms = [TERMS[name] for name in together]
    shared = queue_terms(terms, q, keys, queue)
    sides = {side for term in terms for side in term.sides}
    assert passes == [(7 * len(sides), False)]
    for term, one in zip(terms, shared, strict=True):
        assert_same(one, value(term, q, keys, queue, "reference"), q)
    passes.clear()
    *_, both = queue_terms([*terms, MutualConsistency(0.03, 0.03)], q, keys, queue)
    assert [count for count, _ in passes] == [7 * len(sides) + 7, 7]  # the queries of the last by themselves
    both.backward()
    assert passes[-1] == (7, True)  # and none but these pass over the queue again
    assert torch.allclose(q.grad, torch.autograd.grad(value(MutualConsistency(0.03, 0.03), q, keys, queue), q)[0])


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """The passes over a queue as they are made: their rows, and whether backward."""
    from fasttrain.kernels.similarity import cpu

    passes: list[tuple[int, bool]] = []

    def count(name: str, backward: bool) -> None:
        whole: Callable[..., Any] = getattr(cpu, name)

        def pass_over(x: Tensor, *arguments: Any, **options: Any) -> Any:
            passes.append((len(x), backward))
            return whole(x, *arguments, **options)

        monkeypatch.setattr(cpu, name, pass_over)

    count("readout", False)
    count("readout_backward", True)
    return passes


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["ressl", "sce", "both"])
def test_bad_numbers_do_not_come_out_plausible(name: str, bad: float, impl: str) -> None:
    q, keys, queue = (x.detach() for x in inputs(4, 9, 16))
    q[1, 2] = bad
    assert not value(TERMS[name], q, keys, queue, impl).isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["ressl", "sce", "both"])
def test_terms_in_low_precision_stay_close_to_fp64(name: str, dtype: torch.dtype) -> None:
    q, keys, queue = inputs(17, 130, 32)
    narrow = q.detach().float().requires_grad_()
    ours = value(TERMS[name], narrow, keys.float(), queue.to(dtype), "cpu")
    exact = value(TERMS[name], q, keys, queue, "reference")
    assert ours.dtype == torch.float32
    most = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 0.1}[dtype]
    assert torch.allclose(ours.double(), exact, atol=most)
    gradients = torch.autograd.grad(ours, narrow)[0].double(), torch.autograd.grad(exact, q)[0]
    assert (gradients[0] - gradients[1]).abs().max() <= most * gradients[1].abs().max()


def test_terms_compile_without_a_graph_break() -> None:
    q, keys, queue = (x.detach().float() for x in inputs(6, 40, 16))
    q.requires_grad_()
    terms = [TERMS[name] for name in ("ressl", "sce", "both")]

    def loss(q: Tensor) -> Tensor:
        return torch.stack(queue_terms(terms, q, keys, queue, "cpu")).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(q), loss(q), atol=1e-5)
    assert torch.allclose(*(torch.autograd.grad(f(q), q)[0] for f in (compiled, loss)), atol=1e-4)


@pytest.mark.parametrize("cross", ["batch", "batch-within", "queue", "queue-both"])
@pytest.mark.parametrize("uniform", ["batch", "queue"])
def test_a_symmetric_loss_is_the_mean_over_its_directions(cross: Any, uniform: Any) -> None:
    options = Regularisers(cross=cross, cross_weight=1.0, uniform=uniform, cross_temperature=0.1)
    first, second = (inputs(6, 40, 16)[:2], tuple(x.flip(0).roll(1, 1) for x in inputs(6, 1, 16)[:2]))
    queue = rows(40, 16, 3)
    q, keys = (torch.cat(pair) for pair in zip(first, second, strict=True))
    q = q.detach().requires_grad_()
    both, terms = regularised(InfoNCE(0.1), options, q, keys, keys, queue, directions=2)
    each = [regularised(InfoNCE(0.1), options, *part, part[1], queue) for part in (first, second)]
    assert torch.allclose(both, (each[0][0] + each[1][0]) / 2)
    for name, term in terms.items():
        assert torch.allclose(term, (each[0][1][name] + each[1][1][name]) / 2)
    expected = []
    for x, k in zip(q.chunk(2), keys.chunk(2), strict=True):
        term = {"queue": QueueConsistency, "queue-both": MutualConsistency}.get(cross)
        kept = value(term(0.1, 0.1), x, k, queue) if term else batch_consistency(x, k, cross == "batch-within")
        loss = value(InfoNCE(0.1), x, k, queue) + kept
        spread = value(QueueUniformity(0.2), x, k, queue) if uniform == "queue" else batch_uniformity(x, k, 0.2)
        expected.append(loss + 0.1 * spread)
    assert_same(both, torch.stack(expected).mean(), q)


def test_lightly_has_the_same_consistency_but_no_gradient() -> None:
    """Its CO2Regularizer has the positive among what is compared, and detaches what it returns: it trains nothing."""
    regularizer = pytest.importorskip("lightly.loss.regularizer")
    q, keys, queue = inputs(5, 9, 16)
    ours = []
    for x, k in zip(q, keys, strict=True):  # a row of the queue whose product with both is that of the pair
        product = x @ k
        shared = (x + k) * product / (1 + product)
        ours.append(value(MutualConsistency(0.05, 0.05), x[None], k[None], torch.cat([shared[None].detach(), queue])))
    peer = regularizer.CO2Regularizer(alpha=1.0, t_consistency=0.05, memory_bank_size=(9, 16))
    peer.memory_bank.bank = queue.clone()
    peer.memory_bank.bank_ptr = torch.zeros(1, dtype=torch.long)
    theirs = peer(q, keys)
    assert torch.allclose(theirs, torch.stack(ours).mean())
    assert not theirs.requires_grad
    assert ours[0].requires_grad


def test_queries_that_are_read_twice_are_read_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """InfoNCE at the temperature of the consistency: its side is not the one whose average takes a gradient."""
    passes = counted(monkeypatch)
    q, keys, queue = inputs(7, 65, 16)
    terms = [InfoNCE(0.1), MutualConsistency(0.1, 0.1)]
    ours = queue_terms(terms, q, keys, queue)
    assert [count for count, _ in passes] == [14, 7]
    for term, one in zip(terms, ours, strict=True):
        assert_same(one, value(term, q, keys, queue, "reference"), q)
