"""The loader: threads decode whole images into packed batches, ahead of the training loop. Nothing else happens here.

A planner thread walks the epoch's order. For each step it has the pool read the samples' sizes, lays them out in a free
buffer, and has the pool decode into it. The decoder releases the GIL, so plain threads reach its own speed. Every wait
ends when nothing moves any more (fasttrain/system/watch.py), a worker's exception is raised where the batch is asked
for, and buffers are made once and used again.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fasttrain.input.ahead import ReadAhead
from fasttrain.input.batch import Batch
from fasttrain.input.order import Order
from fasttrain.input.stores import BlockStore, Encoded, Store, label_of
from fasttrain.system.errors import DataError, RunError, printable
from fasttrain.system.watch import STALL_SECONDS, Wait, Watch, poll_seconds
from fasttrain.system.workers import Workers

AHEAD = 3  # batches decoded ahead of the one in use
MAX_FAILED_FRACTION = 0.01  # of the samples asked for so far; above it training stops
MIN_FAILED = 10  # … but not for fewer failures than this
NAMED_FAILURES = 20  # are printed; all are counted
MAX_ATTEMPTS = 20


class LoaderError(RunError):
    """Decoding fails too often, or has stopped."""


class Loader(Protocol):
    """What training asks of a loader. All give the same samples at the same step, for the same Order."""

    num_samples: int
    steps_per_epoch: int

    def epoch(self, n: int) -> Iterator[Batch]:
        """The batches of epoch n from the position on (its start, unless load_state_dict set one inside it)."""

    def state_dict(self) -> dict[str, int]:
        """The position: the epoch and the step in it that comes next, and how the order is shuffled."""

    def load_state_dict(self, state: dict[str, int]) -> None:
        """epoch(state["epoch"]) then starts at state["step"]."""

    def close(self) -> None:
        """Free threads and memory. A second call does nothing."""


class Read(NamedTuple):
    """A sample that was read: its number, what will be decoded, its label (-1: none, or not asked for)."""

    number: int
    encoded: Encoded
    label: int


class Placed(NamedTuple):
    """A sample and where its pixels go in the buffer."""

    number: int
    encoded: Encoded
    label: int
    offset: int


class Failed(NamedTuple):
    """A sample that could not be decoded: its place in the batch, what it is called, and why."""

    place: int
    name: str
    reason: str


class Started(NamedTuple):
    """A batch whose samples are being decoded; index_B: those that the order has there."""

    index_B: np.ndarray
    buffer: Tensor
    placed: list[Placed]
    futures: list[Future]


class ThreadLoader:
    """Iterates a store in an Order. See Batch for what comes out, and for how long it is valid."""

    def __init__(
        self, store: Store, order: Order, workers: int, max_failed_fraction: float = MAX_FAILED_FRACTION,
        labels: bool = False, pinned: bool = False, needs_labels: bool = False,
    ) -> None:  # fmt: skip
        """workers: decoding threads (≥ 1). max_failed_fraction: of the samples asked for; more failing is an error.
        labels: whether they are read. needs_labels: whether a sample without one fails. pinned: decode into page-locked
        memory, from which a GPU copies."""
        self.num_samples, self.steps_per_epoch = store.num_samples, order.steps_per_epoch
        self.failed: dict[str, str] = {}  # sample -> reason, of every one that had to be replaced
        self._store, self._order, self._labels, self._pinned = store, order, labels, pinned
        self._needs_labels = needs_labels
        self._pool = Workers(workers)
        self._parts = 4 * workers  # tasks a batch is cut into, so that threads finish together
        self._asked, self._failures, self._max_failed = 0, 0, max_failed_fraction
        self._epoch, self._next_step = 0, 0
        self._free: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        for _ in range(AHEAD + 1):
            self._free.put(self._new_buffer(1))
        self._lock, self._watch = threading.Lock(), Watch("sample", store.place, LoaderError)
        self._ahead = ReadAhead(store, self._watch) if isinstance(store, BlockStore) else None
        self._stop = threading.Event()
        self._planner: threading.Thread | None = None

    def state_dict(self) -> dict[str, int]:
        """The position: the epoch and the step in it that comes next, and how the order is shuffled."""
        return self._order.position(self._epoch, self._next_step)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """epoch(state["epoch"]) then starts at state["step"]."""
        self._epoch, self._next_step = state["epoch"], state["step"]
        self._order = self._order.continued(state)

    def epoch(self, n: int) -> Iterator[Batch]:
        """The batches of epoch n from the position on (its start, unless load_state_dict set one inside it).

        Raises LoaderError when too many samples fail or none is done for STALL_SECONDS, and whatever a worker raised.
        """
        if n != self._epoch:
            self._epoch, self._next_step = n, 0
        ready: queue.Queue = queue.Queue(AHEAD)
        stop = self._stop = threading.Event()
        planner = self._planner = threading.Thread(
            target=self._plan, args=(n, self._next_step, ready, stop), daemon=True
        )
        planner.start()
        try:
            while (item := self._take(ready)) is not None:
                if isinstance(item, BaseException):
                    raise item
                try:
                    self._next_step += 1
                    yield self._finish(n, item)
                finally:
                    self._give_back(item)
            self._epoch, self._next_step = n + 1, 0
        finally:
            stop.set()
            planner.join(timeout=0 if self._watch.stalled else STALL_SECONDS)
            while not ready.empty():
                if isinstance(item := ready.get(), Started):
                    self._give_back(item)
            if self._ahead and self._epoch == n:  # it was abandoned
                self._ahead.leave()

    def close(self) -> None:
        """Stop the threads. A second call does nothing."""
        self._stop.set()
        if self._planner:  # of an epoch that was abandoned: it would wait for a pool that is closed
            self._planner.join(timeout=0 if self._watch.stalled else STALL_SECONDS)
        if self._ahead:
            self._ahead.close()
        self._pool.close()

    # The planner thread

    def _plan(self, epoch: int, first: int, ready: queue.Queue, stop: threading.Event) -> None:
        try:
            for step in range(first, self.steps_per_epoch):
                if self._ahead:
                    self._ahead.reach(self._order, epoch, step)
                item = self._start(epoch, self._order.step(epoch, step), stop)
                if item is None:
                    return
                if not _put(ready, item, stop):
                    self._give_back(item)
                    return
            _put(ready, None, stop)
        except BaseException as error:  # raised again where the batch is asked for
            _put(ready, error, stop)

    def _start(self, epoch: int, index_B: np.ndarray, stop: threading.Event) -> Started | None:
        """Lay a batch out and start decoding it; None when the epoch was abandoned."""
        self._asked += len(index_B)
        chunks = [chunk.tolist() for chunk in np.array_split(index_B, min(len(index_B), self._parts))]
        reading = [self._pool.submit(self._read, epoch, chunk) for chunk in chunks]
        samples = [read for chunk in reading for read in self._watch.result(chunk)]
        offset_B = np.cumsum([0] + [read.encoded.height * read.encoded.width * 3 for read in samples])
        buffer = self._free_buffer(int(offset_B[-1]), stop)
        if buffer is None:
            return None
        placed = [Placed(*read, int(offset)) for read, offset in zip(samples, offset_B[:-1], strict=True)]
        return Started(index_B, buffer, placed, self._decode(buffer, placed))

    def _decode(self, buffer: Tensor, placed: list[Placed]) -> list[Future[list[Failed]]]:
        """Have the batch's pixels written to their offsets in the buffer."""
        places = np.array_split(np.arange(len(placed)), min(len(placed), self._parts))
        return [self._pool.submit(self._write, buffer, placed, share.tolist()) for share in places]

    def _new_buffer(self, num_bytes: int) -> Tensor:
        """A little larger than asked, as batches differ in size."""
        return torch.empty(num_bytes + num_bytes // 8, dtype=torch.uint8, pin_memory=self._pinned)

    def _free_buffer(self, num_bytes: int, stop: threading.Event) -> Tensor | None:
        """A buffer of at least num_bytes, once the training loop gives one back; None when the epoch was abandoned."""
        while not stop.is_set():
            try:
                buffer = self._free.get(timeout=0.2)
            except queue.Empty:
                continue
            return buffer if len(buffer) >= num_bytes else self._new_buffer(num_bytes)
        return None

    # The workers

    def _read(self, epoch: int, indices: list[int]) -> list[Read]:
        return [self._read_or_substitute(epoch, index) for index in indices]

    def _read_or_substitute(self, epoch: int, index: int, first: int = 0) -> Read:
        for attempt in range(first, MAX_ATTEMPTS):
            chosen = self._order.substitute(epoch, index, attempt) if attempt else index
            with self._watch.at(chosen):
                try:
                    label = label_of(self._store, chosen, self._needs_labels) if self._labels else -1
                    return Read(chosen, self._store.read(chosen), label)
                except (DataError, OSError) as error:
                    name, reason = self._store.name(chosen), str(error)
            self._report(name, reason, is_substitute=attempt > 0)
        raise self._no_substitute(index, name, reason)

    def _write(self, buffer: Tensor, placed: list[Placed], places: list[int]) -> list[Failed]:
        """Decode some of the batch's samples into its buffer (in host memory)."""
        failed, base = [], buffer.data_ptr()
        for place in places:
            number, encoded, _, offset = placed[place]
            with self._watch.at(number):
                try:
                    self._store.write(encoded, base + offset)
                except DataError as error:
                    failed.append(Failed(place, self._store.name(number), str(error)))
        return failed

    def _report(self, name: str, reason: str, is_substitute: bool = False) -> None:
        """Name a sample that can't be decoded, and count it if the order asked for it. Raises LoaderError when too many
        of these can't be."""
        with self._lock:
            self._failures += not is_substitute
            count, new = self._failures, name not in self.failed
            self.failed[name] = reason
        if new:
            warn_of_failed(len(self.failed), name, reason)
        if count > max(MIN_FAILED, self._max_failed * self._asked):
            raise too_many_failed(count, self._asked, name, reason)

    # The consumer

    def _take(self, ready: queue.Queue) -> Started | BaseException | None:
        waiting = Wait()
        while True:
            try:
                return ready.get(timeout=poll_seconds())
            except queue.Empty:
                self._watch.check(waiting)

    def _finish(self, epoch: int, item: Started) -> Batch:
        """Wait for the decoders, put other samples in place of failed ones, and wrap the buffer."""
        asked_B, pixels, placed, futures = item
        failed: list[Failed] = []
        for future in futures:  # all of them, before anything is copied: they write into the buffer
            failed += self._watch.result(future)
        for place, name, reason in failed:
            self._report(name, reason)
            pixels = self._replace(epoch, pixels, placed, place)
        index_B = np.array([sample.number for sample in placed])
        return Batch(
            pixels,
            torch.tensor([sample.offset for sample in placed]),
            torch.tensor([sample.encoded.height for sample in placed], dtype=torch.int32),
            torch.tensor([sample.encoded.width for sample in placed], dtype=torch.int32),
            torch.from_numpy(index_B),
            torch.tensor([sample.label for sample in placed]) if self._labels else None,
            int((index_B != asked_B).sum()),
        )

    def _replace(self, epoch: int, pixels: Tensor, placed: list[Placed], place: int) -> Tensor:
        """Decode another sample behind all others, in a copy of the buffer (its size may differ), for a failed one."""
        decoded = self._pool.submit(self._decode_substitute, epoch, placed[place].number)
        read, image = self._watch.result(decoded)
        placed[place] = Placed(*read, len(pixels))
        return torch.cat([pixels, image.to(pixels.device)])

    def _decode_substitute(self, epoch: int, number: int) -> tuple[Read, Tensor]:
        """A worker's: the first sample that can be decoded, of those that the order puts in place of this one."""
        for attempt in range(1, MAX_ATTEMPTS):
            read = self._read_or_substitute(epoch, number, attempt)
            image = torch.empty(read.encoded.height * read.encoded.width * 3, dtype=torch.uint8)
            if not (failed := self._write(image, [Placed(*read, 0)], [0])):
                return read, image
            self._report(failed[0].name, failed[0].reason, is_substitute=True)
        raise self._no_substitute(number, failed[0].name, failed[0].reason)

    def _no_substitute(self, number: int, name: str, reason: str) -> LoaderError:
        """name, reason: of the last sample that was tried in place of a number."""
        place = self._store.place(number)
        return LoaderError(f"no sample could be decoded in place of {place}; the last: {name}: {reason}")

    def _give_back(self, item: Started) -> None:
        """Take the buffer of a batch back once no worker writes into it; never, if one hangs."""
        for future in item.futures:
            future.cancel()
        if not wait(item.futures, 0 if self._watch.stalled else STALL_SECONDS).not_done:
            self._free.put(item.buffer)


def _put(ready: queue.Queue, item: object, stop: threading.Event) -> bool:
    """Hand an item over unless the epoch was abandoned."""
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.2)
            return True
        except queue.Full:
            continue
    return False


def warn_of_failed(count: int, name: str, reason: str) -> None:
    """Name the count-th sample that can't be decoded, up to a number of them."""
    if count <= NAMED_FAILURES:
        last = "; more of them are only counted" if count == NAMED_FAILURES else ""
        print(printable(f"warning: {name}: {reason}; another takes its place{last}"), file=sys.stderr, flush=True)


def too_many_failed(count: int, total: int, name: str, reason: str) -> LoaderError:
    """The error of a set with more damaged samples than --max-failed-fraction."""
    allow = "--max-failed-fraction allows more"
    return LoaderError(f"{count} of {total} samples can't be decoded ({allow}); the last: {name}: {reason}")
