"""BaCon's self-balanced contrast: what a step compares, who learns from what, what follows a step."""

from typing import Any

import pytest
import torch
from support.steps import build, make, sample, small, take
from torch import Tensor
from torch.nn import functional as F

from fasttrain.config import make_config
from fasttrain.losses import reference
from fasttrain.losses.self_balanced import class_share


def embedded(model: Any, views: Tensor) -> Tensor:
    return F.normalize(model.projector(model.encoder(views.flatten(0, 1))), dim=1).unflatten(0, (2, -1))


def test_the_loss_is_nt_xent_and_the_balanced_contrast_and_the_prototypes_own() -> None:
    model: Any = build(small("bacon", temperature=0.3, balanced_weight=0.7))
    model.prior_C.copy_(torch.randn(12).softmax(0))
    given = sample(8)
    z = embedded(model, given.views[0])
    scores = (z @ model.prototypes.weight.T).detach()
    p = torch.stack([(view / 0.1).exp() / model.prior_C.sqrt() for view in scores])
    p = (p / p.sum(2, keepdim=True)).mean(0)
    nt_xent, balanced = reference.nt_xent(*z, 0.3), reference.self_balanced(*z, p, 0.3)
    target = torch.stack([reference.sinkhorn(view, 0.05) for view in scores])
    own = reference.crop_cross_entropy(z.detach(), model.prototypes.weight, target, 0.1)
    loss, terms, carry, _ = model(given)
    assert torch.allclose(loss, nt_xent + 0.35 * balanced + own, atol=1e-5)  # half of the run is done
    for name, value in (("contrast", nt_xent), ("balanced", balanced), ("prototypes", own)):
        assert torch.allclose(terms[name], value.detach(), atol=1e-5), name
    assert 1 <= float(terms["positives"]) <= 15
    assert torch.allclose(carry[0], class_share(scores, 0.1)[None], atol=1e-5)


def test_embeddings_learn_from_the_contrasts_and_prototypes_from_their_own_term_alone() -> None:
    model: Any = build(small("bacon"))
    given = sample(8)
    loss = model(given).loss
    encoder, prototypes = model.encoder[1].conv1.weight, model.prototypes.weight
    found = torch.autograd.grad(loss, (encoder, prototypes))
    z = embedded(model, given.views[0])
    scores = (z @ prototypes.T).detach()
    p = (scores / 0.1).softmax(2).mean(0)  # the prior is even at first
    contrast = reference.nt_xent(*z, 0.1) + 0.175 * reference.self_balanced(*z, p, 0.1)
    target = torch.stack([reference.sinkhorn(view, 0.05) for view in scores])
    own = reference.crop_cross_entropy(z.detach(), prototypes, target, 0.1)
    for ours, expected in zip(
        found, (torch.autograd.grad(contrast, encoder)[0], torch.autograd.grad(own, prototypes)[0]), strict=True
    ):
        assert torch.allclose(ours, expected, atol=1e-4 * float(expected.abs().max()) + 1e-6)
        assert expected.abs().max() > 0


def test_prototypes_keep_unit_length_and_the_prior_follows_good_steps_alone() -> None:
    model, step = make("bacon")
    given = sample(8)
    share = model(given).carry[0][0]
    take(step, given, 0, 0.1)
    assert torch.allclose(model.prototypes.weight.norm(dim=1), torch.ones(12))
    assert torch.allclose(model.prior_C, 0.99 / 12 + 0.01 * share, atol=1e-6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    take(step, given._replace(views=(given.views[0] * torch.nan,)), 1, 0.1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("preset", "prototypes"), [("imagenet", 1000), ("imagenet100", 100), ("cifar10", 10)])
def test_there_are_as_many_prototypes_as_classes_and_the_rest_is_simclr_s(preset: str, prototypes: int) -> None:
    ours, simclr = make_config("bacon", preset), make_config("simclr", preset)
    assert ours.method.prototypes == prototypes
    assert ours.optimisation == simclr.optimisation
    assert (ours.method.hidden, ours.method.dim) == (simclr.method.hidden, simclr.method.dim)
