"""Storage that goes away, and memory that is full, during a conversion: nothing is finished without the rest."""

import errno
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import one_line_of
from support.pictures import make_images

from fasttrain.dataprep import convert
from fasttrain.dataprep.destination import LocalFolder
from fasttrain.dataprep.encode import Encoding, encode_samples
from fasttrain.dataprep.engines import ShardWork, write_shard
from fasttrain.dataprep.guard import LOST, GuardedReader
from fasttrain.dataprep.plan import plan_shards
from fasttrain.dataprep.sources.folder import FolderReader, scan_folder
from fasttrain.formats.listing import Sample
from fasttrain.system.errors import RunError

COUNT, SHARD = 48, 12
GONE = [errno.EIO, errno.ESTALE, errno.ENOENT, errno.EACCES]  # the last two as of a mount that is not there


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "set", 1, COUNT)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes reading raise an error: for some names, or once so many images are read; without one, all is well again."""
    read, came = FolderReader.read, set[str]()

    def fail(error: BaseException | None = None, after: int = 1000, names: tuple[str, ...] = ()) -> None:
        came.clear()

        def failing_read(self: FolderReader, sample: Sample) -> bytes:
            if error and (os.path.basename(sample.path) in names or len(came) >= after):
                raise error
            came.add(sample.path)
            return read(self, sample)

        monkeypatch.setattr(FolderReader, "read", failing_read)

    return fail


def run(images: Path, out: Path, workers: int = 1) -> int:
    return convert.main([str(images), str(out), "--shard-size", str(SHARD), "--workers", str(workers)])


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("number", GONE)
@pytest.mark.parametrize(("after", "workers"), [(0, 1), (20, 1), (20, 3), (SHARD, 1), (COUNT - 3, 1)])
def test_without_storage_a_conversion_ends_and_the_same_command_continues(
    images: Path, tmp_path: Path, failing: Callable[..., None], number: int, after: int, workers: int,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run(images, tmp_path / "whole") == 0
    failing(OSError(number, os.strerror(number)), after)
    capfd.readouterr()
    assert run(images, tmp_path / "out", workers) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert f"{LOST} images in a row can't be read, the last is class0/" in last
    assert f"{os.strerror(number)}: finished shards are kept, run the same command again to continue" in last
    assert not (tmp_path / "out" / "manifest.json").exists()
    failing()
    assert run(images, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_single_images_that_cannot_be_read_are_skipped(
    images: Path, tmp_path: Path, failing: Callable[..., None]
) -> None:
    names = tuple(f"{number:03d}.jpg" for number in range(LOST - 1))
    failing(OSError(errno.EACCES, os.strerror(errno.EACCES)), names=names)
    assert run(images, tmp_path / "out") == convert.EXIT_SKIPPED
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    assert sorted(skip["path"] for skip in manifest["skipped"]) == [f"class0/{name}" for name in names]


@pytest.mark.parametrize("count", [1, LOST - 1])
def test_a_small_shard_of_nothing_else_is_skipped(tmp_path: Path, failing: Callable[..., None], count: int) -> None:
    images = make_images(tmp_path / "set", 1, count + SHARD)
    names = tuple(f"{number:03d}.jpg" for number in range(count))
    failing(OSError(errno.EIO, os.strerror(errno.EIO)), names=names)
    samples = list(scan_folder(images).splits["train"])[:count]
    reader = GuardedReader(FolderReader(str(images)))
    for _ in range(3):
        for sample in samples:
            with pytest.raises(OSError, match="Input/output error"):
                reader.read(sample)
    reader.settle(samples)


def test_images_that_are_read_between_start_the_count_anew(images: Path, failing: Callable[..., None]) -> None:
    samples = list(scan_folder(images).splits["train"])
    good, bad = samples[0], samples[1:]
    failing(OSError(errno.EIO, "x"), names=tuple(os.path.basename(sample.path) for sample in bad))
    reader = GuardedReader(FolderReader(str(images)))
    for start in range(0, 3 * (LOST - 1), LOST - 1):
        for sample in bad[start : start + LOST - 1]:
            with pytest.raises(OSError, match="x"):
                reader.read(sample)
        reader.read(good)


def test_a_task_of_ray_ends_without_its_shard(images: Path, tmp_path: Path, failing: Callable[..., None]) -> None:
    source = scan_folder(images)
    encode = functools.partial(encode_samples, encoding=Encoding())
    work = ShardWork(LocalFolder(tmp_path), source.reader, encode, False)
    failing(OSError(errno.EIO, "x"), SHARD - 2)  # so that the shard's end is reached
    with pytest.raises(RunError, match="in a row can't be read"):
        write_shard(work, plan_shards(source.splits, SHARD, "ffcv")[0])
    assert not list(tmp_path.iterdir())


def test_full_memory_ends_in_a_line_and_the_same_command_continues(
    images: Path, tmp_path: Path, failing: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    failing(MemoryError(), 30)
    assert run(images, tmp_path / "out") == 1
    assert "out of memory: finished shards are kept" in one_line_of(capfd.readouterr().err)
    assert not (tmp_path / "out" / "manifest.json").exists()
    failing()
    assert run(images, tmp_path / "out") == 0
    assert run(images, tmp_path / "whole") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
