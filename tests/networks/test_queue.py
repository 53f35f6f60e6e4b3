"""How far a queue is filled with keys, over wraps, skipped steps and restarts."""

import pytest
import torch

from fasttrain.networks.queue import Queue


def test_an_empty_queue_is_full_once_its_oldest_row_is_a_key() -> None:
    queue = Queue(6, 3, empty=True)
    found = []
    for count in (4, 1, 1, 4):
        found.append(bool(queue.is_full))
        queue.enqueue(torch.ones(count, 3))
    assert [*found, bool(queue.is_full)] == [False, False, False, True, True]
    assert Queue(6, 3).keys_KD.all()


@pytest.mark.parametrize("empty", [False, True])
def test_the_filled_share_is_that_of_rows_that_are_keys(empty: bool) -> None:
    queue = Queue(6, 3, empty)
    found = [float(queue.filled)]
    for count, good in ((2, True), (2, False), (3, True), (3, True), (9, True)):
        queue.enqueue(torch.ones(count, 3), torch.tensor(good))
        found.append(float(queue.filled))
    assert found == pytest.approx([0, 1 / 3, 1 / 3, 5 / 6, 1, 1])


def test_the_filled_share_goes_on_after_a_restart() -> None:
    queue, again = Queue(6, 3), Queue(6, 3)
    queue.enqueue(torch.ones(2, 3))
    again.load_state_dict(queue.state_dict())
    again.enqueue(torch.ones(1, 3))
    assert float(again.filled) == 0.5


def test_what_was_saved_before_keys_were_counted_is_full_but_for_rows_that_are_0() -> None:
    for queue, filled in ((Queue(6, 3), 1.0), (Queue(6, 3, empty=True), 0.5)):
        queue.enqueue(torch.ones(3, 3))
        state = queue.state_dict()
        del state["written"]
        again = torch.nn.ModuleDict({"queue": Queue(6, 3)})
        again.load_state_dict({f"queue.{name}": value for name, value in state.items()})
        assert float(again["queue"].filled) == filled
        assert set(state) == {"keys_KD", "pointer"}
