"""A shuffled order that is computed, not stored: a keyed bijection of the numbers below a count.

A Feistel network whose halves are digits, left of `a` and right of `b` values, with a·b little more than the count;
numbers beyond it are sent through again until they lie below (cycle walking), which happens to one in √count (Black and
Rogaway, Ciphers with Arbitrary Finite Domains, 2002). Its rounds add a hash of one half to the other.
"""

from __future__ import annotations

import numpy as np

ROUNDS = 8  # with up to 6, differences of items at a distance show it, if only over thousands of orders; with 7 none
_LEAST = 4  # values of a half: with 3 and 2, some permutations of five items come a third more often than others
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def round_keys(seed: int, *counter: int) -> np.ndarray:
    """Keys of an order, uint64 (ROUNDS,): a function of the seed and of up to three numbers (an epoch, perhaps)."""
    return np.random.Philox(key=seed, counter=[0, *counter, *[0] * (3 - len(counter))]).random_raw(ROUNDS)


def shuffled(
    place_N: np.ndarray, count: int | np.ndarray, keys_R: np.ndarray, set_N: np.ndarray | int = 0
) -> np.ndarray:
    """What stands at these places of a shuffled range(count), int64 (N,). Every place below count has another number.

    Memory and time grow with N alone. count: of all, or (N,) where the places are of several sets, each with an order
    of its own; set_N: the numbers of these sets.
    """
    count_N = np.broadcast_to(np.asarray(count, np.int64), place_N.shape)
    left_N = np.floor(np.sqrt(count_N - 1.0)).astype(np.int64) + 1  # exact, or one more than needed, which does no harm
    left_N = np.maximum(left_N, _LEAST)
    sizes = left_N.astype(np.uint64), np.maximum(-(-count_N // left_N), _LEAST).astype(np.uint64)
    keys_RN = _hash(np.atleast_1d(np.asarray(set_N, np.uint64)) * _GOLDEN + keys_R[:, None])
    keys_RN = np.broadcast_to(keys_RN, (len(keys_R), len(place_N)))
    found_N = _pass(place_N.astype(np.uint64), *sizes, keys_RN)
    while len(outside := np.flatnonzero(found_N >= count_N.astype(np.uint64))):
        found_N[outside] = _pass(found_N[outside], sizes[0][outside], sizes[1][outside], keys_RN[:, outside])
    return found_N.astype(np.int64)


def _pass(number_N: np.ndarray, a_N: np.ndarray, b_N: np.ndarray, keys_RN: np.ndarray) -> np.ndarray:
    """A bijection of the numbers below a·b."""
    left_N, right_N = np.divmod(number_N, b_N)
    for number, key_N in enumerate(keys_RN):
        if number % 2:
            right_N = (right_N + _digit(left_N + key_N, b_N)) % b_N
        else:
            left_N = (left_N + _digit(right_N + key_N, a_N)) % a_N
    return left_N * b_N + right_N


def _digit(x_N: np.ndarray, size_N: np.ndarray) -> np.ndarray:
    """A hash as a number below a size, which has 32 bits at most."""
    return ((_hash(x_N) >> np.uint64(32)) * size_N) >> np.uint64(32)


def _hash(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every bit of 64 depends on every other."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
