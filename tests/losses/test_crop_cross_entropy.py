"""The loss of views of several sizes, in fp64: against its formula, published code and closed forms."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fasttrain.losses import reference
from fasttrain.losses.multi_crop import crop_cross_entropy, cross_entropy_terms


def inputs(views: int = 5, images: int = 6, prototypes: int = 11, dim: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, weight = (F.normalize(draw(*shape), dim=-1) for shape in ((views, images, dim), (prototypes, dim)))
    return x.requires_grad_(), weight.requires_grad_(), draw(2, images, prototypes).softmax(2)


@pytest.mark.parametrize("views", [2, 3, 10])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_value_and_gradients_are_those_of_all_pairs(views: int, temperature: float) -> None:
    x, weight, target = inputs(views)
    loss = crop_cross_entropy(x, weight, target, temperature)
    slow = torch.zeros((), dtype=torch.float64)
    for a in range(2):
        for v in range(views):
            if v != a:
                for n in range(x.shape[1]):
                    logits = torch.stack([x[v, n] @ row for row in weight]) / temperature
                    slow = slow - (target[a, n] * (logits - logits.logsumexp(0))).sum()
    slow = slow / (2 * (views - 1) * x.shape[1])  # of the paper: 18 pairs of 2 and 10 views
    assert torch.allclose(loss, slow, atol=1e-12)
    assert torch.allclose(loss, reference.crop_cross_entropy(x, weight, target, temperature), atol=1e-12)
    for fast, expected in zip(*(torch.autograd.grad(value, [x, weight]) for value in (loss, slow)), strict=True):
        assert torch.allclose(fast, expected, atol=1e-12)


def test_uniform_predictions_cost_the_logarithm_of_the_prototypes() -> None:
    for count, expected in ((3000, 8.0063676), (65536, 11.0903549)):
        x, target = torch.ones(3, 2, 1, dtype=torch.float64), torch.rand(2, 2, count, dtype=torch.float64)
        target /= target.sum(2, keepdim=True)
        loss = crop_cross_entropy(x, torch.ones(count, 1, dtype=torch.float64), target, 0.1)
        assert float(loss) == pytest.approx(expected, abs=1e-6)


def test_the_terms_part_the_loss_into_entropy_and_divergence() -> None:
    x, weight, _ = inputs(2)
    same = x[:1].expand(2, -1, -1)
    target = (same.detach() @ weight.detach().T / 0.1).softmax(2)
    terms = cross_entropy_terms(crop_cross_entropy(same, weight, target, 0.1), target)
    assert float(terms["kl"]) == pytest.approx(0, abs=1e-12)
    assert float(terms["entropy"]) == pytest.approx(-float((target * target.log()).sum(2).mean()), abs=1e-12)
    one_hot = F.one_hot(torch.zeros(2, 6, dtype=torch.int64), 11).double()
    assert cross_entropy_terms(torch.ones(()), one_hot)["entropy"] == 0
    assert float(cross_entropy_terms(torch.ones(()), torch.full((2, 6, 11), 1 / 11))["entropy"]) == pytest.approx(
        math.log(11)
    )


def test_under_autocast_only_the_products_are_narrow() -> None:
    x, weight, target = (value.detach().float() for value in inputs(prototypes=500, dim=16))
    exact = crop_cross_entropy(x, weight, target, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = crop_cross_entropy(x, weight, target, 0.1)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(exact), rel=1e-3)


def test_equal_to_lightly_s_losses() -> None:
    """Its SwAV loss, with a queue, and its DINO loss, with a centre."""
    lightly = pytest.importorskip("lightly.loss")
    from fasttrain.losses.distillation import teacher_probabilities
    from fasttrain.losses.swapped import sinkhorn

    x, weight, _ = (value.detach() for value in inputs())
    scores, older = x @ weight.T, F.normalize(torch.randn(2, 9, 4, dtype=torch.float64), dim=2) @ weight.T
    target = sinkhorn(scores[:2], 0.05, older)
    theirs = lightly.SwaVLoss()([*scores[:2]], [*scores[2:]], [*older])
    assert torch.allclose(crop_cross_entropy(x, weight, target, 0.1), theirs, atol=1e-12)

    dino = lightly.DINOLoss(output_dim=11, teacher_temp=0.07)
    dino.center = torch.randn(1, 1, 11, dtype=torch.float64)
    target = teacher_probabilities(scores[:2] * 1.5, dino.center[0, 0], 0.07)
    theirs = dino([*scores[:2] * 1.5], [*scores])
    assert torch.allclose(crop_cross_entropy(x, weight, target, 0.1), theirs, atol=1e-12)
