"""ordered and watch: order, bounded memory, errors, and a word about storage that hangs."""

import os
import random
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.clock import Clock

from fasttrain.dataprep import convert
from fasttrain.dataprep.plan import plan_shards, tasks
from fasttrain.formats.beton import BetonReader
from fasttrain.formats.listing import Listing, Sample
from fasttrain.formats.manifest import Manifest
from fasttrain.system import ordered, watch
from fasttrain.system.ordered import stream_in_order


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_order(workers: int) -> None:
    def squares(task: range) -> list[int]:
        time.sleep(random.uniform(0, 0.002))
        return [number**2 for number in task]

    parts = [range(i, i + i % 4) for i in range(100)]  # some give nothing
    expected = [number**2 for part in parts for number in part]
    assert list(stream_in_order(squares, parts, lambda _: 0, workers)) == expected
    assert list(stream_in_order(squares, [], lambda _: 0, workers)) == []


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_ahead_are_bounded_in_bytes(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordered, "BYTES_AHEAD", 100)
    monkeypatch.setattr(ordered, "PORTION_BYTES", 20)
    lock, alive, most = threading.Lock(), 0, 0

    def results(task: int) -> Iterator[tuple[int, int]]:
        nonlocal alive, most
        for i in range(30):  # 300 bytes: none of the tasks fits
            with lock:
                alive += 10
                most = max(most, alive)
            yield task, i

    taken = []
    for result in stream_in_order(results, range(20), lambda _: 10, workers):
        taken.append(result)
        with lock:
            alive -= 10
        time.sleep(0.0005)  # the one who takes them is slower
    assert taken == [(task, i) for task in range(20) for i in range(30)]
    # For each thread what may lie ahead and what it holds; a portion for the task waited for, and the one being taken.
    assert most <= workers * (100 + 20) + 20 + 20


def test_errors_come_where_the_results_would(monkeypatch: pytest.MonkeyPatch) -> None:
    def results(task: int) -> Iterator[int]:
        yield task
        if task == 3:
            raise ValueError("three")

    taken = []
    with pytest.raises(ValueError, match="three"):
        taken.extend(stream_in_order(results, range(100), lambda _: 0, 2))
    before = threading.active_count()
    some = stream_in_order(results, range(100), lambda _: 0, 2)
    assert next(some) == 0
    some.close()
    assert threading.active_count() == before, "no thread is left"


def test_a_thread_that_hangs_keeps_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordered, "PATIENCE_SECONDS", 0.2)
    released = threading.Event()
    some = stream_in_order(lambda task: [task] if task == 0 else released.wait() and [], range(3), lambda _: 0, 1)
    assert next(some) == 0
    some.close()  # one that waited for the thread would never come back
    assert not released.is_set()
    released.set()


def test_pixels_of_many_large_images_are_not_held_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordered, "BYTES_AHEAD", 1 << 22)
    monkeypatch.setattr(ordered, "PORTION_BYTES", 1 << 20)
    (tmp_path / "source").mkdir()
    for i in range(48):  # 3 MB of pixels each, 3 KB of PNG
        Image.new("RGB", (1000, 1000), (i, 0, 0)).save(tmp_path / "source" / f"{i:02d}.png")
    tracemalloc.start()
    assert convert.main([str(tmp_path / "source"), str(tmp_path / "out"), "--write", "raw", "--workers", "2"]) == 0
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 48e6
    reader = BetonReader(tmp_path / "out" / "train-00000.beton")
    assert sorted(reader.data[reader.pointer_N.astype(np.int64)].tolist()) == list(range(48))


def test_tasks_of_pixels_are_smaller() -> None:
    class Reader:
        def size(self, sample: Sample) -> int:
            return 1 << 18

    plan = plan_shards({"train": Listing(Sample(str(i), -1) for i in range(100))}, 70, "ffcv")
    assert [len(task) for task in tasks(Reader(), plan, raw=False)] == [32, 32, 6, 30]
    assert {len(task) for task in tasks(Reader(), plan, raw=True)} == {4, 2}


def test_storage_that_hangs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch, "WARN_SECONDS", 0.2)
    clock = Clock(monkeypatch)
    for i in range(6):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.jpg")
    read, plain = os.read, os.open
    slow: set[int] = set()

    def opened(path: str | Path, flags: int, *arguments: Any, **named: Any) -> int:
        descriptor = plain(path, flags, *arguments, **named)
        (slow.add if str(path).endswith("3.jpg") else slow.discard)(descriptor)
        return descriptor

    def hanging(descriptor: int, size: int) -> bytes:
        if descriptor in slow:
            clock.passes(7.0, looks=3)
        return read(descriptor, size)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "read", hanging)
    assert convert.main([str(tmp_path), str(tmp_path.parent / "hangs-out"), "--workers", "1"]) == 0
    lines = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert lines == ["warning: no image for 7 s, at 3.jpg, train-00000.beton"]
    assert Manifest.load(tmp_path.parent / "hangs-out").num_samples("train") == 6


def test_a_watch_is_quiet_while_something_moves(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch, "WARN_SECONDS", 0.5)
    clock, moving = Clock(monkeypatch), watch.Watch("image", str)
    with moving.patrol():
        for _ in range(12):
            clock.passes(0.4, looks=2)
            moving.moved()
    assert capfd.readouterr().err == ""
    with moving.patrol(), moving.at("a.jpg"):
        clock.passes(1.2, looks=3)
        clock.passes(10.0, looks=3)
    assert capfd.readouterr().err == "warning: no image for 1 s, at a.jpg\n"
