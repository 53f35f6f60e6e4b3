"""Learnt augmentation: its formulas, closed forms, and which part learns from what."""

import math

import pytest
import torch
from support.steps import build, sample, small
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.losses import reference
from fasttrain.losses.contrast import nt_xent
from fasttrain.losses.learnt_augmentation import augmented_contrast, restraint, slowed
from fasttrain.methods.simclr import RESTRAINT


def rows(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)


@pytest.mark.parametrize("n", [2, 7])
def test_restraint_value_and_gradient(n: int) -> None:
    a, b = rows(n, 8, 1).requires_grad_(), rows(n, 8, 2).requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for x, y in ((a, b), (b, a)):
        for i in range(n):
            positive, negatives = x[i] @ y[i], [x[i] @ y[j] for j in range(n) if j != i]
            low, high = min(positive, max(negatives)), max(positive, *negatives)
            total = total + (F.relu(positive - low) + sum(F.relu(high - s) for s in negatives) / (n - 1)) / (2 * n)
    ours = restraint(a, b)
    assert torch.allclose(ours, total, atol=1e-12)
    for one, other in zip(*(torch.autograd.grad(loss, (a, b)) for loss in (ours, total)), strict=True):
        assert torch.allclose(one, other, atol=1e-12)
        assert one.abs().max() > 0


@pytest.mark.parametrize(("positive", "value"), [(0.9, 1.3), (0.2, 0.1)])
def test_restraint_of_given_similarities(positive: float, value: float) -> None:
    """Of one row with negatives of 0.1 and 0.3, on either side of which the positive lies."""
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    similar = torch.tensor([positive, 0.1, 0.3], dtype=torch.float64)
    y = torch.stack([similar, (1 - similar**2).sqrt()], 1)
    assert float(reference.restraint(x, y, 0)) == pytest.approx(value, abs=1e-12)


def test_an_augmenter_that_does_nothing_makes_three_contrasts() -> None:
    a, b = rows(9, 16, 1), rows(9, 16, 2)
    assert torch.allclose(augmented_contrast(a, b, a, b, 0.2), 3 * nt_xent(a, b, 0.2), atol=1e-12)


def test_slowed_is_the_same_with_a_part_of_the_gradient() -> None:
    x = torch.tensor([3.0], requires_grad=True)
    y = slowed(x, 0.1)
    (y * y).sum().backward()
    assert torch.allclose(y, x)
    assert float(x.grad) == pytest.approx(0.6)


def test_encoder_and_augmenter_learn_each_from_its_own_sum() -> None:
    """The encoder by its loss + β L_2 + γ R with the augmenter as it is, the augmenter by L_2 + γ R with rows as they
    are."""
    beta = 0.07
    model = build(small("simclr", learnt_augmentation=beta)).eval()
    given = sample(8)
    loss, terms, _, _ = model(given)
    loss.backward()
    weights = model.encoder[1].conv1.weight, model.augmenter[0].weight
    found = [weight.grad.clone() for weight in weights]

    def parts(out: Tensor, augmenter: nn.Module) -> tuple[Tensor, Tensor]:
        a, b = F.normalize(out, dim=1).chunk(2)
        za, zb = F.normalize(augmenter(out), dim=1).chunk(2)
        return augmented_contrast(a, b, za, zb, 0.1), restraint(za, zb)

    out = model.projector(model.encoder(given.views[0].flatten(0, 1)))
    contrast, restrained = parts(out, model.augmenter)
    own = nt_xent(*F.normalize(out, dim=1).chunk(2), 0.1)
    whole = own + beta * contrast + RESTRAINT * restrained
    expected = torch.autograd.grad(whole, weights[0], retain_graph=True)[0]
    assert torch.allclose(found[0], expected, atol=1e-4 * float(expected.abs().max()))
    fixed = parts(out.detach(), model.augmenter)
    expected = torch.autograd.grad(fixed[0] + RESTRAINT * fixed[1], weights[1])[0]
    assert torch.allclose(found[1], expected, atol=1e-4 * float(expected.abs().max()))
    assert float(terms["augmented"]) == pytest.approx(float(contrast.detach()), rel=1e-5)
    assert float(terms["restraint"]) == pytest.approx(float(restrained.detach()), rel=1e-5)
    assert -1 <= float(terms["augmented_similarity"]) <= 1


def test_bad_numbers_do_not_come_out_plausible() -> None:
    for bad in (math.nan, math.inf):
        a = rows(6, 8, 1)
        a[1, 2] = bad
        assert not restraint(a, rows(6, 8, 2)).isfinite()
