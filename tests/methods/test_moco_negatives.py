"""MoCo with MEOW's and AdaMEOW's negatives, and what goes with them."""

from typing import Any

import pytest
import torch
from support.steps import build, make, sample, small, take
from torch import Tensor
from torch.nn import functional as F

from fasttrain.jobs.train import seed_step
from fasttrain.losses import reference
from fasttrain.losses.feature_transform import drawn_for, transformed
from fasttrain.losses.queue import InfoNCE

WEIGHTED = pytest.mark.parametrize("name", ["moco, meow", "moco, adameow"])


def rows(n: int, d: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def weights(method: Any, keys: Tensor, queue: Tensor) -> Tensor:
    if hasattr(method.negatives, "of_pairs"):
        return reference.gate_weights(method.negatives(keys[:, None] + queue))
    parts = method.negatives.centroids_CD.split([2, 5])
    own, of_key = (torch.stack([(x @ part.T).argmax(1) for part in parts]) for x in (keys, queue))
    return reference.cluster_weights(own, of_key)


@WEIGHTED
def test_the_contrast_is_by_weights_of_keys_beside_all_regularisers(name: str) -> None:
    options: Any = {"symmetric": True, "cross": "queue", "uniform": "queue", "compactness": 0.3, "cross_weight": 2.0}
    method: Any = build(small(name, **options))
    q, keys = rows(8, 8, 1).requires_grad_(), rows(8, 8, 2)
    method.queue.enqueue(rows(len(method.queue.keys_KD), 8, 3))
    loss, terms = method.loss(q, keys, keys)
    queue = method.queue.keys_KD
    expected = reference.weighted_negatives(q, keys, queue, 0.2, weights(method, keys, queue))
    assert torch.allclose(terms["contrast"], expected, atol=1e-5)
    whole = 0.7 * terms["contrast"] + 0.3 * terms["compactness"] + 2 * terms["cross"] + 0.1 * terms["uniform"]
    assert torch.allclose(loss, whole, atol=1e-5)
    assert {"contrastive_accuracy", "negative_weight", "negatives_counted", "queue_filled"} <= terms.keys()


@WEIGHTED
def test_mixtures_of_keys_weigh_what_both_keys_do(name: str) -> None:
    """With feature transformation; a gate sees the mixture itself, and the image's key as it was."""
    method: Any = build(small(name, feature_transform=True))
    keys = rows(8, 8, 2)
    q = F.normalize(keys + 0.3 * rows(8, 8, 1), dim=1).requires_grad_()
    method.queue.enqueue(rows(len(method.queue.keys_KD), 8, 3))
    queue = method.queue.keys_KD
    seed_step(0, 5, 0)
    drawn, _ = drawn_for(InfoNCE(0.2), q, keys, queue, method.queue.is_full)
    assert drawn.positive > 1.1
    seed_step(0, 5, 0)
    loss, terms = method.loss(q, keys, keys)
    hard, key, new = transformed(q, keys, queue, drawn)
    gamma = weights(method, keys, new)
    if name == "moco, meow":
        whole = weights(method, keys, queue)
        gamma = drawn.negative * whole + (1 - drawn.negative) * whole[:, drawn.order_K]
    expected = reference.weighted_negatives(hard, key, new, 0.2, gamma)
    assert torch.allclose(loss, expected, atol=1e-5)
    one, other = (torch.autograd.grad(value, q, retain_graph=True)[0] for value in (loss, expected))
    assert torch.allclose(one, other, atol=1e-4)
    assert float(terms["positive_similarity"]) == pytest.approx(float((q.detach() * keys).sum(1).mean()), abs=1e-6)
    assert {"score_positive", "score_negative_variance", "negative_weight"} <= terms.keys()


@WEIGHTED
def test_micro_batches_make_a_step(name: str) -> None:
    _method, step = make(name, accumulate=2, batch_size=16)
    for number in range(2):
        assert take(step, sample(16, number), number, 0.05)["loss"].isfinite()
    assert step.skips_3.tolist()[0] == 0


def test_centroids_follow_the_queue() -> None:
    method, step = make("moco, meow", batch_size=16)
    before = method.negatives.centroids_CD.clone()
    take(step, sample(16, 0), 0, 0.05)
    moved = method.negatives.centroids_CD
    assert not (moved == before).all(1).any()
    assert torch.allclose(moved.norm(dim=1), torch.ones(7), atol=1e-6)


def test_weights_begin_once_the_queue_is_full() -> None:
    method, step = make("moco, meow", queue_size=32, batch_size=16)
    found = [float(take(step, sample(16, number), number, 0.01)["negative_weight"]) for number in range(3)]
    assert found[:2] == [2, 2]
    assert 0 < found[2] < 2
    assert bool(method.queue.is_full)


def test_alike_negatives_have_no_network_and_no_state() -> None:
    method: Any = build(small("moco"))
    assert not any(name.startswith("negatives") for name in method.state_dict())
    assert [name for name, _ in method.named_children() if name == "negatives"] == []
