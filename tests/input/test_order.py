"""Which sample comes when: every one once, the same for any number of ranks, and in blocks where storage wants them."""

import numpy as np
import pytest

from fasttrain.input import Order

SIZES = np.random.default_rng(0).integers(20, 60, 40)
STARTS = np.concatenate([[0], np.cumsum(SIZES)])
COUNT = int(STARTS[-1])


def epoch(order: Order, number: int) -> list[int]:
    """The samples of an epoch, step by step."""
    return np.concatenate([order.step(number, step) for step in range(order.steps_per_epoch)]).tolist()


def block_of(index: int) -> int:
    return int(np.searchsorted(STARTS, index, "right")) - 1


def test_order_is_a_permutation_that_depends_on_seed_and_epoch_alone() -> None:
    order = Order(960, 64, seed=3)
    assert sorted(epoch(order, 5)) == list(range(960))
    assert epoch(order, 5) == epoch(Order(960, 8, seed=3), 5)
    assert epoch(order, 5) != epoch(order, 6)
    assert epoch(order, 5) != epoch(Order(960, 64, seed=4), 5)
    assert (np.diff(epoch(order, 0)) == np.diff(epoch(order, 1))).mean() < 0.05  # not one the other shifted


def test_what_fills_no_batch_is_dropped_and_is_other_samples_in_other_epochs() -> None:
    order = Order(1000, 64, seed=3)
    assert order.steps_per_epoch == 15
    dropped = [set(range(1000)) - set(epoch(order, number)) for number in range(2)]
    assert [len(found) for found in dropped] == [40, 40]
    assert dropped[0] != dropped[1]


@pytest.mark.parametrize("lanes", [0, 1, 3, 64])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_same_global_batch(world_size: int, lanes: int) -> None:
    whole = Order(COUNT, 16, 1, lanes=lanes, block_S=STARTS)
    shares = [Order(COUNT, 16, 1, True, rank, world_size, lanes, STARTS) for rank in range(world_size)]
    for step in (0, 7, whole.steps_per_epoch - 1):
        parts = [share.step(2, step) for share in shares]
        assert np.concatenate(parts).tolist() == whole.step(2, step).tolist()


def test_unshuffled_order_shows_every_sample_once() -> None:
    order = Order(70, 32, shuffle=False)
    assert [len(order.step(0, step)) for step in range(order.steps_per_epoch)] == [32, 32, 6]


@pytest.mark.parametrize("batch_size", [8, 48])
@pytest.mark.parametrize("lanes", [1, 3, 8, 64])
def test_in_blocks_every_sample_comes_once_and_few_blocks_are_read_at_once(lanes: int, batch_size: int) -> None:
    order = Order(COUNT, batch_size, 3, lanes=lanes, block_S=STARTS)
    seen = epoch(order, 0)
    assert len(set(seen)) == len(seen) == order.steps_per_epoch * batch_size
    assert seen != epoch(order, 1)
    blocks = np.array([block_of(index) for index in seen]).reshape(-1, batch_size)
    of_a_lane = -(-batch_size // lanes)
    assert max(len(set(batch)) for batch in blocks.tolist()) <= lanes * (2 + of_a_lane // SIZES.min())


def test_samples_of_a_block_are_shuffled_and_so_is_the_sequence_of_blocks() -> None:
    order = Order(COUNT, 8, 3, lanes=1, block_S=STARTS)
    firsts = []
    for number in range(2):
        seen = epoch(order, number)
        blocks = list(dict.fromkeys(map(block_of, seen)))
        assert blocks != sorted(blocks)
        large = max(blocks[:-1], key=lambda block: SIZES[block])  # the last one may be cut
        rows = [index for index in seen if block_of(index) == large]
        assert sorted(rows) == list(range(STARTS[large], STARTS[large + 1])) != rows
        firsts.append(blocks)
    assert firsts[0] != firsts[1]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("lanes", [0, 4, 8])
def test_the_blocks_to_come_are_told_in_the_order_in_which_a_rank_needs_them(lanes: int, world_size: int) -> None:
    for rank in range(world_size):
        order = Order(COUNT, 16, 1, lanes > 0, rank, world_size, lanes, STARTS)
        first = 5
        needed: dict[int, int] = {}
        for step in range(first, order.steps_per_epoch):
            for index in order.step(1, step).tolist():
                needed.setdefault(block_of(index), step)
        told: dict[int, int] = {}
        for block in order.blocks(1, first):
            if block.epoch > 1:
                break
            told.setdefault(block_of(block.first), block.step)
        assert list(told.values()) == sorted(told.values())
        assert set(needed) <= set(told)
        assert all(told[block] <= step for block, step in needed.items())
        if lanes:  # no rank is told of what others read
            assert set(told) == set(needed)


def test_a_global_shuffle_has_no_blocks_to_come() -> None:
    assert list(Order(COUNT, 16, block_S=STARTS).blocks(0, 0)) == []


def test_an_order_goes_on_as_it_was_saved_whatever_it_would_choose_now() -> None:
    block = Order(COUNT, 16, 1, lanes=4, block_S=STARTS)
    globally = Order(COUNT, 16, 1, block_S=STARTS)
    assert epoch(globally.continued(block.position(1, 3)), 1) == epoch(block, 1)
    assert epoch(block.continued(globally.position(1, 3)), 1) == epoch(globally, 1)
