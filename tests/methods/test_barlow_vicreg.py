"""Barlow Twins and VICReg: networks as their papers have them, views apart, terms and weights, published settings."""

from typing import Any

import pytest
import torch
from support.steps import build, make, sample, small, take
from torch import nn

from fasttrain.config import make_config
from fasttrain.engine.optim import LARS, make_optimizer
from fasttrain.losses.redundancy import barlow, vicreg
from fasttrain.methods.options.barlow import IMAGENET100

BOTH = pytest.mark.parametrize("method", ["barlow", "vicreg"])


@BOTH
def test_the_projector_is_that_of_the_paper(method: str) -> None:
    with torch.device("meta"):  # 150 million weights
        projector = make_config(method).method.build(nn.Flatten(), 2048).projector
    kinds = [type(layer).__name__ for layer in projector]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    widths = [(layer.in_features, layer.out_features) for layer in projector if isinstance(layer, nn.Linear)]
    assert widths == [(2048, 8192), (8192, 8192), (8192, 8192)]
    assert all(layer.bias is None for layer in projector if isinstance(layer, nn.Linear))
    assert sum(p.numel() for p in projector.parameters()) == 8192 * 2048 + 2 * 8192**2 + 2 * 2 * 8192


@BOTH
def test_residual_blocks_begin_as_their_shortcuts(method: str) -> None:
    encoder: Any = build(small(method, arch="resnet18", size=32)).encoder
    assert not encoder.layer1[0].bn2.weight.any()


@BOTH
def test_batch_norm_sees_one_view_at_a_time(method: str) -> None:
    model = build(small(method))
    seen: list[torch.Tensor] = []
    model.encoder.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    views = sample(8).views[0]
    model(sample(8))
    assert len(seen) == 2
    assert all(torch.equal(*pair) for pair in zip(seen, views, strict=True))


def test_the_loss_is_the_weighted_sum_of_its_terms() -> None:
    x, y = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0))
    loss, terms = build(small("barlow", redundancy_weight=0.5)).loss(x, y)
    on, off = barlow(x, y)
    assert terms == {"invariance": on, "redundancy": off}
    assert torch.allclose(loss, on + 0.5 * off)
    weights = {"invariance_weight": 2.0, "variance_weight": 3.0, "covariance_weight": 5.0}
    loss, terms = build(small("vicreg", **weights)).loss(x, y)
    values = vicreg(x, y)
    assert terms == dict(zip(("invariance", "variance", "covariance"), values, strict=True))
    assert torch.allclose(loss, 2 * values[0] + 3 * values[1] + 5 * values[2])


@BOTH
def test_the_loss_is_taken_in_fp32_whatever_the_step_s_precision(method: str) -> None:
    model = build(small(method))
    x, y = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    model.projector = nn.Identity()
    model.encoder = nn.Identity()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(sample(8)._replace(views=(torch.stack([x, y]),))).loss
    assert torch.equal(loss, model.loss(x, y)[0])


@BOTH
def test_steps_lower_the_loss(method: str) -> None:
    _model, step = make(method, optimizer="sgd", batch_size=32)
    losses = [float(take(step, sample(32), number, 0.005)["loss"]) for number in range(20)]
    assert losses[-1] < 0.9 * losses[0]


def test_learning_rates_are_those_of_barlow_twins_code() -> None:
    """0.2 for weights and 0.0048 for biases and norms, for 256 images."""
    config = make_config("barlow")
    assert config.optimisation.peak_lr == pytest.approx(0.2 * 2048 / 256)
    weights, vectors = make_optimizer(config.optimisation, nn.Linear(3, 3)).param_groups
    assert [0.2 * group["lr_factor"] for group in (weights, vectors)] == pytest.approx([0.2, 0.0048])


def test_the_presets_step_is_that_of_a_loss_scaled_as_solo_learn_has_it() -> None:
    """A tenth of the loss, and a weight decay of 1e-4, where --trust is not at its limit."""
    weights = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((6, 5), (6,))]
    moved = []
    for scale, decay, vector_lr in ((0.1, 1e-4, 1.0), (1.0, IMAGENET100["weight_decay"], IMAGENET100["vector_lr"])):
        matrix, vector = (nn.Parameter(weight.clone()) for weight in weights)
        groups = [{"params": [matrix], "weight_decay": decay}, {"params": [vector], "weight_decay": 0.0}]
        optimizer = LARS(groups, lr=0.3, trust=0.02, clipped=True)
        optimizer.param_groups[1]["lr"] = 0.3 * vector_lr
        for _ in range(3):
            optimizer.zero_grad()
            (scale * 50 * ((matrix @ matrix.T).square().sum() + vector.square().sum())).backward()
            optimizer.step()
        moved.append((matrix.detach(), vector.detach()))
    for one, other, start in zip(*moved, weights, strict=True):
        assert torch.allclose(one, other, rtol=1e-5)
        assert not torch.allclose(one, start, rtol=1e-2)
