"""SimCLR and SupCon: their networks, what a step does with the views, their options."""

from typing import Any

import pytest
import torch
import torchvision
from support.steps import build, make, sample, small, take
from torch import nn
from torch.nn import functional as F

from fasttrain.config import make_config
from fasttrain.losses.anchored import anchored_margins
from fasttrain.losses.contrast import decoupled, nt_xent, sup_con
from fasttrain.methods import method_options
from fasttrain.networks.encoders import make_encoder
from fasttrain.system.errors import UserError
from fasttrain.views.spec import expanded


def kinds(head: nn.Module) -> list[str]:
    return [type(layer).__name__ for layer in head]


def test_simclr_s_head_has_a_batch_norm_after_each_linear_layer() -> None:
    """google-research/simclr's head, with two layers as in the paper: no linear layer has a bias."""
    head = method_options("simclr")().build(nn.Identity(), 2048).projector
    assert kinds(head) == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    assert [p.shape for p in head.parameters()] == [(2048, 2048), (2048,), (2048,), (128, 2048), (128,), (128,)]


def test_simclr_s_residual_blocks_begin_as_their_shortcuts() -> None:
    encoder: Any = torchvision.models.resnet18()
    make_config("simclr").method.build(encoder, 512)
    assert not encoder.layer1[0].bn2.weight.any()


def test_supcon_s_head_has_one_hidden_layer_and_no_norm() -> None:
    head = method_options("supcon")().build(nn.Identity(), 512).projector
    assert kinds(head) == ["Linear", "ReLU", "Linear"]
    assert [p.shape for p in head.parameters()] == [(2048, 512), (2048,), (128, 2048), (128,)]


@pytest.mark.parametrize("method", ["simclr", "supcon"])
def test_both_views_go_through_the_networks_at_once(method: str) -> None:
    model = build(config := small(method))
    seen = []
    model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    views = sample(8, config=config).views[0]
    model(sample(8, config=config)).loss.backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], torch.cat([views[0], views[1]]))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.dim() > 1)


def embedded(model: nn.Module, views: torch.Tensor) -> torch.Tensor:
    return F.normalize(model.projector(model.encoder(views.flatten(0, 1))), dim=1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, nt_xent),
        ({"decoupled": True}, decoupled),
        ({"decoupled_weighted": True}, lambda a, b, t: decoupled(a, b, t, weighted=True)),
        ({"decoupled": True, "decoupled_weighted": True}, lambda a, b, t: decoupled(a, b, t, weighted=True)),
    ],
)
def test_simclr_s_loss_is_the_one_asked_for(options: dict, expected: object) -> None:
    model = build(small("simclr", temperature=0.3, **options))
    given = sample(8)
    loss, terms, *_ = model(given)
    assert torch.allclose(loss, expected(*embedded(model, given.views[0]).chunk(2), 0.3), atol=1e-6)
    assert torch.equal(terms["contrast"], loss.detach())
    assert not terms["contrast"].requires_grad


def test_supcon_gives_both_views_their_image_s_label() -> None:
    model = build(config := small("supcon", temperature=0.3))
    given = sample(8, config=config)
    rows = embedded(model, given.views[0])
    expected = sup_con(rows, torch.cat([given.label_B, given.label_B]), 0.3)
    assert torch.allclose(model(given).loss, expected, atol=1e-6)
    assert not torch.allclose(model(given._replace(label_B=given.label_B.flip(0) * given.index_B)).loss, expected)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_communities_count_the_images_in_them(temperature: float) -> None:
    """However unsure an image is."""
    model: Any = build(small("simclr", communities=3, temperature=temperature))
    centre_CD = model.centres.rows().detach()
    for place, number in ((torch.zeros(6, dtype=int), 1), (torch.arange(6) % 3, 3)):
        z_ND = centre_CD[place]
        _, terms = model._grouped(z_ND, z_ND, 0.5)
        assert float(terms["communities"]) == pytest.approx(number, abs=1e-5)


def test_a_single_community_is_refused() -> None:
    with pytest.raises(UserError, match="--communities 1 has nothing to be told from"):
        make_config("simclr", communities=1)


def test_margins_beyond_an_anchor_are_those_of_the_encoders_output() -> None:
    """The anchor's by its running statistics, whatever the mode of the method."""
    config = small("simclr, anchor", anchor_weight=0.3, temperature=0.3)
    model: Any = build(config).train()
    given = sample(8)
    plain = make_encoder(config.encoder, 16)[0].eval()
    plain.load_state_dict(model.anchor_encoder.encoder.state_dict())
    loss, terms, *_ = model(given)
    views = given.views[0].flatten(0, 1)
    rows = (F.normalize(encoder(views), dim=1).unflatten(0, (2, 8)) for encoder in (model.encoder, plain))
    margins = anchored_margins(*rows, 0.2, 0.5)
    contrast = nt_xent(*embedded(model, given.views[0]).chunk(2), 0.3)
    assert torch.allclose(loss, contrast + 0.3 * (margins.absolute + margins.relative), atol=1e-5)
    for name, value in zip(("anchor_absolute", "anchor_relative", "anchor_met"), margins, strict=True):
        assert torch.allclose(terms[name], value.detach(), atol=1e-5)


@pytest.mark.parametrize("batch_norm", ["plain", "split", "sync"])
def test_no_step_moves_an_anchor(batch_norm: str) -> None:
    model, step = make("simclr, anchor", batch_norm=batch_norm, optimizer="lars", weight_decay=0.1)
    before = {name: value.clone() for name, value in model.anchor_encoder.state_dict().items()}
    for number in range(2):
        take(step, sample(8, number), number, 0.1)
    assert all(torch.equal(value, before[name]) for name, value in model.anchor_encoder.state_dict().items())
    optimised = {p for group in step.optimizer.param_groups for p in group["params"]}
    assert optimised.isdisjoint(model.anchor_encoder.parameters())
    assert optimised == {p for p in model.parameters() if p.requires_grad}


def test_there_is_no_anchor_but_where_one_is_named() -> None:
    assert not any("anchor" in name for name in build(small("simclr")).state_dict())


def test_settings_are_those_of_the_papers_code() -> None:
    simclr, cifar = make_config("simclr"), make_config("simclr", "cifar10")
    step = simclr.optimisation
    assert (step.optimizer, step.peak_lr, step.batch_size, step.weight_decay) == ("lars", 0.3 * 16, 4096, 1e-6)
    assert (cifar.optimisation.peak_lr, cifar.method.temperature, cifar.optimisation.epochs) == (2.0, 0.5, 1000)
    supcon = make_config("supcon")
    assert (supcon.optimisation.peak_lr, supcon.optimisation.batch_size, supcon.method.temperature) == (0.5, 1024, 0.1)
    solo, factor = make_config("supcon", "imagenet100"), 0.2 / 0.07  # solo-learn's loss is without that factor
    assert solo.optimisation.peak_lr * factor == pytest.approx(0.5, rel=1e-3)
    assert solo.optimisation.weight_decay / factor == pytest.approx(1e-5, rel=2e-3)
    for config in (simclr, supcon):
        assert config.encoder.batch_norm == "sync"
    for spec in expanded(supcon.recipe):
        assert (spec.scale, spec.jitter, spec.blur_p) == ((0.2, 1.0), (0.4, 0.4, 0.4, 0.1), 0.0)
