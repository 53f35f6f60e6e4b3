"""MEOW and AdaMEOW: their formulas, their limits, what takes a gradient, and rows that no negative is left to."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fasttrain.config import make_config
from fasttrain.losses import reference, weighted_negatives
from fasttrain.losses.queue import Decoupled, queue_terms
from fasttrain.losses.weighted_negatives import clustered_contrast, gated_contrast
from fasttrain.networks.pair_gate import PairGate
from fasttrain.system.errors import UserError

FULL = torch.tensor(True)


def rows(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)


def inputs(n: int = 6, k: int = 40, d: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    return rows(n, d, 1).requires_grad_(), rows(n, d, 2), rows(k, d, 3)


def clusters(count: int, seed: int, *sizes: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(size, (count,), generator=generator) for size in sizes])


def gate(dim: int = 16) -> PairGate:
    torch.manual_seed(5)
    return PairGate(dim).double()


@pytest.fixture(params=[2**20, 42, 1], ids=["one tile", "several tiles", "a key a tile"])
def _tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weighted_negatives, "PAIRS", request.param)


def slow(q: Tensor, keys: Tensor, queue: Tensor, temperature: float, weight: Callable[[int, int], Tensor]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(q)):
        among = sum(weight(i, j) * (q[i] @ queue[j] / temperature).exp() for j in range(len(queue)))
        total = total + (torch.as_tensor(among).log() - q[i] @ keys[i] / temperature) / len(q)
    return total


def assert_same(ours: Tensor, theirs: Tensor, *inputs: Tensor) -> None:
    assert torch.allclose(ours, theirs, atol=1e-12)
    gradients = (torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (ours, theirs))
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-11)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_value_and_gradient_by_clusters(temperature: float) -> None:
    q, keys, queue = inputs()
    own, of_key = clusters(6, 1, 2, 5), clusters(40, 2, 2, 5)
    ours, _ = clustered_contrast(q, keys, queue, temperature, own, of_key, FULL)
    assert_same(ours, slow(q, keys, queue, temperature, lambda i, j: (own[:, i] != of_key[:, j]).sum()), q)
    weight_NK = reference.cluster_weights(own, of_key)
    assert_same(ours, reference.weighted_negatives(q, keys, queue, temperature, weight_NK), q)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_value_and_gradient_by_a_gate(temperature: float) -> None:
    q, keys, queue = inputs()
    network = gate()
    ours, _ = gated_contrast(q, keys, queue, temperature, network.of_pairs, keys)
    means = [torch.stack([network(keys[i] + y).sigmoid() for y in queue]).mean() for i in range(6)]
    expected = slow(q, keys, queue, temperature, lambda i, j: network(keys[i] + queue[j]).sigmoid() / means[i])
    assert_same(ours, expected, q, *network.parameters())
    weight_NK = reference.gate_weights(network(keys[:, None] + queue))
    assert torch.allclose(weight_NK.mean(1), torch.ones(6, dtype=torch.float64))
    plain = reference.weighted_negatives(q, keys, queue, temperature, weight_NK)
    assert_same(ours, plain, q, *network.parameters())


def test_a_gate_of_pairs_is_the_network_of_their_sum() -> None:
    z, y = rows(5, 16, 1), rows(7, 16, 2)
    network = gate()
    assert torch.allclose(network.of_pairs(z, y), network(z[:, None] + y), atol=1e-12)
    assert torch.allclose(network.of_pairs(z, y), network.of_pairs(y, z).T, atol=1e-12)


@pytest.mark.usefixtures("_tiles")
def test_no_gradient_reaches_a_key_the_queue_or_the_query_through_a_weight() -> None:
    q, keys, queue = (x.detach().requires_grad_() for x in inputs())
    network = gate()
    loss, figures = gated_contrast(q, keys, queue, 0.2, network.of_pairs, keys)
    loss.backward()
    assert torch.allclose(keys.grad, -q.detach() / 0.2 / len(q), atol=1e-12)  # that of s⁺ alone
    assert queue.grad is None
    fixed = reference.gate_weights(network(keys[:, None] + queue)).detach()
    (expected,) = torch.autograd.grad(reference.weighted_negatives(q, keys, queue, 0.2, fixed), q)
    assert torch.allclose(q.grad, expected, atol=1e-12)
    assert not any(figure.requires_grad for figure in figures.values())


@pytest.mark.parametrize("granularities", [1, 3])
def test_keys_in_clusters_of_their_own_are_decoupled_info_nce(granularities: int) -> None:
    q, keys, queue = inputs()
    own, of_key = torch.arange(6).expand(granularities, -1), torch.arange(6, 46).expand(granularities, -1)
    ours, figures = clustered_contrast(q, keys, queue, 0.2, own, of_key, FULL)
    assert_same(ours, queue_terms([Decoupled(0.2)], q, keys, queue)[0] + math.log(granularities), q)
    assert float(figures["negative_weight"]) == pytest.approx(granularities)
    assert float(figures["negatives_counted"]) == pytest.approx(1)


def test_a_gate_that_is_alike_for_all_is_decoupled_info_nce_however_far_it_closes() -> None:
    q, keys, queue = inputs()
    for bias in (0.0, -200.0):
        network = gate()
        torch.nn.init.zeros_(network.outer.weight)
        torch.nn.init.constant_(network.outer.bias, bias)
        ours, figures = gated_contrast(q, keys, queue, 0.2, network.of_pairs, keys)
        assert_same(ours, queue_terms([Decoupled(0.2)], q, keys, queue)[0], q)
        assert float(figures["negatives_counted"]) == pytest.approx(1)


def test_a_gate_leaves_two_fifths_of_the_negatives_whatever_it_learns() -> None:
    q, keys, queue = inputs()
    network = gate()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=100, generator=torch.Generator().manual_seed(5))
    x = network(keys[:, None] + queue)
    assert 1.9 < float(x.detach().abs().max()) <= 2
    figures = gated_contrast(q, keys, queue, 0.2, network.of_pairs, keys)[1]
    assert float(figures["negatives_counted"]) > 0.41


@pytest.mark.usefixtures("_tiles")
def test_a_query_that_shares_all_clusters_with_all_keys_takes_all_alike() -> None:
    q, keys, queue = inputs()
    one = torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 40, dtype=torch.int64)
    expected = queue_terms([Decoupled(0.2)], q, keys, queue)[0] + math.log(2)
    assert_same(clustered_contrast(q, keys, queue, 0.2, *one, FULL)[0], expected, q)
    own = one[0].clone()
    own[1, 2] = 1  # of this query alone a clustering tells all keys
    ours, _ = clustered_contrast(q, keys, queue, 0.2, own, one[1], FULL)
    assert_same(ours, expected - math.log(2) / 6, q)


@pytest.mark.usefixtures("_tiles")
def test_until_the_queue_is_full_all_negatives_weigh_alike() -> None:
    q, keys, queue = inputs()
    ids = clusters(6, 1, 2, 5), clusters(40, 2, 2, 5)
    ours, _ = clustered_contrast(q, keys, queue, 0.2, *ids, torch.tensor(False))
    assert_same(ours, queue_terms([Decoupled(0.2)], q, keys, queue)[0] + math.log(2), q)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("temperature", [0.005, 0.2])
def test_the_nearest_negatives_may_weigh_nothing_at_any_temperature(temperature: float) -> None:
    """They are 400 nats above the one that counts."""
    q, keys, _ = inputs()
    queue = torch.cat([q[:1].detach(), -q[:1].detach()]).repeat_interleave(torch.tensor([39, 1]), 0)
    of_key = torch.zeros(1, 40, dtype=torch.int64)
    of_key[0, 39] = 1
    ours, _ = clustered_contrast(
        q[:1], keys[:1], queue, temperature, torch.zeros(1, 1, dtype=torch.int64), of_key, FULL
    )
    assert_same(ours, (q[0] @ queue[39] - q[0] @ keys[0]) / temperature, q)


def test_figures_are_of_the_rows_as_they_are_and_of_the_weights() -> None:
    q, keys, queue = inputs()
    ids = clusters(6, 1, 2, 5), clusters(40, 2, 2, 5)
    network = gate()
    by_clusters, by_gate = (
        clustered_contrast(q, keys, queue, 0.2, *ids, FULL)[1],
        gated_contrast(q, keys, queue, 0.2, network.of_pairs, keys)[1],
    )
    q = q.detach()
    cosine = q @ queue.T
    for figures in (by_clusters, by_gate):
        nearest = ((q * keys).sum(1) > cosine.amax(1)).double().mean()
        assert float(figures["contrastive_accuracy"]) == pytest.approx(float(nearest))
        assert float(figures["positive_similarity"]) == pytest.approx(float((q * keys).sum(1).mean()))
        assert float(figures["negative_similarity"]) == pytest.approx(float(cosine.mean()))
    for figures, gamma in (
        (by_clusters, reference.cluster_weights(*ids).double()),
        (by_gate, network(keys[:, None] + queue).sigmoid().detach()),
    ):
        assert float(figures["negative_weight"]) == pytest.approx(float(gamma.mean()))
        counted = (gamma.sum(1).square() / gamma.square().sum(1) / 40).mean()
        assert float(figures["negatives_counted"]) == pytest.approx(float(counted))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_numbers_do_not_come_out_plausible(bad: float) -> None:
    q, keys, queue = (x.detach() for x in inputs())
    q[1, 2] = bad
    ids = clusters(6, 1, 2, 5), clusters(40, 2, 2, 5)
    assert not clustered_contrast(q, keys, queue, 0.2, *ids, FULL)[0].isfinite()
    assert not gated_contrast(q, keys, queue, 0.2, gate().of_pairs, keys)[0].isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_narrow_queue_stays_close_to_fp64(dtype: torch.dtype) -> None:
    q, keys, queue = inputs(17, 130, 32)
    ids = clusters(17, 1, 2, 5), clusters(130, 2, 2, 5)
    network = gate(32)
    narrow = q.detach().float().requires_grad_()
    given, most = (narrow, keys.float(), queue.to(dtype), 0.2), {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    for ours, exact in (
        (clustered_contrast(*given, *ids, FULL)[0], clustered_contrast(q, keys, queue, 0.2, *ids, FULL)[0]),
        (
            gated_contrast(*given, gate(32).float().of_pairs, given[1])[0],
            gated_contrast(q, keys, queue, 0.2, network.of_pairs, keys)[0],
        ),
    ):
        assert ours.dtype == torch.float32
        assert torch.allclose(ours.double(), exact, atol=most)
        gradients = torch.autograd.grad(ours, narrow)[0].double(), torch.autograd.grad(exact, q)[0]
        assert (gradients[0] - gradients[1]).abs().max() <= most * gradients[1].abs().max()


@pytest.mark.parametrize("negatives", ["meow", "adameow"])
@pytest.mark.parametrize("other", ["decoupled", "decoupled_weighted"])
def test_what_does_not_go_with_weights_is_refused(negatives: str, other: str) -> None:
    with pytest.raises(UserError, match=f"--negatives {negatives} .* leave out --{other.replace('_', '-')}$"):
        make_config("moco", negatives=negatives, **{other: True})


@pytest.mark.parametrize("clusters", [(), (1,), (20, 1)])
def test_a_clustering_that_parts_nothing_is_refused(clusters: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="--negatives meow needs a clustering"):
        make_config("moco", negatives="meow", clusters=clusters)
