"""Weighted kNN: who votes with what weight, and what is named where few do."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.features import drawn, in_memory

from fasttrain.evaluation import knn as module
from fasttrain.evaluation.accuracy import accuracy
from fasttrain.evaluation.features import Features
from fasttrain.evaluation.knn import knn, knn_settings, neighbours
from fasttrain.evaluation.ranking import ALONE

CPU = torch.device("cpu")


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
    features = in_memory(np.eye(4)[label_N] + 0.7 * generator.standard_normal((160, 4)), label_N)
    votes = knn(features, features, 4, [0, 200], [10.0], CPU, ALONE)
    assert set(votes) == {(6, 10.0), (160, 10.0)}
    assert accuracy(votes[160, 10.0], features.label_N, 4)[:3] == (43.75, None, 25.0)
    assert accuracy(votes[6, 10.0], features.label_N, 4).balanced > 60


def by_definition(memory: Features, queries: Features, classes: int, k: int, temperature: float) -> Iterator[list[int]]:
    """Each query's classes with a vote, most votes first, in the order of DINO's eval_knn: Σ exp(s / T) over the k."""
    memory_NF, query_NF = (
        values / np.linalg.norm(values, axis=1, keepdims=True)
        for values in (np.float64(memory.values_NF[:]), np.float64(queries.values_NF[:]))
    )
    for query_F in query_NF:
        similarity_N = memory_NF @ query_F
        nearest = np.argsort(-similarity_N, kind="stable")[:k]
        votes_C = np.zeros(classes)
        np.add.at(votes_C, memory.label_N.numpy()[nearest], np.exp(similarity_N[nearest] / temperature))
        best = [int(c) for c in np.argsort(-votes_C, kind="stable") if votes_C[c] > 0][:5]
        yield best + [-1] * (min(5, classes) - len(best))


def test_every_pair_is_as_the_definition_has_it_though_the_memory_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, rows in (("QUERY_ROWS", 20), ("BLOCK_ROWS", 6), ("MEMORY_ROWS", 17)):  # ragged in every way
        monkeypatch.setattr(module, name, rows)
    memory, queries = drawn(100, 7, 0), drawn(45, 7, 1)
    found = knn(memory, queries, 7, [1, 20, 3], [0.07, 0.5], CPU, ALONE)
    assert list(found) == [(k, t) for k in (1, 3, 20) for t in (0.07, 0.5)]
    for (k, temperature), ranked_Nr in found.items():
        assert ranked_Nr.tolist() == list(by_definition(memory, queries, 7, k, temperature))
        assert (ranked_Nr.dtype, ranked_Nr.device) == (torch.int64, CPU)


def test_more_neighbours_than_images_are_all_of_them_and_the_settings_say_so() -> None:
    memory, queries = drawn(30, 3, 0), drawn(10, 3, 1)
    found = knn(memory, queries, 3, [200, 30], [0.1], CPU, ALONE)
    assert found.keys() == {(30, 0.1)}
    assert knn_settings(memory.label_N, 200, 0.1) == {"k": 30, "k_asked": 200, "temperature": 0.1}
    assert knn_settings(memory.label_N, 20, 0.1) == {"k": 20, "temperature": 0.1}
    assert "k_asked" not in knn_settings(memory.label_N, 0, 0.1)


def test_the_more_neighbours_the_fewer_queries_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, queries, held = drawn(400, 4, 0), drawn(300, 4, 1), []
    whole = knn(memory, queries, 4, [400], [0.1], CPU, ALONE)
    real = module._nearest
    monkeypatch.setattr(module, "BLOCK_ROWS", 16)
    monkeypatch.setattr(module, "KEPT_NEIGHBOURS", 400 * 40)
    monkeypatch.setattr(module, "_nearest", lambda query_QF, *more: held.append(len(query_QF)) or real(query_QF, *more))
    assert torch.equal(knn(memory, queries, 4, [400], [0.1], CPU, ALONE)[400, 0.1], whole[400, 0.1])
    assert held == [32] * 9 + [12]


def test_a_class_without_a_vote_is_not_named_so_that_top5_is_no_luck() -> None:
    memory = in_memory(np.eye(6), np.arange(6))
    ranked_Nr = knn(memory, memory, 6, [1], [0.1], CPU, ALONE)[1, 0.1]
    assert ranked_Nr.tolist() == [[label, -1, -1, -1, -1] for label in range(6)]


def test_classes_with_as_many_votes_are_named_lowest_first() -> None:
    memory = in_memory(np.ones((6, 3)), np.array([4, 2, 0, 4, 2, 0]))
    assert knn(memory, memory, 9, [6], [0.07], CPU, ALONE)[6, 0.07].tolist() == [[0, 2, 4, -1, -1]] * 6


def test_a_very_low_temperature_follows_the_nearest_alone() -> None:
    memory, queries = drawn(60, 4, 0), drawn(40, 4, 1)
    found = knn(memory, queries, 4, [1, 50], [1e-4], CPU, ALONE)
    assert torch.equal(found[1, 1e-4][:, 0], found[50, 1e-4][:, 0])


def test_a_class_of_val_alone_is_never_predicted_and_features_of_zeros_are_no_nan() -> None:
    memory, queries = drawn(40, 3, 0), drawn(20, 3, 1)
    zeros = in_memory(np.zeros((20, 12)), np.full(20, 3))
    for asked in (replace(queries, label_N=torch.full((20,), 3)), zeros):
        ranked_Nr = knn(memory, asked, 4, [5], [0.1], CPU, ALONE)[5, 0.1]
        assert not (ranked_Nr == 3).any()
        assert accuracy(ranked_Nr, asked.label_N, 4).top1 == 0
