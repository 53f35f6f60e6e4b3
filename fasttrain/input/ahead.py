"""Reading ahead: the blocks that a loader comes to next are fetched before it asks for their samples.

The order tells which blocks this rank needs, and in which step first; the loader tells which step it has come to. What
that step needs, and a bounded number of blocks beyond, goes to a few threads, which call `store.fetch(first, end)`.

A store says how far they may go by `store.expect_lanes(lanes)`: how many blocks may be fetched that no step has needed
yet, where this process reads `lanes` blocks at once; 0 turns reading ahead off. A set in a folder allows one for each
lane, in as far as memory holds them; a cache on a disk allows what it has room for.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator

from fasttrain.input.order import Block, Order
from fasttrain.input.stores import BlockStore
from fasttrain.system.errors import DataError
from fasttrain.system.watch import Watch
from fasttrain.system.workers import Workers

THREADS = 4  # blocks fetched at once: one connection, or one queue of a disk, is seldom all that storage gives


class ReadAhead:
    """Has the blocks near that a loader is about to read. Its methods never wait, and are called from one thread."""

    def __init__(self, store: BlockStore, watch: Watch[int]) -> None:
        """watch: knows by a sample's number which blocks are being fetched, so that a warning names what hangs."""
        self._store, self._watch = store, watch
        self._pool: Workers | None = None  # once there is something to fetch
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._next: tuple[Order, int, int] | None = None  # where the walk goes on
        self._blocks: Iterator[Block] = iter(())
        self._block: Block | None = None  # the first that was not handed over
        self._early: deque[tuple[int, int]] = deque()  # epoch and step that need those handed over before
        self._most = 0

    def reach(self, order: Order, epoch: int, step: int) -> None:
        """The loader comes to a step. Anything but the step after the last one begins anew from there.

        Raises what a fetch raised, unless it is DataError or OSError: the reader meets those at the sample it needs.
        """
        if self._error is not None:
            raise self._error
        if self._next != (order, epoch, step):
            self._begin(order, epoch, step)
        self._next = (order, epoch, step + 1) if step + 1 < order.steps_per_epoch else (order, epoch + 1, 0)
        while self._early and self._early[0] <= (epoch, step):
            self._early.popleft()
        while self._block and self._is_due(self._block, order, epoch, step):
            self._hand_over(self._block, (epoch, step))
            self._block = next(self._blocks, None)

    def leave(self) -> None:
        """What was not begun is not fetched any more; the next step begins anew."""
        self._stop.set()
        self._next = None

    def close(self) -> None:
        """Leave, and let the threads end. A second call does nothing."""
        self.leave()
        if self._pool:
            self._pool.close()
            self._pool = None

    def _begin(self, order: Order, epoch: int, step: int) -> None:
        self.leave()
        self._stop = threading.Event()
        self._early.clear()
        self._most = self._store.expect_lanes(len(order.own_lanes))
        self._blocks = order.blocks(epoch, step) if self._most else iter(())
        self._block = next(self._blocks, None)

    def _is_due(self, block: Block, order: Order, epoch: int, step: int) -> bool:
        if (block.epoch, block.step) <= (epoch, step):
            return True
        goes_on = order.shuffle or block.epoch == epoch  # one who reads in file order mostly does so once
        return goes_on and len(self._early) < self._most

    def _hand_over(self, block: Block, reached: tuple[int, int]) -> None:
        if (block.epoch, block.step) > reached:
            self._early.append((block.epoch, block.step))
        if self._pool is None:
            self._pool = Workers(THREADS)
        self._pool.submit(self._fetch, block, self._stop)

    def _fetch(self, block: Block, stop: threading.Event) -> None:
        if stop.is_set():
            return
        try:
            with self._watch.at(block.first):
                self._store.fetch(block.first, block.end)
        except (DataError, OSError):  # whoever needs one of its samples meets it, and names that
            pass
        except BaseException as error:  # raised where the loader comes by next
            self._error = error
