"""Contrast over the global batch: slow loops, closed forms, equivalences, one process against several."""

import math
import pathlib
from collections.abc import Callable

import pytest
import torch
from support.forks import on_ranks, succeed
from torch import Tensor
from torch.nn import functional as F

from fasttrain.engine.ranks import Ranks
from fasttrain.losses.contrast import decoupled, nt_xent, sup_con
from fasttrain.losses.queue import DecoupledWeighted, positive_weights, queue_terms

Loss = Callable[..., Tensor]
IMPLS = ["reference", "cpu"]
SIZES = [(2, 4), (3, 8), (17, 16), (300, 32)]  # N, D; the last has several tiles
LABELS = torch.tensor([7, -(2**63), 7, 2**63 - 1, 0, 7, 0, 5, 0, -(2**63), 3, 5])  # two classes of one row


def rows(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)


def pairs(n: int, d: int) -> tuple[Tensor, Tensor]:
    """Two views, nearer to each other than to other images'."""
    a = rows(n, d, 1)
    return a.requires_grad_(), F.normalize(a.detach() + rows(n, d, 2), dim=1).requires_grad_()


def orthogonal(n: int) -> tuple[Tensor, Tensor]:
    """Every image on an axis of its own, both views equal."""
    return torch.eye(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64)


def collapsed(n: int) -> tuple[Tensor, Tensor]:
    return rows(1, 8, 3).expand(n, -1), rows(1, 8, 3).expand(n, -1)


def weighted(a: Tensor, b: Tensor, temperature: float, impl: str = "auto") -> Tensor:
    return decoupled(a, b, temperature, True, impl)


def slow(a: Tensor, b: Tensor, temperature: float, kind: str) -> Tensor:
    """NT-Xent, "dcl" or "dclw", a row and a pair at a time."""
    z, n = torch.cat([a, b]), len(a)
    softmax = ((a * b).sum(1) / 0.5).softmax(0).detach()
    total = torch.zeros((), dtype=z.dtype)
    for i in range(2 * n):
        positive = (i + n) % (2 * n)
        left_out = {i} if kind == "nt_xent" else {i, positive}
        s = torch.stack([z[i] @ z[j] / temperature for j in range(2 * n) if j not in left_out])
        weight = 2 - n * softmax[i % n] if kind == "dclw" else 1
        total = total + s.logsumexp(0) - weight * (z[i] @ z[positive]) / temperature
    return total / (2 * n)


def assert_same(ours: Tensor, expected: Tensor, *inputs: Tensor, atol: float = 1e-11) -> None:
    """Equal values, and equal gradients of every input."""
    assert torch.allclose(ours, expected, atol=atol)
    gradients = (torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (ours, expected))
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=atol)
        assert one.abs().max() > 0


KINDS: dict[str, Loss] = {"nt_xent": nt_xent, "dcl": decoupled, "dclw": weighted}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.07, 0.5, 10.0])
@pytest.mark.parametrize(("n", "d"), SIZES[:-1])
def test_pairs_value_and_gradient(n: int, d: int, temperature: float, kind: str, impl: str) -> None:
    a, b = pairs(n, d)
    assert_same(KINDS[kind](a, b, temperature, impl=impl), slow(a, b, temperature, kind), a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_more_rows_than_a_tile_are_as_the_formula(kind: str) -> None:
    a, b = pairs(*SIZES[-1])
    assert_same(KINDS[kind](a, b, 0.1), KINDS[kind](a, b, 0.1, impl="reference"), a, b)
    labels = torch.arange(600) % 7 - 3
    z = torch.cat([a, b]).detach().requires_grad_()
    assert_same(sup_con(z, labels, 0.1), sup_con(z, labels, 0.1, impl="reference"), z)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", [0.07, 0.5, 10.0])
def test_sup_con_value_and_gradient(temperature: float, impl: str) -> None:
    z = rows(12, 8, 1).requires_grad_()
    parts = []
    for i in range(12):
        others = [j for j in range(12) if j != i]
        positives = [j for j in others if LABELS[j] == LABELS[i]]
        lse = torch.stack([z[i] @ z[j] / temperature for j in others]).logsumexp(0)
        parts += [sum((lse - z[i] @ z[j] / temperature) / len(positives) for j in positives)] if positives else []
    assert len(parts) == 10
    expected = temperature / 0.07 * torch.stack(parts).mean()
    assert_same(sup_con(z, LABELS, temperature, impl), expected, z)


@pytest.mark.parametrize("impl", IMPLS)
def test_sup_con_of_rows_without_positives_is_zero(impl: str) -> None:
    z = rows(6, 8, 1).requires_grad_()
    loss = sup_con(z, torch.arange(6), 0.1, impl)
    loss.backward()
    assert loss == 0
    assert torch.equal(z.grad, torch.zeros_like(z))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("n", "temperature"), [(2, 1.0), (4, 1.0), (4, 0.2)])
def test_closed_forms(n: int, temperature: float, impl: str) -> None:
    others = 2 * n - 2
    away = math.exp(-1 / temperature)
    apart, one_point = orthogonal(n), collapsed(n)
    for loss, value, collapse in (
        (nt_xent, math.log1p(others * away), math.log(2 * n - 1)),
        (decoupled, math.log(others) - 1 / temperature, math.log(others) - 1 / temperature + 1 / temperature),
        (weighted, math.log(others) - 1 / temperature, math.log(others)),
    ):
        assert float(loss(*apart, temperature, impl=impl)) == pytest.approx(value, abs=1e-12)
        assert float(loss(*one_point, temperature, impl=impl)) == pytest.approx(collapse, abs=1e-12)
    one_class = torch.cat(one_point)
    labels = torch.zeros(2 * n, dtype=torch.int64)
    expected = temperature / 0.07 * math.log(2 * n - 1)
    assert float(sup_con(one_class, labels, temperature, impl)) == pytest.approx(expected, abs=1e-12)


def test_numeric_anchors() -> None:
    for n, temperature, value in ((2, 1.0, 0.5514447139), (4, 1.0, 1.1654221805), (4, 0.2, 0.0396318613)):
        assert float(nt_xent(*orthogonal(n), temperature)) == pytest.approx(value, abs=1e-10)
    assert float(decoupled(*orthogonal(4), 0.2)) == pytest.approx(-3.2082405308, abs=1e-10)


@pytest.mark.parametrize("impl", IMPLS)
def test_classes_on_axes_of_their_own(impl: str) -> None:
    """n of R rows on each axis: log((n − 1) + (R − n) e^{−1/τ})."""
    labels = torch.arange(12) % 4
    loss = sup_con(torch.eye(4, dtype=torch.float64)[labels], labels * 1000 - 5, 0.2, impl)
    assert float(loss) == pytest.approx(0.2 / 0.07 * math.log(2 + 9 * math.exp(-5)), abs=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_sup_con_of_images_as_classes_is_nt_xent(impl: str) -> None:
    a, b = pairs(9, 16)
    ours = sup_con(torch.cat([a, b]), torch.arange(9).repeat(2), 0.2, impl)
    assert_same(ours, 0.2 / 0.07 * nt_xent(a, b, 0.2), a, b)


def test_nt_xent_is_the_softplus_of_the_decoupled_rows() -> None:
    """For a batch whose rows all have the same loss: there the mean of the softplus is the softplus of the mean."""
    assert torch.allclose(nt_xent(*orthogonal(5), 0.3), F.softplus(decoupled(*orthogonal(5), 0.3)), atol=1e-12)


def test_nt_xent_is_cross_view_and_same_view_sums_put_together() -> None:
    a, b = pairs(9, 16)
    own = torch.eye(9, dtype=torch.bool)
    expected = torch.zeros((), dtype=torch.float64)
    for x, y in ((a, b), (b, a)):
        same = (x @ x.T / 0.2).masked_fill(own, -math.inf).logsumexp(1)
        cross = x @ y.T / 0.2
        expected = expected + (torch.logaddexp(cross.logsumexp(1), same) - cross.diagonal()).mean() / 2
    assert_same(nt_xent(a, b, 0.2), expected, a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_may_be_turned_permuted_and_exchanged(kind: str) -> None:
    a, b = (x.detach() for x in pairs(9, 16))
    loss = KINDS[kind](a, b, 0.2)
    turn = torch.linalg.qr(rows(16, 16, 5)).Q
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    for other in ((a @ turn, b @ turn), (a[order], b[order]), (b, a)):
        assert torch.allclose(KINDS[kind](*other, 0.2), loss, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_keeps_to_the_sphere(kind: str) -> None:
    raw = torch.randn(9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    KINDS[kind](F.normalize(raw, dim=1), rows(9, 16, 2), 0.2).backward()
    assert (raw.grad * raw).sum(1).abs().max() < 1e-12


def test_weights_have_a_mean_of_one_and_are_larger_for_pairs_that_are_apart() -> None:
    a, b = pairs(9, 16)
    weights = positive_weights(a, b)
    assert not weights.requires_grad
    assert float(weights.mean()) == pytest.approx(1, abs=1e-12)
    assert torch.equal(weights.argsort(), (a * b).sum(1).argsort(descending=True))


def test_equally_near_pairs_make_weighted_equal_to_decoupled() -> None:
    a = rows(9, 16, 1)
    assert torch.allclose(weighted(a, a, 0.2), decoupled(a, a, 0.2), atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_decoupled_weighted_over_a_queue(impl: str) -> None:
    q, keys, queue = rows(5, 16, 1).requires_grad_(), rows(5, 16, 2), rows(33, 16, 3)
    softmax = ((q * keys).sum(1) / 0.5).softmax(0).detach()
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(5):
        lse = torch.stack([q[i] @ key / 0.1 for key in queue]).logsumexp(0)
        expected = expected + (lse - (2 - 5 * softmax[i]) * (q[i] @ keys[i]) / 0.1) / 5
    assert_same(queue_terms([DecoupledWeighted(0.1)], q, keys, queue, impl)[0], expected, q)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_fp32_stays_close_to_fp64(kind: str, temperature: float) -> None:
    a, b = pairs(40, 16)
    narrow = [x.detach().float().requires_grad_() for x in (a, b)]
    ours, exact = KINDS[kind](*narrow, temperature), KINDS[kind](a, b, temperature)
    assert ours.dtype == torch.float32
    assert float(ours.detach()) == pytest.approx(float(exact.detach()), abs=1e-6 / temperature)
    for one, true in zip(torch.autograd.grad(ours, narrow), torch.autograd.grad(exact, [a, b]), strict=True):
        assert (one - true).abs().max() <= 1e-5 * true.abs().max()


@pytest.mark.parametrize("kind", [*KINDS, "sup_con"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_numbers_do_not_come_out_plausible(bad: float, kind: str) -> None:
    a, b = (x.detach().clone() for x in pairs(6, 8))
    a[1, 2] = bad
    loss = sup_con(torch.cat([a, b]), LABELS, 0.1) if kind == "sup_con" else KINDS[kind](a, b, 0.1)
    assert not loss.isfinite()


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_are_as_lightly_has_them(kind: str) -> None:
    """It normalises by itself. Its NTXentLoss is a cross-entropy over the same rows."""
    peer = pytest.importorskip("lightly.loss")
    theirs = {"nt_xent": peer.NTXentLoss, "dcl": peer.DCLLoss, "dclw": peer.DCLWLoss}[kind](0.2)
    a, b = (2 * x.detach().requires_grad_() for x in pairs(17, 16))
    assert_same(KINDS[kind](F.normalize(a, dim=1), F.normalize(b, dim=1), 0.2), theirs(a, b), a, b, atol=1e-12)


def _own_rows(folder: pathlib.Path, kind: str) -> None:
    """One rank's share of a loss: its gradient, averaged over ranks as DDP does."""
    ranks = Ranks("cpu")
    a_MD, b_MD = torch.load(folder / "inputs.pt")
    own = slice(ranks.rank * 12 // ranks.world_size, (ranks.rank + 1) * 12 // ranks.world_size)
    a, b = (x[own].clone().requires_grad_() for x in (a_MD, b_MD))
    loss = _loss(kind, a, b, LABELS[own])
    loss.backward()
    parts = loss.detach(), a.grad / ranks.world_size, b.grad / ranks.world_size
    torch.save(parts, folder / f"rank{ranks.rank}.pt")
    ranks.close()


def _loss(kind: str, a: Tensor, b: Tensor, labels: Tensor) -> Tensor:
    if kind == "sup_con":  # of one view, so that some rows have no positive
        return sup_con(a, labels, 0.2) + (b * b).sum(1).mean()
    if kind == "queue":
        return queue_terms([DecoupledWeighted(0.2)], a, b.detach(), rows(20, 8, 7))[0] + (b * b).sum(1).mean()
    return KINDS[kind](a, b, 0.2)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("kind", [*KINDS, "sup_con", "queue"])
def test_loss_and_gradient_over_ranks_equal_one_process(tmp_path: pathlib.Path, kind: str, world_size: int) -> None:
    a, b = pairs(12, 8)
    torch.save((a.detach(), b.detach()), tmp_path / "inputs.pt")
    succeed(on_ranks(tmp_path, world_size, _own_rows, tmp_path, kind))
    loss = _loss(kind, a, b, LABELS)
    loss.backward()
    values, *gradients = zip(*(torch.load(tmp_path / f"rank{rank}.pt") for rank in range(world_size)), strict=True)
    assert torch.allclose(torch.stack(values).mean(), loss, atol=1e-12)
    for parts, whole in zip(gradients, (a, b), strict=True):
        assert torch.allclose(torch.cat(parts), whole.grad, atol=1e-12)


@pytest.mark.parametrize("kind", [*KINDS, "sup_con"])
def test_losses_compile_without_a_graph_break(kind: str) -> None:
    a, b = (x.detach().float().requires_grad_() for x in pairs(6, 8))

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return sup_con(torch.cat([a, b]), LABELS, 0.1) if kind == "sup_con" else KINDS[kind](a, b, 0.1)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_same(compiled(a, b), loss(a, b), a, b, atol=1e-6)
