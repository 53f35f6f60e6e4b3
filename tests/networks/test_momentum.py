"""The queue never loses a key, and the momentum encoder is the average it claims to be."""

import copy

import pytest
import torch
from torch import nn

from fasttrain.networks.momentum import ema_update, momentum_copy
from fasttrain.networks.queue import Queue


def keys(first: int, count: int, dim: int = 3) -> torch.Tensor:
    return torch.arange(first, first + count, dtype=torch.float32)[:, None].expand(count, dim)


@pytest.mark.parametrize("sizes", [[4, 4, 4], [3, 3, 3, 3, 3], [10], [7, 7, 7], [25], [1] * 23, [9, 2, 31, 5]])
def test_queue_holds_the_last_keys_whatever_the_batch_size(sizes: list[int]) -> None:
    queue = Queue(10, 3)
    start = set(queue.keys_KD[:, 0].tolist())
    total = 0
    for size in sizes:
        queue.enqueue(keys(100 + total, size))
        total += size
        held = set(queue.keys_KD[:, 0].tolist())
        newest = {float(100 + i) for i in range(max(0, total - 10), total)}
        assert newest <= held
        assert held - newest <= start
        assert int(queue.pointer) == total % 10


def test_queue_is_part_of_the_state() -> None:
    queue, other = Queue(10, 3), Queue(10, 3)
    queue.enqueue(keys(5, 7))
    other.load_state_dict(queue.state_dict())
    for q in (queue, other):
        q.enqueue(keys(50, 6))
    assert torch.equal(queue.keys_KD, other.keys_KD)
    assert int(other.pointer) == 3


def test_queue_starts_with_unit_rows() -> None:
    assert torch.allclose(Queue(50, 8).keys_KD.norm(dim=1), torch.ones(50))


def test_ema_is_the_weighted_average_of_every_parameter() -> None:
    current = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average = momentum_copy(current)
    assert not any(p.requires_grad for p in average.parameters())
    before = copy.deepcopy(average)
    for p in current.parameters():
        p.data.add_(torch.randn_like(p))
    ema_update(average, current, 0.9)
    for now, was, new in zip(average.parameters(), before.parameters(), current.parameters(), strict=True):
        assert torch.allclose(now, 0.9 * was + 0.1 * new, atol=1e-6)
