"""Reading ahead: blocks are fetched in the order in which they are needed, not too far ahead, and nothing is lost."""

import itertools
import os
import pathlib
import re
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.clock import Clock
from support.loading import Numbers, indices

from fasttrain.evaluation.features import central_views
from fasttrain.formats.manifest import Manifest
from fasttrain.input import LoaderError, Order, Selection, ThreadLoader, evenly, loader, open_dataset, stores
from fasttrain.input.ahead import ReadAhead
from fasttrain.input.blanks import Blanks
from fasttrain.input.stores import BlockStore
from fasttrain.system import sequential, watch
from fasttrain.system.errors import DataError
from fasttrain.system.watch import Watch

STARTS = np.arange(0, 401, 20)


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that blocks are fetched in the order in which they are handed over."""
    monkeypatch.setattr("fasttrain.input.ahead.THREADS", 1)


class Blocks(Numbers):
    """Numbers in blocks of 20, which remembers what was fetched."""

    num_bytes = 400

    def __init__(self, most: int = 2) -> None:
        super().__init__(400)
        self.block_S, self.most, self.fetched = STARTS, most, list[int]()

    def fetch(self, first: int, end: int) -> None:
        assert end - first == 20
        self.fetched.append(first)

    def expect_lanes(self, lanes: int) -> int:
        return self.most


def wait_for(store: Blocks, blocks: int) -> list[int]:
    """What has been fetched, once it is as many blocks or more."""
    deadline = time.monotonic() + 60
    while len(store.fetched) < blocks:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return list(store.fetched)


def reached(store: Blocks, ahead: ReadAhead, order: Order, epoch: int, step: int, blocks: int) -> list[int]:
    """What has been fetched once a loader has come to a step: as many blocks, or more."""
    ahead.reach(order, epoch, step)
    return wait_for(store, blocks)


def needed(order: Order, epoch: int, step: int) -> set[int]:
    """The blocks of a step's samples."""
    return set((order.step(epoch, step) // 20 * 20).tolist())


def ahead_of(store: Blocks) -> ReadAhead:
    assert isinstance(store, BlockStore)
    return ReadAhead(store, Watch("sample", store.place, LoaderError))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("most", [1, 3])
def test_blocks_are_fetched_before_they_are_needed_and_no_more_than_the_store_allows(most: int) -> None:
    store, order = Blocks(most), Order(400, 8, 5, lanes=2, block_S=STARTS)
    ahead, in_use = ahead_of(store), set[tuple[int, int]]()
    for epoch, step in [(epoch, step) for epoch in range(2) for step in range(order.steps_per_epoch)]:
        in_use |= {(epoch, block) for block in needed(order, epoch, step)}
        fetched = reached(store, ahead, order, epoch, step, len(in_use) + most)
        assert len(fetched) == len(in_use) + most  # also over the end of an epoch
        of_this_epoch = {block for of, block in in_use if of == epoch}
        before = sum(of < epoch for of, _ in in_use)
        assert of_this_epoch <= set(fetched[before:])
    ahead.close()


@pytest.mark.usefixtures("one_thread")
def test_a_rank_fetches_what_it_reads_itself() -> None:
    shares = [Order(400, 8, 5, True, rank, 2, 4, STARTS) for rank in range(2)]
    for order in shares:
        store = Blocks(most=1)
        ahead = ahead_of(store)
        own = {block for step in range(order.steps_per_epoch) for block in needed(order, 0, step)}
        for step in range(order.steps_per_epoch):
            ahead.reach(order, 0, step)
        assert set(wait_for(store, len(own) + 1)[: len(own)]) == own  # and one of the next epoch
        assert len(order.own_lanes) == 2
        ahead.close()


@pytest.mark.usefixtures("one_thread")
def test_a_position_that_is_not_the_next_one_begins_anew() -> None:
    store, order = Blocks(most=1), Order(400, 8, 5, lanes=1, block_S=STARTS)
    ahead = ahead_of(store)
    first = list(reached(store, ahead, order, 0, 0, 2))
    assert reached(store, ahead, order, 3, 5, 2 + 2)[2:] != first
    assert set(store.fetched[2:3]) == needed(order, 3, 5)
    reached(store, ahead, order, 0, 0, 2 + 2 + 2)
    assert store.fetched[4:] == first
    ahead.leave()
    assert reached(store, ahead, order, 0, 1, 8)[6:] == first  # what was left begins anew
    ahead.close()


@pytest.mark.usefixtures("one_thread")
def test_without_shuffle_a_pass_is_read_in_file_order_up_to_its_end() -> None:
    store, order = Blocks(most=2), Order(400, 16, shuffle=False, block_S=STARTS)
    ahead = ahead_of(store)
    assert reached(store, ahead, order, 0, 0, 3) == [0, 20, 40]
    for step in range(1, order.steps_per_epoch):
        ahead.reach(order, 0, step)
    assert wait_for(store, 20) == STARTS[:-1].tolist()
    assert reached(store, ahead, order, 1, 0, 21)[20] == 0
    ahead.close()


@pytest.mark.parametrize("order", [Order(400, 16, block_S=STARTS), Order(400, 16, lanes=2, block_S=STARTS)])
def test_where_it_is_of_no_use_no_thread_is_started(order: Order) -> None:
    store = Blocks(most=0 if order.lanes else 2)
    ahead, before = ahead_of(store), threading.active_count()
    for step in range(order.steps_per_epoch):
        ahead.reach(order, 0, step)
    assert threading.active_count() == before
    assert not store.fetched


@pytest.mark.usefixtures("one_thread")
def test_a_loader_reads_ahead_of_its_batches_and_goes_on_where_it_was_left() -> None:
    order = Order(400, 8, 5, lanes=2, block_S=STARTS)
    store = Blocks()
    reader = ThreadLoader(store, order, 1)
    batches = reader.epoch(0)
    for _ in range(10):
        next(batches)
    batches.close()
    reader.load_state_dict({"epoch": 2, "step": 49, "lanes": 2})
    begun = len(store.fetched)
    assert len(indices(reader.epoch(2))) == 1
    assert len(indices(reader.epoch(3))) == 50
    fetched = wait_for(store, begun + 2 + 20 + 2)[begun:]
    assert needed(order, 2, 49) <= set(fetched[:3])
    assert set(fetched[2:]) == set(STARTS[:-1].tolist())
    reader.close()


@pytest.mark.parametrize("error", [DataError("gone"), OSError("gone")])
def test_a_block_that_can_t_be_fetched_is_left_to_whoever_needs_a_sample_of_it(error: Exception) -> None:
    store = Blocks()

    def fetch(first: int, end: int) -> None:
        raise error

    store.fetch = fetch
    reader = ThreadLoader(store, Order(400, 16, lanes=2, block_S=STARTS), 1)
    assert len(indices(reader.epoch(0))) == 25
    assert not reader.failed
    reader.close()


def test_an_unexpected_error_of_a_fetch_is_raised_where_batches_are_asked_for() -> None:
    store, failed = Blocks(), threading.Event()

    def fetch(first: int, end: int) -> None:
        failed.set()
        raise ZeroDivisionError

    store.fetch = fetch
    reader = ThreadLoader(store, Order(400, 16, lanes=2, block_S=STARTS), 1)
    with pytest.raises(ZeroDivisionError):
        [indices(reader.epoch(epoch)) for epoch in range(1000)]
    assert failed.is_set()
    reader.close()


def test_storage_that_hangs_in_a_fetch_is_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for module in (watch, loader):
        monkeypatch.setattr(module, "poll_seconds", lambda: 0.01)
    clock, entered, release = Clock(monkeypatch), threading.Event(), threading.Event()
    store, order = Blocks(), Order(400, 16, lanes=1, block_S=STARTS)
    block = next(order.blocks(0, 0))

    def fetch(first: int, end: int) -> None:
        if first == block.first:
            entered.set()
            release.wait()

    def read(index: int) -> object:  # of a block that never comes
        release.wait()
        return Numbers.read(store, index)

    store.fetch, store.read = fetch, read
    reader = ThreadLoader(store, order, 1)
    messages: list[str] = []

    def train() -> None:
        with pytest.raises(LoaderError) as raised:
            list(reader.epoch(0))
        messages.append(str(raised.value))

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    assert entered.wait(60)
    while "no sample" not in (errors := capfd.readouterr().err):
        clock.passes(4, looks=4)
    assert re.search(rf"no sample for \d+ s .*number {block.first}\b", errors)
    while thread.is_alive():
        clock.passes(4, looks=0)
        thread.join(0.05)
    assert f"number {block.first}" in messages[0]
    release.set()
    reader.close()


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of a file that were read in sequence; out of it, the test fails. A negative number has it all cached,
    as far as the first piece shows."""
    found: list[int] = []

    def preadv(descriptor: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags == os.RWF_NOWAIT:
            if offset < 1000 and found == [-1]:
                return 1
            raise BlockingIOError
        assert found in ([], [-1]) or offset == found[-1] + 1
        count = os.preadv(descriptor, buffers, offset)
        found.extend(range(offset, offset + count))
        return count

    monkeypatch.setattr(sequential, "os", _OsWith(preadv))
    monkeypatch.setattr(sequential, "_PIECE", 1000)
    return found


def test_what_is_in_memory_is_not_read_again(shards: pathlib.Path, read: list[int]) -> None:
    store = open_dataset(shards)
    assert isinstance(store, BlockStore)
    read.append(-1)
    store.fetch(*store.block_S[:2].tolist())
    assert read[:2] == [-1, 1000]


@pytest.mark.parametrize("kind", ["shards", "tar_shards"])
def test_a_block_of_a_folder_is_read_through_from_its_beginning_to_its_end(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, read: list[int]
) -> None:
    path = request.getfixturevalue(kind)
    store = open_dataset(path)
    assert isinstance(store, BlockStore)
    assert len(store.block_S) == 4
    assert [store.expect_lanes(lanes) for lanes in (1, 3, 100)] == [1, 3, 100]
    store.fetch(*store.block_S[1:3].tolist())
    size = (path / Manifest.load(path).splits["train"][1].name).stat().st_size
    assert read == list(range(size))
    monkeypatch.setattr(stores, "BLOCK_SAMPLES", 8)  # a shard is several blocks, as a single file of all images is
    store = open_dataset(path)
    blocks = []
    for first, end in itertools.pairwise(store.block_S[store.block_S <= store.block_S[-1] // 3].tolist()):
        read.clear()
        store.fetch(first, end)
        blocks.append((read[0], read[-1] + 1))
    assert len(blocks) > 2
    assert blocks[0][0] == 0
    assert all(here[1] == following[0] for here, following in itertools.pairwise(blocks))


class _OsWith:
    """The module os, with another preadv."""

    def __init__(self, preadv: object) -> None:
        self.preadv = preadv

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)


def test_nothing_is_read_ahead_that_memory_could_not_keep(
    shards: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_dataset(shards)
    assert isinstance(store, BlockStore)
    block = store.num_bytes / 3
    for blocks, ahead in [(40, 10), (15, 5), (10, 0), (1, 0)]:  # that memory could hold: of it, ten are in use
        monkeypatch.setattr(stores, "machine_memory", lambda: int(2 * blocks * block) + 2)  # noqa: B023
        assert store.expect_lanes(10) == ahead
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(stores, "machine_memory", lambda: int(2 * 30 * block) + 4)
    assert store.expect_lanes(10) == 5


def test_a_selection_of_most_samples_of_some_blocks_reads_these_ahead() -> None:
    store = Blocks()
    most = Selection(store, np.r_[np.arange(45, 80), np.arange(200, 220)])  # of three blocks, without the first five
    assert isinstance(most, BlockStore)
    assert most.block_S.tolist() == [0, 15, 35, 55]
    for first, end in itertools.pairwise(most.block_S.tolist()):
        most.fetch(first, end)
    assert store.fetched == [40, 60, 200]
    assert not isinstance(evenly(store, 20), BlockStore)  # it would read everything
    assert not isinstance(Selection(store, np.arange(400)[::-1]), BlockStore)


def test_an_evaluation_reads_ahead(shards: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[tuple[int, int]] = []
    monkeypatch.setattr(stores.Shards, "fetch", lambda store, first, end: fetched.append((first, end)))
    monkeypatch.setattr(
        "fasttrain.input.ahead.Workers",
        lambda count: SimpleNamespace(submit=lambda call, *rest: call(*rest), close=list),
    )
    size: dict = {"size": 16, "mean": (0.5,) * 3, "std": (0.2,) * 3, "max_failed_fraction": 0.0}
    every = Blanks(Selection(open_dataset(shards), np.arange(72)))
    assert sum(len(b) for b, _ in central_views(every, torch.device("cpu"), batch_size=8, workers=1, **size)) == 72
    starts = open_dataset(shards).block_S.tolist()  # type: ignore[attr-defined]
    assert fetched == list(itertools.pairwise(starts))
