"""Few-shot: which images are drawn, what is fitted to them, and how far the draws lie apart."""

import statistics

import numpy as np
import pytest
import torch
from support.features import drawn, in_memory

from fasttrain.evaluation.accuracy import accuracy
from fasttrain.evaluation.few_shot import drawn_rows, few_shot
from fasttrain.evaluation.ranking import ALONE

CPU = torch.device("cpu")


def test_a_draw_takes_as_many_of_each_class_and_all_of_one_that_has_fewer() -> None:
    label_N = torch.from_numpy(np.random.default_rng(0).permutation(np.repeat([0, 1, 3], (50, 2, 30))))
    rows = drawn_rows(label_N, 5, 0)
    assert label_N[rows].bincount().tolist() == [5, 2, 0, 5]
    assert len(set(rows.tolist())) == len(rows) == 12
    assert np.array_equal(rows, drawn_rows(label_N, 5, 0))
    assert not np.array_equal(rows, drawn_rows(label_N, 5, 1))


def test_every_image_is_drawn_as_often_as_any_other() -> None:
    label_N = torch.arange(40) % 2
    times_N = np.bincount(np.concatenate([drawn_rows(label_N, 5, draw) for draw in range(2000)]), minlength=40)
    assert abs(times_N / 2000 - 0.25).max() < 0.05  # 5 of 20, within five deviations


def test_the_classifier_is_msns() -> None:
    """Logistic regression without intercept on centred, normalised rows, C = 4000; against scikit-learn."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    memory, queries = drawn(200, 4, 0), drawn(100, 4, 1)
    ranked_Nr, _ = few_shot(memory, queries, 4, 10, 1, CPU, ALONE)

    def inputs(values_NF: np.ndarray) -> np.ndarray:
        centred_NF = values_NF.astype(np.float64) - values_NF.mean(1, keepdims=True, dtype=np.float64)
        return centred_NF / np.linalg.norm(centred_NF, axis=1, keepdims=True)

    rows = drawn_rows(memory.label_N, 10, 0)
    other = linear_model.LogisticRegression(C=4000.0, fit_intercept=False, tol=1e-10, max_iter=10_000)
    other.fit(inputs(memory.values_NF[rows]), memory.label_N[rows].numpy())
    assert (ranked_Nr[:, 0].numpy() == other.predict(inputs(queries.values_NF[:]))).mean() > 0.98


def test_the_draws_follow_each_other_and_their_spread_is_in_the_settings() -> None:
    memory, queries = drawn(200, 4, 0), drawn(100, 4, 1)
    ranked_Nr, settings = few_shot(memory, queries, 4, 2, 3, CPU, ALONE)
    tops = [accuracy(part_Nr, queries.label_N, 4).top1 for part_Nr in ranked_Nr.chunk(3)]
    assert len(set(tops)) > 1
    whole = accuracy(ranked_Nr, queries.label_N.repeat(3), 4, draws=3)
    assert whole.top1 == pytest.approx(statistics.fmean(tops), abs=0.01)
    assert settings == {
        "shots": 2, "draws": 3, "classes_with_fewer": 0, "classifier": "logistic regression", "C": 4000.0,
        "intercept": False, "normalised": True, "top1_std": round(statistics.stdev(tops), 2),
    }  # fmt: skip


def test_classes_with_fewer_images_are_counted_and_those_without_are_never_named() -> None:
    label_N = np.repeat([0, 1, 3], (8, 2, 8))
    memory = in_memory(np.eye(4)[label_N], label_N)
    ranked_Nr, settings = few_shot(memory, memory, 4, 5, 1, CPU, ALONE)
    assert accuracy(ranked_Nr, memory.label_N, 4).top1 == 100
    assert not (ranked_Nr == 2).any()
    assert settings["classes_with_fewer"] == 2
    assert "top1_std" not in settings


def test_features_of_zeros_are_no_nan() -> None:
    memory = in_memory(np.zeros((6, 3)), np.arange(6) % 3)
    ranked_Nr, _ = few_shot(memory, memory, 3, 1, 1, CPU, ALONE)
    assert ranked_Nr.tolist() == [[0, 1, 2]] * 6
