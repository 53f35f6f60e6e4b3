"""Every loader gives the same samples at the same step; what each of them adds; and what happens on faults."""

import builtins
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.commands import ROOT
from support.loading import Numbers, images, indices
from support.steps import small

from fasttrain.dataprep.convert import main as convert
from fasttrain.engine.ranks import Ranks, given_back
from fasttrain.formats.beton import BetonReader
from fasttrain.formats.image import read_rgb
from fasttrain.formats.tar import TarShardReader, TarShardWriter
from fasttrain.input import Batch, Loader, LoaderError, Order, ThreadLoader, open_dataset, open_loader, resident
from fasttrain.input.folder_store import FolderStore, shrink_factor
from fasttrain.input.prefetch import prefetched, used_pixels
from fasttrain.jobs.batches import make_loader
from fasttrain.system import watch
from fasttrain.system.errors import DataError, UserError

CPU = torch.device("cpu")


def has_dali() -> bool:
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        return False
    return True


needs_dali = pytest.mark.skipif(not has_dali(), reason="NVIDIA DALI is not installed")
KINDS = [("shards", "auto"), ("shards", "resident"), ("tar_shards", "auto"), ("tar_shards", "resident")]
KINDS += [pytest.param(data, "dali", marks=needs_dali) for data in ("tar_shards", "shards")]


def make(path: pathlib.Path, kind: str, order: Order | None = None, **more: Any) -> Loader:
    store = open_dataset(path, "train", kind)
    return open_loader(store, order or Order(store.num_samples, 16, seed=4), 2, kind, **{"labels": True, **more})


def without_glimpses(data: pathlib.Path) -> None:
    """Make a manifest what older versions wrote."""
    manifest = json.loads((data / "manifest.json").read_text())
    for shards in manifest["splits"].values():
        for shard in shards:
            del shard["glimpses"]
    (data / "manifest.json").write_text(json.dumps(manifest))


def contents(batches: Iterable[Batch]) -> list[list[tuple[int, int | None, bytes]]]:
    return [[(i, label, px.tobytes()) for i, label, px in images(batch)] for batch in batches]


@pytest.mark.parametrize(("data", "kind"), KINDS)
def test_every_loader_gives_the_same_batches_and_resumes_on_other_ranks(
    data: str, kind: str, shards: pathlib.Path, request: pytest.FixtureRequest
) -> None:
    expected = contents(make(shards, "auto").epoch(3))
    path = request.getfixturevalue(data)
    whole = make(path, kind)
    batches = whole.epoch(3)
    first = contents([next(batches) for _ in range(1)])
    state = whole.state_dict()
    assert state == {"epoch": 3, "step": 1, "lanes": 0}
    assert first + contents(batches) == expected
    assert whole.state_dict() == {"epoch": 4, "step": 0, "lanes": 0}
    parts = []
    for rank in range(2):
        part = make(path, kind, Order(72, 16, 4, True, rank, 2))
        part.load_state_dict(state)
        parts.append(contents(part.epoch(3)))
        part.close()
    assert [a + b for a, b in zip(*parts, strict=True)] == expected[1:]
    whole.close()


def damaged(tar_shards: pathlib.Path, folder: pathlib.Path, damage: str) -> pathlib.Path:
    """The tar shards, with sample 5 of the first one's stream damaged in place."""
    shutil.copytree(tar_shards, folder)
    words = (folder / "train-00000.idx").read_text().splitlines()[6].split()
    start, size = int(words[1]), int(words[2])
    with open(folder / "train-00000.tar", "r+b") as file:
        file.seek(start + (0 if damage == "header" else size // 2))
        file.write(b"\xff\xd9" + b"\0" * 64 if damage == "early end" else b"\0" * (size // 2))
    return folder


@pytest.mark.parametrize("damage", ["early end", "truncated", "header"])
@pytest.mark.parametrize("kind", ["auto", "resident", pytest.param("dali", marks=needs_dali)])
def test_a_damaged_stream_is_named_and_replaced_alike_by_every_loader(
    tar_shards: pathlib.Path, tmp_path: pathlib.Path, kind: str, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = damaged(tar_shards, tmp_path / "data", damage)
    expected = contents(make(path, "auto").epoch(0))
    capfd.readouterr()
    reader = make(path, kind, max_failed_fraction=0.0)  # ten failures are always borne
    assert contents(reader.epoch(0)) == expected
    assert "sample 5 of" in capfd.readouterr().err
    assert contents(reader.epoch(1)) == contents(make(path, "auto").epoch(1))
    name = (path / "train-00000.names").read_text().splitlines()[5]
    assert set(reader.failed) <= {f"sample 5 of {path / 'train-00000.tar'} ({name})"}
    reader.close()


@pytest.mark.parametrize("kind", ["auto", "resident", pytest.param("dali", marks=needs_dali)])
def test_labels_are_left_alone_unless_they_are_asked_for(
    tar_shards: pathlib.Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TarShardReader, "label", lambda *_: 1 / 0)
    reader = make(tar_shards, kind, labels=False)
    assert [batch.label_B for batch in reader.epoch(0)] == [None] * 4
    reader.close()
    with pytest.raises(ZeroDivisionError):
        list(make(tar_shards, kind).epoch(0))


@pytest.mark.parametrize("kind", ["auto", "resident"])
def test_a_sample_without_a_label_that_is_needed_is_replaced_alike_on_any_ranks_and_when_resumed(
    kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def labelled(index_N: np.ndarray) -> np.ndarray:
        return np.where(index_N % 9 == 4, -1, 0)

    def reader(needs: bool = True, rank: int = 0, ranks: int = 1) -> Loader:
        store, order = Numbers(60), Order(60, 12, 5, True, rank, ranks)
        store.labels = labelled  # type: ignore[method-assign]
        return open_loader(store, order, 2, kind, labels=True, needs_labels=needs)

    def seen(batches: Iterable[Batch]) -> list[tuple[list[int], int]]:
        found = [(batch.label_B, batch.index_B.tolist(), batch.replaced) for batch in batches]
        assert all(label_B is not None and (label_B == 0).all() for label_B, *_ in found)
        return [(index, count) for _, index, count in found]

    whole = reader()
    expected = seen(whole.epoch(1))
    assert sum(count for _, count in expected) == 7  # of 60; ten are always borne
    assert "has no label; another takes its place" in capfd.readouterr().err
    parts = []
    for rank in range(2):
        part = reader(rank=rank, ranks=2)
        part.load_state_dict({"epoch": 1, "step": 2, "lanes": 0})
        parts.append(seen(part.epoch(1)))
        part.close()
    assert [(a + b, m + n) for (a, m), (b, n) in zip(*parts, strict=True)] == expected[2:]
    probed = reader(needs=False)
    labels = torch.cat([batch.label_B for batch in probed.epoch(1) if batch.label_B is not None])
    assert (labels == -1).sum() == 7
    whole.close(), probed.close()


@pytest.mark.parametrize(
    ("method", "probe", "labelled"),
    [("supcon", False, 400), ("hydra", True, 400), ("sepclr", False, 400), ("moco", True, 392), ("moco", False, 0)],
)
@pytest.mark.parametrize("kind", ["auto", "resident"])
def test_training_gives_methods_that_need_labels_no_image_without_one(
    kind: str, method: str, probe: bool, labelled: int
) -> None:
    config, store = small(method, loader=kind, online_probe=probe), Numbers(400)
    unlabelled = range(5, 160, 21)  # none of the few by which a set without labels is known
    store.labels = lambda index_N: np.where(np.isin(index_N, unlabelled), -1, 0)  # type: ignore[method-assign]
    with given_back():
        ranks = Ranks("cpu")
        loader = make_loader(store, Order(400, 40, 3), config, ranks)
        labels = [batch.label_B for batch in loader.epoch(0)]
    assert sum(int((label_B >= 0).sum()) for label_B in labels if label_B is not None) == labelled
    loader.close()


@pytest.mark.parametrize("kind", ["auto", "resident"])
def test_the_failed_fraction_is_a_setting(kind: str) -> None:
    order = Order(200, 20, seed=5)
    for allowed in (0.01, 0.5):
        store = Numbers(200, broken=range(0, 200, 8))  # 25 of 200
        if allowed == 0.5:
            reader = open_loader(store, order, 2, kind, None, allowed)
            counts = [(len(batch), batch.replaced) for batch in reader.epoch(0)]
            assert [sum(count) for count in zip(*counts, strict=True)] == [200, 25]
            list(reader.epoch(1))
            assert len(reader.failed) == 25  # each sample is named once, not in every epoch
            reader.close()
        else:
            with pytest.raises(LoaderError, match=r"can't be decoded .*; the last: number \d+: broken"):
                list(open_loader(store, order, 2, kind, None, allowed).epoch(0))


def test_resident_refuses_what_does_not_fit(shards: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "free_memory", lambda device: 1 << 20)
    with pytest.raises(UserError, match=r"resident would keep .* GiB of pixels, more than 50% .* on cpu"):
        make(shards, "resident")


def test_resident_decodes_once(image_folder: pathlib.Path) -> None:
    store = open_dataset(image_folder, "train")
    writes, write = [], store.write
    store.write = lambda sample, address: (writes.append(1), write(sample, address))
    reader = open_loader(store, Order(72, 12), 2, "resident")
    for epoch in range(3):
        assert len(indices(reader.epoch(epoch))) == 6
    assert len(writes) == 72


@pytest.mark.parametrize(("method", "error"), [("read", ZeroDivisionError), ("write", ZeroDivisionError)])
def test_resident_raises_what_a_worker_raises(method: str, error: type[Exception]) -> None:
    store = Numbers(50)
    setattr(store, method, lambda *_: 1 / 0)
    with pytest.raises(error):
        open_loader(store, Order(50, 10), 2, "resident")


def test_resident_does_not_hang_with_its_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "STALL_SECONDS", 0.5)
    release = threading.Event()
    with pytest.raises(LoaderError, match="hangs"):
        open_loader(Numbers(50, slow=release), Order(50, 10), 2, "resident")
    release.set()


def test_dali_missing_is_one_clear_line(tar_shards: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_dali(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("nvidia"):
            raise ImportError("No module named 'nvidia.dali'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_dali)
    with pytest.raises(UserError, match=r"needs NVIDIA DALI .*pip install nvidia-dali-cuda130"):
        make(tar_shards, "dali")


def test_dali_refuses_what_is_no_jpeg_shard(image_folder: pathlib.Path) -> None:
    with pytest.raises(UserError, match="--loader folder"):
        open_loader(FolderStore(image_folder, "train"), Order(72, 8), 1, "dali")


@needs_dali
def test_index_files_are_those_of_dali(tar_shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    from wds2idx import IndexCreator

    with IndexCreator(str(tar_shards / "train-00000.tar"), str(tmp_path / "made.idx"), verbose=False) as index:
        index.create_index()
    assert (tmp_path / "made.idx").read_text().split() == (tar_shards / "train-00000.idx").read_text().split()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tar, idx: idx.unlink(), r"train-00000\.idx"),
        (lambda tar, idx: idx.write_text(""), "the manifest says"),
        (lambda tar, idx: idx.write_text(idx.read_text().replace("v1.2", "v1.9")), "no v1.2 index"),
        (
            lambda tar, idx: idx.write_text(idx.read_text().replace("cls", "txt")),
            "one .jpg or .png followed by one .cls",
        ),
        (lambda tar, idx: idx.write_text(idx.read_text().replace("jpg 512 ", "jpg -12 ")), "no number"),
        (lambda tar, idx: idx.write_text(idx.read_text().replace("jpg 512 ", "jpg x12 ")), "no number"),
        (lambda tar, idx: tar.unlink(), r"train-00000\.tar"),
        (lambda tar, idx: tar.write_bytes(tar.read_bytes()[:-700]), "the manifest says"),
        (lambda tar, idx: (tar.unlink(), os.mkfifo(tar)), "not a regular file"),
    ],
)
def test_tar_shards_that_do_not_match_are_refused(
    tar_shards: pathlib.Path,
    tmp_path: pathlib.Path,
    change: Callable[[pathlib.Path, pathlib.Path], object],
    message: str,
) -> None:
    data = tmp_path / "data"
    shutil.copytree(tar_shards, data)
    change(data / "train-00000.tar", data / "train-00000.idx")
    with pytest.raises(DataError, match=message):
        open_dataset(data, "train")


@pytest.mark.parametrize("known", [True, False])
def test_a_tar_replaced_by_one_of_the_same_size_gives_no_wrong_picture(
    tar_shards: pathlib.Path, shards: pathlib.Path, tmp_path: pathlib.Path, known: bool
) -> None:
    """Of a set that was made without glimpses only the index has the old places, where no JPEG lies now."""
    data = tmp_path / "data"
    shutil.copytree(tar_shards, data)
    if not known:
        without_glimpses(data)
    reader = BetonReader(shards / "train-00000.beton")
    order = list(range(reader.num_samples))[::-1]
    index = (data / "train-00000.idx").read_text()
    size = (data / "train-00000.tar").stat().st_size
    with TarShardWriter(data / "train-00000.tar") as writer:
        for i in order:
            start = int(reader.pointer_N[i])
            stream = reader.data[start : start + int(reader.size_N[i])].tobytes()
            writer.write(stream, int(reader.height_N[i]), int(reader.width_N[i]), 0)
    (data / "train-00000.idx").write_text(index)
    assert (data / "train-00000.tar").stat().st_size == size
    with pytest.raises(DataError if known else LoaderError, match="another file" if known else "can't be decoded"):
        list(make(data, "auto").epoch(0))


@pytest.mark.parametrize("kind", ["auto", "resident"])
def test_a_label_that_is_no_number_makes_a_bad_sample_where_labels_are_read(
    tar_shards: pathlib.Path, tmp_path: pathlib.Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(tar_shards, data)
    line = (data / "train-00000.idx").read_text().splitlines()[3].split()
    with open(data / "train-00000.tar", "r+b") as file:
        file.seek(int(line[5]))
        file.write(b"x")
    order = Order(72, 12, shuffle=False)
    assert 2 in {index for batch in indices(make(data, kind, order, labels=False).epoch(0)) for index in batch}
    assert capfd.readouterr().err == ""
    assert 2 not in {index for batch in indices(make(data, kind, order).epoch(0)) for index in batch}
    assert "sample 2 of" in (errors := capfd.readouterr().err)
    assert "its .cls is no number of a class; another takes its place" in errors
    with pytest.raises(DataError, match=r"sample 2 of .*no number"):
        open_dataset(data, "train").labels(np.arange(5))


# Plain files


@pytest.mark.parametrize(
    ("height", "width", "least", "factor"),
    [(448, 4000, 448, 1), (895, 895, 448, 1), (896, 2000, 448, 2), (3600, 4000, 448, 8), (9000, 9000, 0, 1)],
)
def test_shrinking_keeps_the_shorter_side_twice_the_view(height: int, width: int, least: int, factor: int) -> None:
    assert shrink_factor(height, width, least) == factor


def photograph(path: pathlib.Path, height: int, width: int, orientation: int = 1) -> None:
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=-1).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=95, exif=exif)


@pytest.mark.parametrize("orientation", [1, 6])
def test_large_photographs_are_decoded_smaller(tmp_path: pathlib.Path, orientation: int) -> None:
    photograph(tmp_path / "a.jpg", 300, 411, orientation)
    full = read_rgb((tmp_path / "a.jpg").read_bytes())
    (shrunk,) = decoded(FolderStore(tmp_path, "train", 32))
    factor = 4
    assert shrunk.shape[:2] == tuple(-(-side // factor) for side in full.shape[:2])
    reference = np.array(Image.fromarray(full).reduce(factor)).astype(int)
    assert np.abs(shrunk.astype(int) - reference)[1:-1, 1:-1, :2].mean() < 2
    (unshrunk,) = decoded(FolderStore(tmp_path, "train"))
    assert np.array_equal(unshrunk, full)


def decoded(store: FolderStore) -> list[np.ndarray]:
    reader = ThreadLoader(store, Order(store.num_samples, store.num_samples, shuffle=False), 1)
    found = [pixels for batch in reader.epoch(0) for _, _, pixels in images(batch)]
    reader.close()
    return found


def test_damaged_and_odd_files_of_a_folder(tmp_path: pathlib.Path) -> None:
    for i in range(12):
        photograph(tmp_path / f"{i:02d}.jpg", 200, 200)
    sound = (tmp_path / "00.jpg").read_bytes()
    (tmp_path / "03.jpg").write_bytes(sound[: len(sound) // 2])
    Image.fromarray(read_rgb(sound)).save(tmp_path / "05.png")
    reader = ThreadLoader(FolderStore(tmp_path, "train", 32), Order(13, 13, shuffle=False), 2)
    (batch,) = reader.epoch(0)
    assert [(name.rsplit("/")[-1], reason) for name, reason in reader.failed.items()] == [("03.jpg", "truncated")]
    assert sorted(set(batch.height_B.tolist())) == [100, 200]
    reader.close()


def test_a_fifo_in_a_folder_is_left_out_and_one_that_appears_later_fails(tmp_path: pathlib.Path) -> None:
    for i in range(4):
        photograph(tmp_path / f"{i}.jpg", 40, 40)
    os.mkfifo(tmp_path / "fifo.jpg")
    store = FolderStore(tmp_path, "train")
    assert store.num_samples == 4
    (tmp_path / "2.jpg").unlink()
    os.mkfifo(tmp_path / "2.jpg")
    reader = ThreadLoader(store, Order(4, 4), 2)
    assert len(indices(reader.epoch(0))) == 1  # one that waited for the FIFO would never end
    assert reader.failed == {str(tmp_path / "2.jpg"): "not a regular file"}
    reader.close()


# Memory and start


def test_prefetching_is_nothing_on_a_cpu() -> None:
    reader = ThreadLoader(Numbers(20), Order(20, 5), 1)
    assert prefetched(reader, CPU) is reader
    for batch in reader.epoch(0):
        assert len(used_pixels(batch)) == int((batch.height_B * 3).sum())
    reader.close()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["auto", "resident", pytest.param("dali", marks=needs_dali)])
def test_batches_on_a_gpu_are_those_of_the_cpu(shards: pathlib.Path, kind: str) -> None:
    device = torch.device("cuda")
    expected = contents(make(shards, "auto").epoch(0))
    reader = make(shards, kind, device=device)
    found = []
    for batch in reader.epoch(0):
        assert batch.pixels.is_cuda
        assert reader.state_dict()["step"] == len(found) + 1
        batch.pixels = batch.pixels.cpu()
        found.append([(i, label, px) for i, label, px in images(batch)])
    for batch, other in zip(found, expected, strict=True):
        for (i, label, px), (j, other_label, other_px) in zip(batch, other, strict=True):
            assert (i, label) == (j, other_label)
            difference = np.abs(px.reshape(-1).astype(int) - np.frombuffer(other_px, np.uint8))
            assert difference.mean() <= (2 if kind == "dali" else 0)
    reader.close()


def test_importing_the_loader_leaves_slow_packages_alone() -> None:
    code = (
        "import sys, fasttrain.input; print([m for m in "
        "('numba', 'torchvision', 'matplotlib', 'rich', 'tyro', 'nvidia.dali', 'ffcv') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_slow_consumer_gets_batches_that_stay_as_they_are() -> None:
    reader = ThreadLoader(Numbers(60), Order(60, 10, seed=1), 3)
    for batch in reader.epoch(0):
        time.sleep(0.01)
        assert all((pixels == index % 251).all() for index, _, pixels in images(batch))
    reader.close()


@pytest.mark.parametrize("write", ["jpeg", "raw"])
def test_shards_of_the_same_size_that_changed_places_are_refused(tmp_path: pathlib.Path, write: str) -> None:
    """Raw images without labels give shards whose sizes and tables are all alike."""
    rng = np.random.default_rng(0)
    (tmp_path / "source").mkdir()
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(tmp_path / "source" / f"{i}.png")
    data = tmp_path / "data"
    assert convert([str(tmp_path / "source"), str(data), "--shard-size", "4", "--write", write, "--workers", "1"]) == 0
    first, second = sorted(data.glob("*.beton"))
    first.rename(data / "x")
    second.rename(first)
    (data / "x").rename(second)
    with pytest.raises(DataError, match=r"another file|the manifest says"):
        open_dataset(data, "train")
    if write == "raw":
        without_glimpses(data)
        assert open_dataset(data, "train").num_samples == 8  # size and tables say nothing
