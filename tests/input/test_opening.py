"""Shards open when they are needed, few at a time; what is wrong with one is a line of its samples."""

import dataclasses
import itertools
import os
import pathlib
import resource
import shutil
from collections.abc import Callable

import numpy as np
import pytest
from support.loading import indices

from fasttrain.dataprep.shards import checksum
from fasttrain.formats.beton import BetonReader, BetonWriter
from fasttrain.formats.beton_shard import BetonShard
from fasttrain.formats.manifest import Manifest, ManifestError, Shard, glimpses, spread
from fasttrain.formats.tar import TarShardReader, TarShardWriter
from fasttrain.input import LoaderError, Order, ThreadLoader, datasets, open_dataset, stores
from fasttrain.input.beton_store import ShardStore
from fasttrain.input.tar_store import TarStore
from fasttrain.storage.near import Folder
from fasttrain.system.errors import DataError

STORES = {"ffcv": (BetonShard, ShardStore), "webdataset": (TarShardReader, TarStore)}
PICTURE = bytes(range(48))


def many(folder: pathlib.Path, count: int, rows: int = 2) -> pathlib.Path:
    """A set of `count` shards of `rows` images of 4 × 4 pixels: one real file under many names."""
    folder.mkdir()
    first = folder / "train-00000.beton"
    with BetonWriter(first, rows) as writer:
        for row in range(rows):
            writer.write(PICTURE, 4, 4, row % 2, raw=True)
    for number in range(1, count):
        os.link(first, folder / f"train-{number:05d}.beton")
    size, digest, seen = first.stat().st_size, checksum(first), glimpses(first)
    shards = [Shard(f"train-{number:05d}.beton", rows, size, digest, None, seen) for number in range(count)]
    Manifest("ffcv", ["a", "b"], {"train": shards}, [0.5] * 3, [0.5] * 3, {}, [], {}, {}).save(folder)
    return folder


@pytest.fixture(params=STORES)
def converted(request: pytest.FixtureRequest) -> pathlib.Path:
    """A set of three shards."""
    return request.getfixturevalue("shards" if request.param == "ffcv" else "tar_shards")


def opened(folder: pathlib.Path) -> stores.Shards:
    """The store without the look at its shards that a run begins with."""
    manifest = Manifest.load(folder)
    return STORES[manifest.format][1].of(Folder(folder), manifest, "train")


def counting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of shards, in the order in which they are opened from now on."""
    names: list[str] = []
    for _, store in STORES.values():

        def open_shard(near: Folder, shard: Shard, real: Callable = store.open_shard) -> object:
            names.append(shard.name)
            return real(near, shard)

        monkeypatch.setattr(store, "open_shard", staticmethod(open_shard))
    return names


def mapped(folder: pathlib.Path) -> int:
    """How many files of a folder are mapped into this process."""
    return sum(str(folder) in line for line in pathlib.Path("/proc/self/maps").read_text("utf-8").splitlines())


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_shard_is_opened_when_a_sample_of_it_is_read_and_not_again(
    converted: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = counting(monkeypatch)
    store = opened(converted)
    assert (store.num_samples, names) == (72, [])
    assert store.num_bytes == sum(shard.num_bytes for shard in Manifest.load(converted).splits["train"])
    for index in (0, 1, store.num_samples - 1, 0):
        store.read(index)
    assert [name[:11] for name in names] == ["train-00000", "train-00002"]


def test_no_more_shards_are_mapped_than_may_be_and_none_that_is_used_is_gone(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "OPEN_SHARDS", 3)
    data = many(tmp_path / "data", 40)
    store = opened(data)
    first, before = store.read(0), descriptors()
    for index in range(store.num_samples):
        store.read(index)
        assert mapped(data) <= 4  # with that of the first sample
    assert descriptors() == before
    pixels = np.zeros((4, 4, 3), np.uint8)
    store.write(first, pixels.ctypes.data)
    assert pixels.tobytes() == PICTURE
    del first
    assert mapped(data) == 3
    del store
    assert mapped(data) == 0


def test_more_shards_than_a_process_may_open_files_are_read_by_many_threads(tmp_path: pathlib.Path) -> None:
    data, limits = many(tmp_path / "data", 300), resource.getrlimit(resource.RLIMIT_NOFILE)
    store, before = open_dataset(data, "train"), descriptors()
    loader = ThreadLoader(store, Order(600, 100, seed=1), 4)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 40, limits[1]))
    try:
        assert sorted(itertools.chain(*indices(loader.epoch(0)))) == list(range(600))
        assert mapped(data) == 300
        assert descriptors() == before
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        loader.close()


def test_a_large_set_is_looked_at_here_and_there_before_a_run(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "MOST_TRIED", 8)
    names = counting(monkeypatch)
    data = many(tmp_path / "data", 50)
    store = open_dataset(data, "train")
    assert (store.num_samples, len(names)) == (100, 8)
    assert (names[0], names[-1]) == ("train-00000.beton", "train-00049.beton")
    (data / "train-00020.beton").unlink()  # not one of those
    assert "train-00020.beton" not in names
    with pytest.raises(DataError, match=r"train-00020\.beton: No such file"):
        open_dataset(data, "train").read(40)
    (data / "train-00049.beton").unlink()
    with pytest.raises(ManifestError, match=r"train-00049\.beton: No such file"):
        open_dataset(data, "train")


@pytest.mark.parametrize(
    ("count", "most", "found"), [(5, 9, [0, 1, 2, 3, 4]), (9, 3, [0, 4, 8]), (0, 3, []), (7, 1, [0])]
)
def test_places_are_spread_from_first_to_last(count: int, most: int, found: list[int]) -> None:
    assert spread(count, most) == found


def test_opening_a_thousand_shards_reads_no_table_of_all_samples(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    real = BetonShard.image
    monkeypatch.setattr(BetonShard, "image", lambda shard, row: (rows.append(row), real(shard, row))[1])
    monkeypatch.setattr(BetonShard, "label", lambda *_: 1 / 0)
    monkeypatch.setattr(BetonReader, "__init__", lambda *_: 1 / 0)
    store = open_dataset(many(tmp_path / "data", 1000, 50), "train")
    assert store.num_samples == 50_000
    assert sorted(rows) == [0] * 1000 + [49] * 1000  # the first and the last of each


def test_labels_are_read_where_they_are_asked_for(converted: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = open_dataset(converted, "train").labels(np.arange(72))
    assert set(expected.tolist()) == set(range(4))
    kinds = [reader for reader, _ in STORES.values()]
    asked: list[int] = []
    for kind in kinds:
        real = kind.label
        monkeypatch.setattr(kind, "label", lambda shard, row, real=real: (asked.append(row), real(shard, row))[1])
    store = open_dataset(converted, "train")
    store.read(7)
    assert asked == []
    assert store.labels(np.array([7, 71])).tolist() == expected[[7, 71]].tolist()
    assert len(asked) == 2


# Damage after the start


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def foreign(path: pathlib.Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def fifo(path: pathlib.Path) -> None:
    path.unlink()
    os.mkfifo(path)


def emptied(path: pathlib.Path) -> None:
    path.write_bytes(b"")


HARM = {
    "missing": (lambda path: path.unlink(), "No such file"),
    "truncated": (cut, "truncated"),
    "foreign": (foreign, "not a .beton file"),
    "a FIFO": (fifo, "not a regular file"),
    "empty": (emptied, "empty file"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "not a regular file"),
}


@pytest.mark.parametrize("name", HARM)
def test_a_shard_that_is_harmed_after_the_start_costs_its_samples_one_line_each(
    tmp_path: pathlib.Path, name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(datasets, "MOST_TRIED", 2)
    harm, reason = HARM[name]
    data = many(tmp_path / "data", 20)
    store = open_dataset(data, "train")
    path = data / "train-00010.beton"
    shutil.copy(path, tmp_path / "own")  # the others are links to the same file
    os.replace(tmp_path / "own", path)
    harm(path)
    loader = ThreadLoader(store, Order(40, 10, seed=1), 2)
    batches = list(loader.epoch(0))
    loader.close()
    assert sum(batch.replaced for batch in batches) == 2
    assert sorted(loader.failed) == [f"sample {row} of {path}" for row in range(2)]
    assert all(reason in found and "\n" not in found for found in loader.failed.values())
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("warning: sample ") and str(path) in line for line in lines)


def test_a_shard_that_comes_back_is_read_again(tmp_path: pathlib.Path) -> None:
    store = opened(many(tmp_path / "data", 3))
    path = tmp_path / "data" / "train-00001.beton"
    os.rename(path, tmp_path / "away")
    with pytest.raises(DataError, match="No such file"):
        store.read(2)
    os.rename(tmp_path / "away", path)
    assert store.read(2).height == 4


def test_too_many_samples_of_missing_shards_end_a_run(tmp_path: pathlib.Path) -> None:
    data = many(tmp_path / "data", 50)
    store = opened(data)
    for number in range(25):
        (data / f"train-{number:05d}.beton").unlink()
    loader = ThreadLoader(store, Order(100, 20), 2)
    with pytest.raises(LoaderError, match=r"can't be decoded .*No such file"):
        list(loader.epoch(0))
    loader.close()


def test_a_shard_of_another_number_of_samples_is_refused(tmp_path: pathlib.Path) -> None:
    data = many(tmp_path / "data", 2)
    manifest = Manifest.load(data)
    manifest.splits["train"][1] = dataclasses.replace(manifest.splits["train"][1], num_samples=3)
    manifest.save(data)
    with pytest.raises(ManifestError, match=r"train-00001\.beton holds 2 samples, the manifest says 3"):
        open_dataset(data, "train")


def test_an_index_of_another_number_of_samples_is_refused(tmp_path: pathlib.Path, tar_shards: pathlib.Path) -> None:
    data = shutil.copytree(tar_shards, tmp_path / "data")
    store = opened(data)
    with TarShardWriter(tmp_path / "train-00000.tar") as writer:
        writer.write(b"x", 1, 1, 0)
    shutil.copy(tmp_path / "train-00000.idx", data)
    with pytest.raises(DataError, match=r"train-00000\.tar holds 1 samples, the manifest says"):
        store.read(0)


def test_a_manifest_is_read_once_for_a_start_and_again_when_it_changes(
    shards: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = shutil.copytree(shards, tmp_path / "data")
    loads: list[object] = []
    real = Manifest.load
    monkeypatch.setattr(Manifest, "load", lambda folder: (loads.append(folder), real(folder))[1])
    open_dataset(data, "train")
    open_dataset(data, "val")
    assert datasets.split_names(data) == ("train", "val")
    assert len(loads) == 1
    manifest = real(data)
    manifest.pixel_mean[0] = 0.75
    manifest.save(data)
    assert datasets.pixel_statistics(data, "auto")[0][0] == 0.75
    assert len(loads) == 2


def test_shards_without_samples_are_passed_over(tmp_path: pathlib.Path) -> None:
    folder = many(tmp_path / "set", 4)
    manifest = Manifest.load(folder)
    full, empty = manifest.splits["train"], folder / "none.beton"
    empty.write_bytes(b"anything")
    nothing = [Shard(f"none-{number}.beton", 0, empty.stat().st_size, "") for number in range(3)]
    for shard in nothing:
        os.link(empty, folder / shard.name)
    shards = [nothing[0], *full[:2], nothing[1], *full[2:], nothing[2]]
    dataclasses.replace(manifest, splits={"train": shards}).save(folder)
    store = open_dataset(folder)
    assert isinstance(store, ShardStore)
    assert store.block_S.tolist() == [0, 2, 4, 6, 8]
    for order in (Order(8, 2, lanes=2, block_S=store.block_S), Order(8, 2, shuffle=False, block_S=store.block_S)):
        loader = ThreadLoader(store, order, 1)
        for epoch in range(3):
            assert sorted(itertools.chain(*indices(loader.epoch(epoch)))) == list(range(8))
        loader.close()


class Evicting(Folder):
    """A cache in which a shard makes room for others as soon as it has come, a few times."""

    times = 1

    def path(self, name: str) -> pathlib.Path:
        if self.times:
            type(self).times -= 1
            return self.folder / "gone"
        return super().path(name)

    def capacity(self) -> int:  # type: ignore[override]
        return 1 << 40


def test_a_shard_that_makes_room_for_others_before_it_is_opened_comes_again(converted: pathlib.Path) -> None:
    manifest = Manifest.load(converted)
    Evicting.times = 1
    store = STORES[manifest.format][1].of(Evicting(converted), manifest, "train")
    assert store.read(0).height > 0
    Evicting.times = 9
    with pytest.raises(DataError, match="gone: No such file"):
        store.read(store.num_samples - 1)


def test_shards_of_a_set_elsewhere_stay_open_no_longer_than_the_cache_has_room_for(tmp_path: pathlib.Path) -> None:
    folder = many(tmp_path / "set", 60)
    manifest = Manifest.load(folder)
    Evicting.times = 0
    store = ShardStore.of(Evicting(folder), manifest, "train")
    store._near.capacity = lambda: 40 * store.largest  # type: ignore[method-assign]
    store.expect_lanes(0)
    for index in range(store.num_samples):
        store.read(index)
    assert mapped(folder) == 20
