"""Long listings: their columns lie in files without a name, memory is bounded, and nothing else is different."""

import os
import pickle
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.forks import finished, with_small_files

from fasttrain.formats.listing import Listing, Sample
from fasttrain.formats.splits import seeded_order, set_apart
from fasttrain.system import columns
from fasttrain.system.cli import finish
from fasttrain.system.columns import Column, spill_folder

COUNT = 5000


@pytest.fixture
def spilling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of columns that are longer than next to nothing."""
    folder = tmp_path / "spilled"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(columns, "SPILL_BYTES", 64)
    return folder


def samples(count: int = COUNT) -> Iterator[Sample]:
    return (Sample(f"näme\udcff{i * i}", i % 7 - 1, (i // 100, i * 512)) for i in range(count))


def spilled_bytes(folder: Path) -> int:
    """Bytes of open files of this process that have no name, but lay in a folder."""
    open_files = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    links = [(path, os.readlink(path)) for path in open_files if path.exists()]
    return sum(path.stat().st_size for path, link in links if link.startswith(str(folder)) and "deleted" in link)


def test_a_listing_on_disk_is_as_one_in_memory(spilling: Path) -> None:
    expected = list(samples())
    listing = Listing(samples())
    assert spilled_bytes(spilling) > 30 * COUNT
    assert list(spilling.iterdir()) == [], "the files have no name: they are gone with the process"
    assert list(listing) == expected
    assert listing[COUNT - 1] == expected[-1] == listing[-1]
    assert listing[10:20] == expected[10:20]
    order = np.random.default_rng(0).permutation(COUNT)[:3000]
    taken = listing.take(order)
    assert list(taken) == [expected[i] for i in order]
    assert taken[5:9] == [expected[i] for i in order[5:9]]
    assert listing.label_N.tolist() == [sample.label for sample in expected]
    assert taken.place_NK.tolist() == [list(expected[i].place) for i in order]
    relabelled = listing.labelled(np.full(part, 3) for part in (1000, COUNT - 1000))
    assert {sample.label for sample in relabelled} == {3}
    assert {sample.label for sample in listing.unlabelled()} == {-1}
    part = listing.take(np.array([7]))
    assert pickle.loads(pickle.dumps(part)) == [expected[7]]
    assert len(pickle.dumps(part)) < 300
    del listing, taken, relabelled, part
    assert spilled_bytes(spilling) == 0, "the disk is free again once nothing needs the listing"


def test_a_short_listing_stays_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    assert list(Listing(samples())) == list(samples())


def test_memory_does_not_grow_with_the_number_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "SPILL_BYTES", 1 << 16)
    monkeypatch.setattr(columns, "_WRITTEN_AT_ONCE", 1 << 16)

    def peak(count: int) -> int:
        tracemalloc.start()
        listing = Listing(samples(count))
        for _ in listing:
            pass
        for _ in listing.labels():
            pass
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(10)
    assert peak(120_000) < 1.2 * peak(40_000)


def test_a_column_that_is_written_over_and_appended_to(spilling: Path) -> None:
    column = Column("i")
    for start in range(0, 1000, 100):
        column.extend(np.arange(start, start + 100))
    assert list(column.values()) == list(range(1000))
    column.replace(500, -1)
    assert [number for block in column.blocks() for number in block.tolist()][499:502] == [499, -1, 501]


def test_columns_go_where_a_disk_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert spill_folder() == str(tmp_path)
    monkeypatch.delenv("TMPDIR")
    assert spill_folder() in ("/var/tmp", "/tmp")


def _list_much() -> int:
    columns.SPILL_BYTES = 1 << 16
    return finish(lambda: len(Listing(samples(100_000))) and 0)


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    done = finished(tmp_path, with_small_files, 1 << 17, _list_much)
    assert done.returncode == 1
    assert "a long listing goes there, TMPDIR names another folder" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("fraction", [0.004, 0.1, 0.5, 0.93])
def test_the_images_set_apart_come_first_in_the_seeded_order(fraction: float) -> None:
    generator = np.random.default_rng(1)
    label_N = np.where(generator.random(COUNT) < 0.9, 0, generator.integers(-1, 30, COUNT))
    listing = Listing(Sample(str(i), label) for i, label in enumerate(label_N.tolist()))
    order_N, expected = seeded_order(COUNT, 5), []
    for label in range(-1, 30):
        of_class = order_N[label_N[order_N] == label]
        expected += of_class[: int(np.round(len(of_class) * fraction))].tolist()
    assert set_apart({"train": listing}, fraction, 5, "here").tolist() == sorted(expected)
