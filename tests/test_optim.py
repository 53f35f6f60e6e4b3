"""The learning-rate schedule."""

import pytest

from fasttrain.optim import learning_rate


def test_cosine_from_peak_to_zero():
    assert learning_rate(0, 100, 0, 0.5) == 0.5
    assert learning_rate(50, 100, 0, 0.5) == pytest.approx(0.25)
    assert learning_rate(100, 100, 0, 0.5) == pytest.approx(0)
    assert learning_rate(101, 100, 0, 0.5) == pytest.approx(0)


def test_warm_up_is_linear_and_meets_the_cosine_at_its_peak():
    assert [learning_rate(step, 100, 4, 1.0) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
