"""The loader: order, resume, sharing between ranks, equal pixels from every store, and what happens on faults."""

import pathlib
import re
import shutil
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from support.clock import Clock
from support.loading import Numbers, images, indices

from fasttrain.dataprep.verify import main as verify
from fasttrain.formats.beton import BetonReader
from fasttrain.formats.image import read_rgb
from fasttrain.input import Batch, LoaderError, Order, ThreadLoader, loader, open_dataset
from fasttrain.system import watch
from fasttrain.system.errors import DataError


def test_folder_and_shards_give_the_files_own_pixels(image_folder: pathlib.Path, shards: pathlib.Path) -> None:
    """Shards are shuffled, so images are matched by their content."""
    for split in ("train", "val"):
        files = {read_rgb(p.read_bytes()).tobytes(): p.parent.name for p in (image_folder / split).rglob("*.jpg")}
        for path in (image_folder, shards):
            store = open_dataset(path, split)
            reader = ThreadLoader(store, Order(store.num_samples, 16, shuffle=False), 3, labels=True)
            seen = {px.tobytes(): store.classes[label] for batch in reader.epoch(0) for _, label, px in images(batch)}
            assert seen == files
            reader.close()


def test_batches_follow_the_order_and_buffers_are_not_mixed_up() -> None:
    reader = ThreadLoader(Numbers(100), Order(100, 16, seed=2), 2)
    order = Order(100, 16, seed=2)
    for epoch in (0, 3):
        for step, batch in enumerate(reader.epoch(epoch)):
            assert batch.index_B.tolist() == order.step(epoch, step).tolist()
            assert all((pixels == index % 251).all() for index, _, pixels in images(batch))
    reader.close()


def test_resume_inside_an_epoch_gives_the_rest_of_it() -> None:
    whole = ThreadLoader(Numbers(100), Order(100, 16, seed=2), 2)
    expected = indices(whole.epoch(4))
    batches = whole.epoch(5)
    for _ in range(3):
        next(batches)
    state = whole.state_dict()
    assert state == {"epoch": 5, "step": 3, "lanes": 0}
    rest = [batch.index_B.tolist() for batch in batches]
    resumed = ThreadLoader(Numbers(100), Order(100, 16, seed=2), 1)
    resumed.load_state_dict(state)
    assert indices(resumed.epoch(5)) == rest
    assert indices(resumed.epoch(4)) == expected
    whole.close(), resumed.close()


def test_an_abandoned_epoch_leaves_no_thread_and_the_next_one_works() -> None:
    before = set(threading.enumerate())
    reader = ThreadLoader(Numbers(100), Order(100, 10), 2)
    for _ in range(5):
        batches = reader.epoch(0)
        next(batches)
        batches.close()
        reader.load_state_dict({"epoch": 0, "step": 0})
    assert len(indices(reader.epoch(1))) == 10
    reader.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
        assert not thread.is_alive()


def test_closing_ends_the_threads_of_an_epoch_that_somebody_still_holds() -> None:
    """As the frames of an error do."""
    reader = ThreadLoader(Numbers(600), Order(600, 6), workers=2)
    batches = reader.epoch(0)
    next(batches)
    planner = reader._planner
    assert planner is not None
    assert planner.is_alive()
    reader.close()
    assert not planner.is_alive()
    batches.close()


def test_a_broken_sample_is_replaced_counted_and_named() -> None:
    runs = []
    for workers in (1, 3):
        reader = ThreadLoader(Numbers(200, broken=[17, 18]), Order(200, 20, seed=5), workers, labels=True)
        replaced, batches = [], []
        for batch in reader.epoch(0):
            replaced.append(batch.replaced)
            batches.append(list(images(batch)))
        assert sum(replaced) == 2
        assert all((pixels == index % 251).all() for batch in batches for index, _, pixels in batch)
        assert all(label == index for batch in batches for index, label, _ in batch)
        runs.append([[index for index, _, _ in batch] for batch in batches])
        assert reader.failed == {"number 17": "broken", "number 18": "broken"}
        reader.close()
    assert runs[0] == runs[1]
    seen = [index for batch in runs[0] for index in batch]
    assert not {17, 18} & set(seen)
    order = Order(200, 20, seed=5)
    asked = [index for step in range(order.steps_per_epoch) for index in order.step(0, step).tolist()]
    assert sum(a == b for a, b in zip(seen, asked, strict=True)) == 198


def test_what_can_t_stand_in_for_a_broken_sample_is_not_counted_again() -> None:
    blocks = Order(32, 4, lanes=2, block_S=np.array([0, 16, 32]))
    reader = ThreadLoader(Numbers(32, broken=range(16)), blocks, 2, max_failed_fraction=0.6)
    seen = [index for epoch in range(3) for batch in reader.epoch(epoch) for index in batch.index_B.tolist()]
    assert len(seen) == 96
    assert min(seen) == 16
    reader.close()


def test_too_many_broken_samples_stop_with_a_clear_error() -> None:
    reader = ThreadLoader(Numbers(100, broken=range(50)), Order(100, 10), 2)
    with pytest.raises(LoaderError, match=r"samples can't be decoded .*; the last: number \d+: broken"):
        list(reader.epoch(0))
    reader.close()


def test_an_unexpected_error_of_a_worker_is_raised_where_batches_are_asked_for() -> None:
    store = Numbers(100)
    store.write = lambda sample, address: 1 / 0
    reader = ThreadLoader(store, Order(100, 10), 2)
    with pytest.raises(ZeroDivisionError):
        list(reader.epoch(0))
    reader.close()


@pytest.mark.parametrize("where", ["read", "write", "a replacement"])
def test_a_hanging_worker_is_named_and_then_an_error(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], where: str
) -> None:
    for module in (watch, loader):
        monkeypatch.setattr(module, "poll_seconds", lambda: 0.01)
    clock, entered, release = Clock(monkeypatch), threading.Event(), threading.Event()
    store = Numbers(100, broken=[7] if where == "a replacement" else ())
    hanging = Order(100, 10).substitute(0, 7, 1) if where == "a replacement" else 7
    read, write = store.read, store.write

    def hang_at(index: int) -> None:
        if index == hanging:
            entered.set()
            release.wait()

    if where == "read":
        store.read = lambda index: (hang_at(index), read(index))[1]
    else:
        store.write = lambda sample, address: (hang_at(sample.content), write(sample, address))
    reader = ThreadLoader(store, Order(100, 10), 2)
    ended = threading.Event()

    def train() -> None:
        with pytest.raises(LoaderError, match=f"no sample for 60 s: .* hangs, at .*number {hanging}$"):
            list(reader.epoch(0))
        ended.set()

    threading.Thread(target=train, daemon=True).start()
    assert entered.wait(60)
    clock.passes(3600, looks=60)  # as if the process had been stopped: all who wait look several times after that
    assert not ended.is_set()
    while "no sample" not in (errors := capfd.readouterr().err):
        clock.passes(4, looks=4)
        assert not ended.is_set()
    assert re.search(rf"no sample for \d+ s \(the run ends after 60\), at .*number {hanging}\b", errors)
    for _ in range(1200):  # others may still have moved since
        clock.passes(4, looks=0)
        if ended.wait(0.05):
            break
    assert ended.is_set()
    release.set()
    reader.close()


@pytest.mark.parametrize("method", ["read", "write"])
def test_storage_may_be_slower_than_any_limit_as_long_as_it_moves(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], method: str
) -> None:
    monkeypatch.setattr(watch, "WARN_SECONDS", 0.3)
    monkeypatch.setattr(watch, "STALL_SECONDS", 0.6)
    clock, store = Clock(monkeypatch), Numbers(10)
    call = getattr(store, method)
    setattr(store, method, lambda *rest: (clock.passes(0.2), call(*rest))[1])
    reader = ThreadLoader(store, Order(10, 10), 1)  # one batch: two seconds
    assert [len(batch) for batch in reader.epoch(0)] == [10]
    assert "no sample" not in capfd.readouterr().err
    reader.close()


def test_a_slow_training_step_is_no_stall(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(watch, "WARN_SECONDS", 0.1)
    monkeypatch.setattr(watch, "STALL_SECONDS", 0.3)
    clock, store = Clock(monkeypatch), Numbers(8)
    read = store.read
    store.read = lambda index: (clock.passes(0.0, looks=4), read(index))[1]  # so that those who wait for it check
    reader = ThreadLoader(store, Order(8, 8), 1)
    for epoch in range(3):
        for _ in reader.epoch(epoch):  # one batch, so nothing moves in the step
            clock.passes(100.0, looks=0)
    assert "no sample for" not in capfd.readouterr().err
    reader.close()


def test_a_workers_own_timeout_is_its_error_not_a_stall() -> None:
    """A network file system answers with ETIMEDOUT, which Python raises as the TimeoutError of a wait."""
    store = Numbers(20)
    store.write = lambda sample, address: (_ for _ in ()).throw(TimeoutError("the server does not answer"))
    reader = ThreadLoader(store, Order(20, 10), 2)
    with pytest.raises(TimeoutError, match="does not answer"):
        list(reader.epoch(0))
    reader.close()


def test_corrupt_jpeg_inside_a_shard(shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(shards, tmp_path / "data")
    shard = BetonReader(tmp_path / "data" / "train-00000.beton")
    with open(shard.path, "r+b") as file:
        file.seek(int(shard.pointer_N[0]) + int(shard.size_N[0]) // 2)
        file.write(b"\xff\xd9" + b"\0" * 64)
    reader = ThreadLoader(open_dataset(tmp_path / "data", "train"), Order(72, 12), 2)
    assert sum(len(batch) for batch in reader.epoch(0)) == 72
    assert len(reader.failed) == 1
    assert "sample 0 of" in next(iter(reader.failed))
    reader.close()


@pytest.mark.parametrize("damage", ["missing", "truncated", "replaced", "other content"])
def test_shards_that_do_not_match_the_manifest_are_refused(
    shards: pathlib.Path, tmp_path: pathlib.Path, damage: str
) -> None:
    data = tmp_path / "data"
    shutil.copytree(shards, data)
    first, second = sorted(data.glob("train-*.beton"))[:2]
    if damage == "missing":
        first.unlink()
    elif damage == "truncated":
        first.write_bytes(first.read_bytes()[:-100])
    elif damage == "other content":  # of the same size
        first.write_bytes(np.random.default_rng(0).bytes(first.stat().st_size))
    else:
        shutil.copy(sorted(data.glob("train-*.beton"))[-1], second)
    with pytest.raises(DataError, match=r"train-0000\d\.beton"):
        open_dataset(data, "train")


def test_other_content_in_a_shard_of_the_same_size_harms_no_other_image(
    shards: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Only its checksum tells at once, and verify.py compares that; here, the one image that is none is replaced."""
    data = tmp_path / "data"
    shutil.copytree(shards, data)
    path = data / "train-00000.beton"
    expected = [(i, px.tobytes()) for batch in unshuffled(data) for i, _, px in images(batch)]
    content = bytearray(path.read_bytes())
    reader = BetonReader(path)
    place, size = int(reader.pointer_N[3]), int(reader.size_N[3])
    content[place : place + size] = content[place : place + size].replace(b"\xff\xda", b"\xff\xfe", 1)
    path.write_bytes(content)
    found = [(i, px.tobytes()) for batch in unshuffled(data) for i, _, px in images(batch)]
    assert [a == b for a, b in zip(expected, found, strict=True)].count(False) == 1
    assert verify([str(data)]) == 1


def unshuffled(data: pathlib.Path) -> Iterator[Batch]:
    store = open_dataset(data, "train")
    return ThreadLoader(store, Order(store.num_samples, 12, shuffle=False), 1).epoch(0)


def test_what_is_not_there_is_a_clear_error(
    image_folder: pathlib.Path, shards: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(DataError, match="no such folder"):
        open_dataset(tmp_path / "nowhere", "train")
    with pytest.raises(DataError):
        open_dataset(tmp_path, "train")
    with pytest.raises(DataError, match="'val' split"):
        open_dataset(image_folder / "train", "val")
    with pytest.raises(DataError, match=r"manifest\.json"):
        open_dataset(image_folder, "train", "ffcv")
