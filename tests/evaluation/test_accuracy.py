"""Accuracy beside what guessing gives."""

import pytest
import torch

from fasttrain.evaluation.accuracy import accuracy, per_class, wilson


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


def test_an_image_that_several_classifiers_ranked_counts_once_for_the_interval() -> None:
    ranked_N1, label_N = torch.tensor([[0], [0], [0], [1]]), torch.zeros(4, dtype=torch.int64)
    assert accuracy(ranked_N1, label_N, 2)[:2] == accuracy(ranked_N1, label_N, 2, draws=2)[:2] == (75.0, None)
    assert accuracy(ranked_N1, label_N, 2, draws=2).low == round(100 * wilson(0.75, 2)[0], 2)
