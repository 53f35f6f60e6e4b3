"""Hydra: its networks, the pairs of a step, its options."""

from typing import Any

import pytest
import torch
from support.steps import build, sample, small
from torch import nn
from torch.nn import functional as F

from fasttrain.config import make_config
from fasttrain.losses.gated import gated_contrast, paired_labels
from fasttrain.methods import METHODS
from fasttrain.system.collectives import common_generator


def test_the_loss_is_the_mean_of_both_directions_under_one_gate_for_an_image() -> None:
    model: Any = build(config := small("hydra", temperature=0.3))
    given = sample(8, config=config)
    a, b = F.normalize(model.projector(model.encoder(given.views[0].flatten(0, 1))), dim=1).chunk(2)
    common_generator.manual_seed(3)
    paired = paired_labels(given.label_B)
    gate = model.gates(given.label_B, paired)
    both = [gated_contrast(z, k, gate, given.label_B, paired, 0.3) for z, k in ((a, b), (b, a))]
    common_generator.manual_seed(3)
    loss, terms, carry, _ = model(given)
    assert torch.allclose(loss, sum(both) / 2, atol=1e-6)
    assert torch.equal(terms["contrast"], loss.detach())
    assert float(terms["gate"]) == pytest.approx(float(gate.detach().mean()), abs=1e-6)
    assert carry == ()


def test_every_step_draws_other_pairs() -> None:
    model = build(config := small("hydra")).eval()
    given = sample(8, config=config)
    losses = []
    for seed in (0, 1, 0):
        common_generator.manual_seed(seed)
        losses.append(model(given).loss)
    assert torch.equal(losses[0], losses[2])
    assert not torch.allclose(losses[0], losses[1])


def test_gates_are_as_wide_as_embeddings_and_a_table_has_the_classes_that_are_asked_for() -> None:
    model: Any = METHODS["hydra"]().build(nn.Identity(), 2048)
    assert model.gates.classes.weight.shape == (1000, 512)
    assert model.gates.mlp[-1].weight.shape == (256, 1024)
    assert model.projector[-1].num_features == 256
    for preset, classes in (("imagenet100", 100), ("cifar10", 10), ("stl10", 10), ("demo", 10)):
        assert make_config("hydra", preset).method.classes == classes


def test_labels_beyond_the_table_are_classes_of_their_own_all_the_same() -> None:
    """They share a gate, not their positives."""
    model = build(config := small("hydra", classes=2)).eval()
    given = sample(8, config=config)
    common_generator.manual_seed(0)
    four = model(given).loss
    common_generator.manual_seed(0)
    two = model(given._replace(label_B=given.label_B % 2)).loss
    assert four.isfinite()
    assert not torch.allclose(four, two)
