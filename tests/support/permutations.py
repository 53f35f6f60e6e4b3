"""Statistics of shuffled orders, each a standard normal number for a uniform one."""

import bisect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

Orders = Sequence[np.ndarray]  # permutations of the same range(n), one for each epoch
BINS = 16


def chi_square(count_K: np.ndarray, expected_K: np.ndarray | float, freedom: int) -> float:
    """As a normal number (Wilson and Hilferty, 1931)."""
    value = float(((count_K - expected_K) ** 2 / expected_K).sum())
    spread = 2 / (9 * freedom)
    return ((value / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def binned(value_N: np.ndarray, n: int) -> np.ndarray:
    return value_N * BINS // n


def lags(n: int) -> tuple[int, ...]:
    """Distances of two places: next to each other, and those that share one half of their number or the other."""
    root = math.isqrt(n - 1) + 1
    return tuple(sorted({1, 2, -(-n // root), root}))


def positions(orders: Orders) -> Iterator[float]:
    """Where an item lands, over the epochs: for the first places, and for some that lie far apart."""
    n = len(orders[0])
    expected_K = np.bincount(binned(np.arange(n), n), minlength=BINS) / n * len(orders)
    for places in (range(min(n, 32)), range(0, n, -(-n // 32))):
        counts = [np.bincount(binned(np.array([order[p] for order in orders]), n), minlength=BINS) for p in places]
        yield chi_square(np.array(counts), expected_K, (BINS - 1) * len(counts))


def distances(orders: Orders) -> Iterator[float]:
    """The difference of two items at a lag, modulo n: each but 0 as often as any other."""
    n = len(orders[0])
    of_bin_K = np.bincount(binned(np.arange(1, n), n), minlength=BINS)
    for lag in lags(n):
        count_K = np.zeros(BINS)
        for order in orders:
            count_K += np.bincount(binned((order[lag:] - order[:-lag]) % n, n), minlength=BINS)
        yield chi_square(count_K, of_bin_K / (n - 1) * (n - lag) * len(orders), BINS - 1)


def pairs(orders: Orders) -> Iterator[float]:
    """Two items at a lag: all combinations of their bins alike, over all of an order."""
    n = len(orders[0])
    of_bin_K = np.bincount(binned(np.arange(n), n), minlength=BINS)
    both_KK = (np.outer(of_bin_K, of_bin_K) - np.diag(of_bin_K)) / (n * (n - 1))
    for lag in lags(n):
        count = np.zeros(BINS * BINS)
        for order in orders:
            count += np.bincount(binned(order[lag:], n) * BINS + binned(order[:-lag], n), minlength=BINS * BINS)
        yield chi_square(count.reshape(BINS, BINS), both_KK * (n - lag) * len(orders), (BINS - 1) ** 2)


def stayed_neighbours(orders: Orders) -> Iterator[float]:
    """How often i and i+1 stand next to each other, either way round: twice an epoch (a Poisson number)."""
    n = len(orders[0])
    count = sum(int((np.abs(np.diff(order)) == 1).sum()) for order in orders)
    expected = len(orders) * 2 * (n - 1) / n
    yield (count - expected) / math.sqrt(expected)


def descents(orders: Orders) -> Iterator[float]:
    """How often an item is smaller than the one before it: mean (n−1)/2, variance (n+1)/12."""
    n = len(orders[0])
    count = sum(int((np.diff(order) < 0).sum()) for order in orders)
    yield (count - len(orders) * (n - 1) / 2) / math.sqrt(len(orders) * (n + 1) / 12)


def inversions(orders: Orders) -> Iterator[float]:
    """Pairs in falling order: mean n(n−1)/4, variance n(n−1)(2n+5)/72."""
    n = len(orders[0])
    count = sum(map(count_inversions, orders))
    yield (count - len(orders) * n * (n - 1) / 4) / math.sqrt(len(orders) * n * (n - 1) * (2 * n + 5) / 72)


def count_inversions(order: np.ndarray) -> int:
    """Bit by bit from the highest: pairs that agree above it, and have 1 before 0 there."""
    count = 0
    for bit in reversed(range(int(len(order) - 1).bit_length())):
        above, ones = order >> (bit + 1), (order >> bit) & 1
        first = np.r_[True, above[1:] != above[:-1]]  # of those that agree, which lie together
        before = np.cumsum(ones) - ones
        in_group = before - np.maximum.accumulate(np.where(first, before, 0))
        count += int(in_group[ones == 0].sum())
        order = order[np.argsort(order >> bit, kind="stable")]
    return count


def longest_rise(order: np.ndarray) -> int:
    """Length of the longest increasing subsequence; its deviation is 0.9018 n^⅙ (Baik, Deift, Johansson, 1999)."""
    ends: list[int] = []
    for item in order.tolist():
        place = bisect.bisect(ends, item)
        ends[place : place + 1] = [item]
    return len(ends)


def fixed_points(orders: Orders) -> Iterator[float]:
    """Places with the same item in two epochs: one for each two of them (a Poisson number)."""
    two = list(itertools.pairwise(orders))
    count = sum(int((first == second).sum()) for first, second in two)
    yield (count - len(two)) / math.sqrt(len(two))


def correlations(orders: Orders) -> Iterator[float]:
    """Spearman's rank correlation of two epochs, √(n−1) times."""
    two, n = list(itertools.pairwise(orders)), len(orders[0])
    middle = (n - 1) / 2
    spread = n * (n * n - 1) / 12
    total = sum(float(((first - middle) * (second - middle)).sum()) / spread for first, second in two)
    yield total * math.sqrt((n - 1) / len(two))


def batch_mates(orders: Orders) -> Iterator[float]:
    """Pairs of items that share a batch in two epochs (nearly a Poisson number)."""
    n = len(orders[0])
    size = min(256, n // BINS)
    n -= n % size
    batch_of = [np.full(len(order), -1) for order in orders]
    for of, order in zip(batch_of, orders, strict=True):
        of[order[:n]] = np.arange(n) // size
    found, epochs = 0, list(itertools.pairwise(batch_of))
    for first, second in epochs:
        both = (first >= 0) & (second >= 0)
        count_K = np.unique(first[both] * n + second[both], return_counts=True)[1]
        found += int((count_K * (count_K - 1) // 2).sum())
    whole = len(orders[0])
    pairs_in_a_batch = n * (size - 1) / 2
    expected = len(epochs) * pairs_in_a_batch**2 / (whole * (whole - 1) / 2)
    yield (found - expected) / math.sqrt(expected)


CHEAP: tuple[Callable[[Orders], Iterator[float]], ...] = (
    positions, distances, pairs, stayed_neighbours, descents, fixed_points, correlations, batch_mates,
)  # fmt: skip
ALL = (*CHEAP, inversions)
