"""A computed shuffle is as even as one that is drawn: numpy's passes the same statistics beside it.

Every seed is fixed, so that the outcome never varies. A statistic is a standard normal number for a uniform shuffle.
One that lies beyond BOUND does so once in 150,000 uniform shuffles; there are about 250 here.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from support.permutations import ALL, CHEAP, Orders, chi_square, distances, fixed_points, longest_rise

from fasttrain.system.shuffle import ROUNDS, round_keys, shuffled

BOUND = 4.5
EPOCHS = {1_000: 600, 10_000: 100, 100_000: 24, 1_000_000: 4}
AWKWARD = [*range(1, 70), 97, 120, 121, 122, 255, 256, 257, 961, 1009, 1023, 1024, 1025, 9973, 10_403, 65_535, 65_537]


@functools.cache
def computed(n: int, rounds: int = ROUNDS) -> list[np.ndarray]:
    """The orders of some epochs."""
    return [shuffled(np.arange(n), n, round_keys(7, epoch)[:rounds]) for epoch in range(EPOCHS.get(n, 400))]


@functools.cache
def drawn(n: int) -> list[np.ndarray]:
    """As many of numpy's."""
    return [np.random.default_rng([7, epoch]).permutation(n) for epoch in range(EPOCHS.get(n, 400))]


def of_size(*sizes: int) -> list:
    return [(n, statistic) for n in sizes for statistic in (ALL if n <= 100_000 else CHEAP)]


@pytest.mark.parametrize("n", AWKWARD)
def test_every_item_comes_once(n: int) -> None:
    for epoch in range(3):
        assert np.sort(shuffled(np.arange(n), n, round_keys(1, epoch))).tolist() == list(range(n))


def test_a_place_has_its_item_whatever_is_asked_for_beside_it() -> None:
    keys = round_keys(3, 1)
    whole = shuffled(np.arange(1009), 1009, keys)
    places = np.array([1008, 0, 512, 512])
    assert shuffled(places, 1009, keys).tolist() == whole[places].tolist()


@pytest.mark.parametrize(("n", "statistic"), of_size(1_000, 10_000, 100_000, 1_000_000))
def test_a_shuffle_is_even(n: int, statistic: Callable[[Orders], Iterator[float]]) -> None:
    assert all(abs(value) < BOUND for value in statistic(computed(n)))
    assert all(abs(value) < BOUND for value in statistic(drawn(n)))


@pytest.mark.parametrize(("n", "statistic"), of_size(521, 1023, 1024, 1025, 2208, 2209, 2210))
def test_a_shuffle_of_an_awkward_number_is_even(n: int, statistic: Callable[[Orders], Iterator[float]]) -> None:
    assert all(abs(value) < BOUND for value in statistic(computed(n)))


@pytest.mark.parametrize("n", [1_000, 1_024, 10_000, 100_000])
def test_the_longest_rise_is_as_long_as_that_of_a_drawn_shuffle(n: int) -> None:
    ours, theirs = (np.mean(list(map(longest_rise, orders))) for orders in (computed(n), drawn(n)))
    assert abs(ours - theirs) < BOUND * 0.9018 * n ** (1 / 6) * math.sqrt(2 / len(computed(n)))


@pytest.mark.parametrize("n", [1_000, 100_000])
@pytest.mark.parametrize("rounds", [2, 3, 4])
def test_the_statistics_see_a_poor_shuffle(n: int, rounds: int) -> None:
    """A network of too few rounds, which is a bijection, too."""
    assert max(abs(value) for statistic in ALL for value in statistic(computed(n, rounds))) > 2 * BOUND


@pytest.mark.parametrize(("rounds", "is_even"), [(6, False), (ROUNDS, True)])
def test_differences_are_even_over_thousands_of_orders_too(rounds: int, is_even: bool) -> None:
    """The mean of a statistic over 20 seeds, of 600 orders each: two rounds fewer can be told there."""
    found = []
    for seed in range(100, 120):
        orders = [shuffled(np.arange(1_000), 1_000, round_keys(seed, epoch)[:rounds]) for epoch in range(600)]
        found.append(list(distances(orders)))
    of_mean = np.abs(np.mean(found, 0)).max() * math.sqrt(len(found))
    assert (of_mean < BOUND) == is_even


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_all_permutations_of_a_few_items_come_alike(n: int) -> None:
    many = 500 * math.factorial(n)
    place_N, set_N = np.tile(np.arange(n), many), np.repeat(np.arange(many), n)
    of_sets = shuffled(place_N, n, round_keys(11), set_N).reshape(many, n)
    epochs = min(6000, 50 * math.factorial(n))
    of_epochs = np.array([shuffled(np.arange(n), n, round_keys(11, epoch)) for epoch in range(epochs)])
    for orders in (of_sets, of_epochs):
        code_N = orders @ n ** np.arange(n)
        all_of_them = np.array(list(itertools.permutations(range(n)))) @ n ** np.arange(n)
        count_K = np.bincount(code_N, minlength=n**n)[all_of_them]
        assert count_K.sum() == len(orders)
        assert abs(chi_square(count_K, len(orders) / len(count_K), len(count_K) - 1)) < BOUND


def test_sets_of_many_sizes_each_have_an_order_of_their_own() -> None:
    size_S = np.random.default_rng(0).integers(1, 70, 3000)
    set_N = np.repeat(np.arange(len(size_S)), size_S)
    place_N = np.concatenate([np.arange(size) for size in size_S])
    found_N = shuffled(place_N, size_S[set_N], round_keys(5, 2), set_N)
    of_set = np.split(found_N, np.cumsum(size_S)[:-1])
    assert all(sorted(found) == list(range(size)) for found, size in zip(of_set, size_S.tolist(), strict=True))
    for size in (8, 33, 64):  # neighbouring sets of a size have nothing to do with each other
        alike = [found for found in of_set if len(found) == size]
        assert len(alike) > 20
        assert all(abs(value) < BOUND for value in fixed_points(alike))
        where = np.bincount([int(np.flatnonzero(found == 0)[0]) * 4 // size for found in alike], minlength=4)
        assert abs(chi_square(where, len(alike) / 4, 3)) < BOUND


def test_blocks_of_the_same_size_have_different_orders_in_an_epoch_and_over_epochs() -> None:
    many, size = 400, 2048
    place_N, set_N = np.tile(np.arange(size), many), np.repeat(np.arange(many), size)
    for keys in (round_keys(5, 0), round_keys(5, 1)):
        orders = list(shuffled(place_N, size, keys, set_N).reshape(many, size))
        assert all(abs(value) < BOUND for statistic in ALL for value in statistic(orders))
