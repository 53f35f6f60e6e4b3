"""Clusters that follow a queue: an iteration is one of k-means, alike on all ranks, and none where a step is bad."""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fasttrain.jobs.train import seed_step
from fasttrain.networks import clusters as module
from fasttrain.networks.clusters import Clusters

GOOD = torch.tensor(True)


def rows(n: int, d: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def made(dim: int, *counts: int) -> Clusters:
    torch.manual_seed(0)
    return Clusters(dim, counts)


def follow(clusters: Clusters, queue: Tensor, steps: range) -> None:
    for step in steps:
        seed_step(0, step, 0)
        clusters.follow(queue, GOOD)


def similarity(clusters: Clusters, queue: Tensor) -> Tensor:
    """What spherical k-means raises: of each granularity, the mean cosine of a row with its centroid."""
    parts = clusters.centroids_CD.split(clusters._counts)
    return torch.stack([(queue @ part.T).amax(1).mean() for part in parts])


def test_a_row_is_in_the_cluster_of_the_nearest_centroid() -> None:
    clusters, queue = made(8, 3, 5), rows(40, 8, 1)
    found = clusters.of(queue)
    assert found.dtype == torch.int64
    for found_K, part in zip(found, clusters.centroids_CD.split([3, 5]), strict=True):
        assert torch.equal(found_K, (queue @ part.T).argmax(1))
    assert clusters.of(queue.bfloat16()).shape == (2, 40)


@pytest.mark.parametrize("keys", [8192, 7])
def test_an_iteration_takes_each_centroid_to_the_mean_of_its_rows(keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEYS", keys)
    clusters, queue = made(8, 3, 5), rows(40, 8, 1)
    members, before = clusters.of(queue), clusters.centroids_CD.clone()
    follow(clusters, queue, range(1))
    at = 0
    for count, index_K in zip((3, 5), members, strict=True):
        for cluster in range(count):
            own = queue[index_K == cluster]
            assert len(own)
            assert torch.allclose(clusters.centroids_CD[at], F.normalize(own.mean(0), dim=0), atol=1e-6)
            at += 1
    assert not torch.equal(before, clusters.centroids_CD)


def test_iterations_over_rows_that_stay_never_lower_what_they_raise() -> None:
    clusters, queue = made(8, 2, 4, 12), rows(200, 8, 1)
    values = [similarity(clusters, queue)]
    for step in range(12):
        follow(clusters, queue, range(step, step + 1))
        values.append(similarity(clusters, queue))
    values_SG = torch.stack(values)
    assert (values_SG.diff(dim=0) > -1e-6).all()
    assert (values_SG[-1] > values_SG[0] + 0.05).all()


def test_groups_that_lie_apart_are_found() -> None:
    axes = torch.eye(8)[:4]
    label = torch.arange(80) % 4
    queue = F.normalize(axes[label] + 0.1 * rows(80, 8, 1), dim=1)
    clusters = made(8, 4)
    clusters.centroids_CD.copy_(torch.cat([axes[:1], -axes[:3]]))  # all rows but a quarter in no good place
    follow(clusters, queue, range(40))
    found = clusters.of(queue)[0]
    assert len({(int(a), int(b)) for a, b in zip(label, found, strict=True)}) == 4
    assert similarity(clusters, queue).item() > 0.98


def test_clusters_without_rows_begin_anew_at_rows_of_the_queue() -> None:
    clusters, queue = made(8, 6), F.normalize(rows(40, 8, 1) * 0.2 + torch.eye(8)[0], dim=1)
    clusters.centroids_CD.copy_(-queue[:6])
    clusters.centroids_CD[0] = queue[0]  # which takes all rows
    follow(clusters, queue, range(1))
    assert all((queue == centroid_D).all(1).any() for centroid_D in clusters.centroids_CD[1:])
    assert torch.allclose(clusters.centroids_CD[0], F.normalize(queue.mean(0), dim=0), atol=1e-6)
    assert len(clusters.of(queue).unique()) > 1


def test_what_is_drawn_is_of_the_step_alone() -> None:
    queue = F.normalize(rows(40, 8, 1) * 0.2 + torch.eye(8)[0], dim=1)
    one = made(8, 6, 3)
    one.centroids_CD.copy_(-queue[:9])
    other = copy.deepcopy(one)
    follow(one, queue, range(4))
    for step in range(4):
        seed_step(0, step, rank=3)
        other.follow(queue, GOOD)
    assert torch.equal(one.centroids_CD, other.centroids_CD)


def test_a_bad_step_changes_nothing() -> None:
    clusters = made(8, 6, 3)
    before = clusters.centroids_CD.clone()
    clusters.follow(rows(40, 8, 1), torch.tensor(False))
    assert torch.equal(clusters.centroids_CD, before)


def test_centroids_are_saved_and_stay_wide_beside_a_narrow_queue() -> None:
    clusters = made(8, 6, 3)
    assert list(clusters.state_dict()) == ["centroids_CD"]
    follow(clusters, rows(40, 8, 1).bfloat16(), range(2))
    assert clusters.centroids_CD.dtype == torch.float32
    assert torch.allclose(clusters.centroids_CD.norm(dim=1), torch.ones(9), atol=1e-2)
