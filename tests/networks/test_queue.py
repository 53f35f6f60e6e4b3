"""A queue that begins empty."""

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
