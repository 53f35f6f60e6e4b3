"""SepCLR: which images are background, its two encoders, what is asked for and refused."""

from typing import Any

import pytest
import torch
from support.steps import build, sample, small
from torch import nn
from torch.nn import functional as F

from fasttrain.config import make_config
from fasttrain.engine.networks import initialise, laid_out
from fasttrain.losses.separation import separation
from fasttrain.methods import METHODS
from fasttrain.networks.recompute import stages
from fasttrain.system.errors import UserError
from fasttrain.views.spec import expanded


def parts_of(model: Any, given: Any, background: torch.Tensor, temperature: float = 0.5) -> Any:
    views = given.views[0].flatten(0, 1)
    c = F.normalize(model.projector(model.encoder(views)), dim=1).unflatten(0, (2, -1))
    s = model.salient_projector(model.salient_encoder(views)).unflatten(0, (2, -1))
    return separation(c, s, background, temperature)


@pytest.mark.parametrize("background", [(0,), (1, 3)])
def test_the_loss_is_the_weighted_sum_of_its_terms(background: tuple[int, ...]) -> None:
    model = build(config := small("sepclr", background=background, temperature=0.3, salient_weight=7.0))
    given = sample(8, config=config)
    is_background = torch.tensor([number % 4 in background for number in range(8)])
    parts = parts_of(model, given, is_background, 0.3)
    loss, terms, carry, _ = model(given)
    assert torch.allclose(loss, parts.common + 7 * (parts.salient + parts.background) + 10 * parts.joint, atol=1e-4)
    assert all(torch.allclose(terms[name], value, atol=1e-5) for name, value in parts._asdict().items())
    assert float(terms["background_share"]) == len(background) / 4
    assert carry == ()


def test_images_without_a_label_are_targets() -> None:
    model = build(config := small("sepclr", background=(0, 1))).eval()
    given = sample(8, config=config)
    label = given.label_B.where(given.label_B < 2, -1)
    assert torch.equal(model(given._replace(label_B=label)).loss, model(given).loss)


def test_without_a_salient_weight_the_common_encoder_learns_all_the_same() -> None:
    """What is left is Wang and Isola's loss of it, and the joint entropy."""
    model: Any = build(config := small("sepclr", salient_weight=0.0))
    given = sample(8, config=config)
    parts = parts_of(model, given, torch.arange(8) % 4 == 0)
    assert torch.allclose(model(given).loss, parts.common + 10 * parts.joint, atol=1e-5)


def test_which_encoder_is_evaluated_is_asked_for_and_changes_no_loss() -> None:
    salient: Any = build(config := small("sepclr"))
    common: Any = build(small("sepclr", evaluated="common"))
    with torch.no_grad():
        for p in salient.salient_encoder.parameters():
            p.mul_(1.1)  # as both begin alike
    common.load_state_dict(salient.state_dict())
    given = sample(8, config=config)
    assert salient.evaluated == (salient.salient_encoder, salient.salient_projector)
    assert common.evaluated == (common.encoder, common.projector)
    one, other = salient(given), common(given)
    assert torch.equal(one.loss, other.loss)
    assert not torch.allclose(one.features_NF, other.features_NF)


def test_both_encoders_begin_alike_and_take_the_weights_that_init_gives() -> None:
    model: Any = build(small("sepclr"))

    def differing() -> list[str]:
        other = model.salient_encoder.state_dict()
        return [name for name, value in model.encoder.state_dict().items() if not torch.equal(value, other[name])]

    assert differing() == []
    with torch.no_grad():
        for p in model.salient_encoder.parameters():
            p.add_(1)
    assert differing() != []
    initialise(model, {name: value + 2 for name, value in model.encoder.state_dict().items()})
    assert differing() == []
    assert not torch.equal(model.projector[0].weight, model.salient_projector[0].weight)


def test_what_is_for_the_encoder_is_for_both() -> None:
    model = laid_out(build(small("sepclr")), torch.device("cpu"), "bf16")
    for name in model.encoders:
        kinds = {type(module) for module in model.get_submodule(name).modules()}
        assert nn.Conv2d not in kinds
        assert stages(model.get_submodule(name))


def test_heads_are_those_of_the_paper_s_code() -> None:
    model: Any = METHODS["sepclr"](background=(0,)).build(nn.Identity(), 2048)
    for head in (model.projector, model.salient_projector):
        assert [type(layer) for layer in head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
        assert head[0].weight.shape == (128, 2048)
        assert head[-1].weight.shape == (32, 128)
        assert head[-1].bias is not None


def test_settings_are_those_of_the_paper_s_code() -> None:
    config = make_config("sepclr", "cifar10")
    assert config.optimisation.peak_lr == pytest.approx(3e-4)
    assert (config.optimisation.optimizer, config.optimisation.weight_decay) == ("adamw", 0)
    assert (config.optimisation.batch_size, config.optimisation.epochs) == (512, 250)
    for spec in expanded(config.recipe):
        assert (spec.scale, spec.jitter, spec.blur_p) == ((0.2, 1.0), (0.4, 0.4, 0.4, 0.1), 0.0)


def test_a_background_has_to_be_named() -> None:
    with pytest.raises(UserError, match="--method sepclr needs --background: the numbers of the classes"):
        build(small("sepclr", background=()))
    with pytest.raises(UserError, match="--background must be at least 0"):
        small("sepclr", background=(-1,))
