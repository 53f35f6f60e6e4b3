"""Contrast of paired classes under a gate: a slow loop, equivalences, pairs, one process against several."""

import math
import pathlib

import pytest
import torch
from support.forks import on_ranks, succeed
from torch import Tensor
from torch.nn import functional as F

from fasttrain.engine.ranks import Ranks
from fasttrain.losses.gated import gate_figures, gated_contrast, paired_labels
from fasttrain.system.collectives import common_generator, gather_rows

IMPLS = ["reference", "auto"]
LABELS = torch.tensor([7, -(2**63), 7, 2**63 - 1, 0, 7, 0, 5, 0, -(2**63), 3, 5])
PAIRED = torch.tensor([0, 7, 5, 7, 0, 9, 7, 3, 5, 0, 2**63 - 1, 5])  # with its own class twice, and once with no row's


def rows(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)


def inputs(n: int = 12, d: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of two views, and gates."""
    z, k = rows(n, d, 1), rows(n, d, 1) + rows(n, d, 2)
    return z.requires_grad_(), F.normalize(k, dim=1).requires_grad_(), (3 * rows(n, d, 3)).sigmoid().requires_grad_()


def slow(z: Tensor, k: Tensor, gate: Tensor, label: Tensor, paired: Tensor, temperature: float) -> Tensor:
    """A positive at a time."""
    total, counted = torch.zeros((), dtype=z.dtype), 0
    for i in range(len(z)):
        s = torch.stack([(z[i] * gate[i]) @ (k[j] * gate[i]) / temperature for j in range(len(k))])
        positives = [j for j in range(len(k)) if label[j] == paired[i]]
        negatives = [j for j in range(len(k)) if label[j] not in (label[i], paired[i])]
        for p in positives:
            total = total + torch.stack([s[p], *s[negatives]]).exp().sum().log() - s[p]
        counted += len(positives)
    return total / max(counted, 1)


def assert_same(ours: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    assert torch.allclose(ours, expected, atol=1e-11)
    gradients = (torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (ours, expected))
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-11)
        assert one.abs().max() > 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", [0.05, 0.5, 10.0])
def test_value_and_gradient(temperature: float, impl: str) -> None:
    given = inputs()
    ours = gated_contrast(*given, LABELS, PAIRED, temperature, impl=impl)
    assert_same(ours, slow(*given, LABELS, PAIRED, temperature), *given)


@pytest.mark.parametrize("impl", IMPLS)
def test_an_open_gate_and_classes_of_one_image_paired_with_themselves_are_info_nce(impl: str) -> None:
    """Across views, with gradient to both."""
    z, k, _ = inputs()
    label, gate = torch.arange(12), torch.ones(12, 8, dtype=torch.float64)
    expected = F.cross_entropy(z @ k.T / 0.2, label)
    assert_same(gated_contrast(z, k, gate, label, label, 0.2, impl=impl), expected, z, k)


@pytest.mark.parametrize("impl", IMPLS)
def test_what_a_gate_shuts_out_is_compared_no_more(impl: str) -> None:
    z, k, _ = inputs()
    gate = torch.ones(12, 8, dtype=torch.float64)
    gate[:, 5:] = 0
    found = gated_contrast(z, k, gate, LABELS, PAIRED, 0.2, impl=impl)
    narrow = gated_contrast(z[:, :5], k[:, :5], gate[:, :5], LABELS, PAIRED, 0.2, impl=impl)
    assert_same(found, narrow, z, k)
    shut = gated_contrast(z, k, gate * 0, torch.arange(12) % 3, (torch.arange(12) + 1) % 3, 0.2, impl=impl)
    assert float(shut.detach()) == pytest.approx(math.log(5), abs=1e-12)  # four negatives, and all are alike


@pytest.mark.parametrize("impl", IMPLS)
def test_classes_on_axes_of_their_own(impl: str) -> None:
    """Three classes of four rows. Paired with another, a row's positives are as far from it as its negatives; paired
    with its own, they are where it is itself."""
    label, gate = torch.arange(12) % 3, torch.full((12, 3), 0.5, dtype=torch.float64)
    z = torch.eye(3, dtype=torch.float64)[label]
    others = gated_contrast(z, z, gate, label, (label + 1) % 3, 0.2, impl=impl)
    assert float(others) == pytest.approx(math.log(5), abs=1e-12)
    own = gated_contrast(z, z, gate, label, label, 0.2, impl=impl)
    assert float(own) == pytest.approx(math.log1p(8 * math.exp(-0.25 / 0.2)), abs=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_without_a_positive_are_no_part_and_without_negatives_nothing(impl: str) -> None:
    given = inputs()
    none = gated_contrast(*given, LABELS, torch.full_like(LABELS, 99), 0.2, impl=impl)
    two = gated_contrast(*given, LABELS % 2, (LABELS + 1) % 2, 0.2, impl=impl)
    for loss in (none, two):
        assert float(loss.detach()) == 0
        assert not any(gradient.any() for gradient in torch.autograd.grad(loss, given))
    some = torch.tensor([3, 8])
    paired = torch.full_like(LABELS, 99).index_copy(0, some, LABELS[[0, 4]])
    expected = slow(*given, LABELS, paired, 0.2)
    assert_same(gated_contrast(*given, LABELS, paired, 0.2, impl=impl), expected, *given)


def test_images_may_be_permuted_and_numbers_too() -> None:
    given = inputs()
    loss = gated_contrast(*given, LABELS, PAIRED, 0.2)
    order = torch.randperm(12)
    again = gated_contrast(*(x[order] for x in given), LABELS[order], PAIRED[order], 0.2)
    assert torch.allclose(again, loss, atol=1e-12)
    turned = gated_contrast(*(x.flip(1) for x in given), LABELS, PAIRED, 0.2)
    assert torch.allclose(turned, loss, atol=1e-12)


def test_a_low_temperature_does_not_overflow() -> None:
    given = inputs()
    narrow = [x.detach().float().requires_grad_() for x in given]
    ours, exact = (gated_contrast(*x, LABELS, PAIRED, 0.005) for x in (narrow, given))
    assert float(ours.detach()) == pytest.approx(float(exact.detach()), rel=1e-5)
    pairs = zip(torch.autograd.grad(ours, narrow), torch.autograd.grad(exact, given), strict=True)
    assert all(torch.allclose(one.double(), true, atol=1e-3) for one, true in pairs)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_numbers_do_not_come_out_plausible(bad: float, place: int) -> None:
    given = [x.detach().clone() for x in inputs()]
    given[place][1, 2] = bad
    assert not gated_contrast(*given, LABELS, PAIRED, 0.1).isfinite()


def test_pairs_are_the_labels_in_another_order_which_a_step_draws() -> None:
    drawn = []
    for seed in (0, 0, 1):
        common_generator.manual_seed(seed)
        drawn.append(paired_labels(LABELS))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    for paired in drawn:
        assert torch.equal(paired.sort().values, LABELS.sort().values)


def test_figures_tell_an_undecided_gate_from_one_that_is_open_or_shut() -> None:
    for gates, mean, entropy in (([0.5, 0.5], 0.5, math.log(2)), ([1.0, 0.0], 0.5, 0.0), ([0.0, 0.0], 0.0, 0.0)):
        figures = gate_figures(torch.tensor([gates], requires_grad=True))
        assert not figures["gate"].requires_grad
        assert float(figures["gate"]) == pytest.approx(mean)
        assert float(figures["gate_entropy"]) == pytest.approx(entropy)


def _own_rows(folder: pathlib.Path) -> None:
    """One rank's share of a loss: its gradient, averaged over ranks as DDP does, and the pairs that are drawn."""
    ranks = Ranks("cpu")
    own = slice(ranks.rank * 12 // ranks.world_size, (ranks.rank + 1) * 12 // ranks.world_size)
    given = [x.detach()[own].clone().requires_grad_() for x in inputs()]
    loss = gated_contrast(*given, LABELS[own], PAIRED[own], 0.2)
    gradients = [grad / ranks.world_size for grad in torch.autograd.grad(loss, given)]
    common_generator.manual_seed(5)
    paired = gather_rows(paired_labels(LABELS[own])[:, None])[:, 0]
    torch.save((loss.detach(), gradients, paired), folder / f"rank{ranks.rank}.pt")
    ranks.close()


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_with_rows_of_their_own_have_the_gradient_and_the_pairs_of_one(
    tmp_path: pathlib.Path, count: int
) -> None:
    """One of the twelve rows has no positive, and the ranks differ in how many they have."""
    given = inputs()
    expected = gated_contrast(*given, LABELS, PAIRED, 0.2)
    gradients = torch.autograd.grad(expected, given)
    common_generator.manual_seed(5)
    paired = paired_labels(LABELS)
    succeed(on_ranks(tmp_path, count, _own_rows, tmp_path))
    found = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(count)]
    assert torch.allclose(torch.stack([loss for loss, *_ in found]).mean(), expected.detach(), atol=1e-12)
    for place, gradient in enumerate(gradients):
        assert torch.allclose(torch.cat([own[place] for _, own, _ in found]), gradient, atol=1e-12)
    assert all(torch.equal(pairs, paired) for *_, pairs in found)
