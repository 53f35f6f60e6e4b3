"""Accuracy beside what guessing gives, and the neighbours that may vote."""

import numpy as np
import pytest
import torch
from support.features import in_memory

from fasttrain.evaluation.accuracy import accuracy, per_class
from fasttrain.evaluation.knn import knn, neighbours
from fasttrain.evaluation.linear_probe import linear_probe

CPU = torch.device("cpu")


def test_the_majoritys_share_and_the_balanced_form_stand_beside_top1() -> None:
    label_N = torch.tensor([0] * 6 + [2] * 3 + [3])  # no image of class 1
    always_N1 = torch.zeros(10, 1, dtype=torch.int64)
    assert accuracy(always_N1, label_N, 8)[:4] == (60.0, 60.0, 33.33, 60.0)
    assert accuracy(label_N[:, None], label_N, 8)[:4] == (100.0, 100.0, 100.0, 60.0)
    half_N = label_N.clone()
    half_N[[0, 1, 2, 9]] = 7  # a class that no image has
    assert accuracy(torch.stack([half_N, label_N], 1), label_N, 8)[:4] == (60.0, 100.0, 50.0, 60.0)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"), [(0, 10, 0.0, 27.75), (8, 10, 49.02, 94.33), (950, 1000, 93.47, 96.19)]
)
def test_the_interval_is_wilsons(right: int, count: int, low: float, high: float) -> None:
    """The first two as R's prop.test without continuity correction gives them, the third by hand."""
    ranked_N1 = torch.ones(count, 1, dtype=torch.int64)
    ranked_N1[:right] = 0
    assert accuracy(ranked_N1, torch.zeros(count, dtype=torch.int64), 1)[4:] == (low, high)


def test_each_class_that_occurs_has_its_own_accuracy() -> None:
    label_N = torch.tensor([0, 0, 2, 2, 2])
    ranked_N1 = torch.tensor([0, 1, 2, 2, 0])[:, None]
    assert per_class(ranked_N1, label_N, ("a", "b", "c", "d")) == {"a": 50.0, "c": 66.67}


@pytest.mark.parametrize(
    ("counts", "k", "expected"),
    [
        ((100, 60), 0, 13), ((1000, 1400), 0, 200), ((1281,), 0, 200), ((1, 1), 0, 1), ((3, 0, 5), 0, 2),
        ((12, 12), 0, 5), ((100, 60), 7, 7), ((4, 4), 200, 8),
    ],
)  # fmt: skip
def test_neighbours_follow_from_the_set_unless_they_are_given(counts: tuple[int, ...], k: int, expected: int) -> None:
    assert neighbours(torch.repeat_interleave(torch.tensor(counts)), k) == expected


def test_knn_with_its_own_number_of_neighbours_is_not_the_majority_class() -> None:
    """With 200 neighbours of 160 images every image votes, and the most frequent class wins."""
    generator = np.random.default_rng(0)
    label_N = np.repeat(np.arange(4), (70, 30, 30, 30))
    values_NF = np.eye(4)[label_N] + 0.7 * generator.standard_normal((160, 4))
    features = in_memory(values_NF, label_N)
    votes = {k: knn(features, features, 4, neighbours(features.label_N, k), 10.0, CPU) for k in (0, 200)}
    assert accuracy(votes[200], features.label_N, 4)[:3] == (43.75, None, 25.0)
    assert accuracy(votes[0], features.label_N, 4).balanced > 60


def test_a_linear_probe_separates_what_is_separable() -> None:
    label_N = np.arange(200) % 5
    features = in_memory(np.eye(5)[label_N], label_N)
    assert accuracy(linear_probe(features, features, 5, CPU), features.label_N, 5).top1 == 100.0
