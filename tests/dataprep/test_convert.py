"""dataprep/convert.py as a person uses it: layouts, resuming, refusals, failures, and the same bytes every time."""

import errno
import fcntl
import hashlib
import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.commands import ROOT, typed
from support.forks import Fork, RunCommand, finished, with_small_files

from fasttrain.dataprep import convert
from fasttrain.dataprep.plan import plan_shards
from fasttrain.dataprep.sources.folder import scan_folder
from fasttrain.dataprep.sources.kinds import fingerprint
from fasttrain.dataprep.sources.source import Reader
from fasttrain.formats import jpeg
from fasttrain.formats.beton import MODE_RAW, BetonReader
from fasttrain.formats.listing import Listing, Sample
from fasttrain.formats.manifest import Manifest, ManifestError
from fasttrain.system.errors import RunError
from fasttrain.system.lock import lock


def make_images(root: Path, classes: int = 2, per_class: int = 12, side: int = 40) -> Path:
    """Flat images, red = 20 times the class, green = 8 times the number; JPEG, and a PNG in every fourth place."""
    for c in range(classes):
        (root / f"class{c}").mkdir(parents=True)
        for i in range(per_class):
            name = f"{i:03d}.png" if i % 4 == 3 else f"{i:03d}.jpg"
            Image.new("RGB", (side, side // 2), (20 * c, 8 * i, 128)).save(root / f"class{c}" / name)
    return root


COMMAND = "dataprep/convert.py"


def run(*arguments: object) -> int:
    """The command within this process."""
    return convert.main([str(argument) for argument in arguments])


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def summary_of(text: str) -> dict:
    return json.loads(text.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("source"))


def test_convert_as_typed(source: Path, tmp_path: Path) -> None:
    done = typed(COMMAND, source, tmp_path / "out", "--shard-size", 10, "--format", "ffcv", cwd=Path("/"))
    assert done.returncode == 0, done.stderr
    summary = summary_of(done.stdout)
    assert summary["images"] == 24
    assert summary["shards"] == 3
    assert summary["classes"] == 2
    assert summary["skipped"] == {"count": 0, "reasons": {}}
    assert summary["images_per_sec"] > 0
    manifest = Manifest.load(tmp_path / "out")
    manifest.check_shards(tmp_path / "out")
    assert manifest.classes == ["class0", "class1"]
    assert manifest.class_counts == {"train": [12, 12]}
    assert manifest.num_samples("train") == 24
    shards = [f"train-0000{i}.{kind}" for i in range(3) for kind in ("beton", "names")]
    assert sorted(contents(tmp_path / "out")) == ["manifest.json", *shards]
    for shard in manifest.splits["train"]:
        content = (tmp_path / "out" / shard.name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (shard.num_bytes, shard.sha256)
    files = [file for shard in manifest.splits["train"] for file in shard.files()]
    assert summary["bytes"] == sum(file.num_bytes for file in files)


def test_samples_arrive_whole_and_with_their_labels(source: Path, tmp_path: Path) -> None:
    assert run(source, tmp_path / "out", "--shard-size", 7, "--workers", "auto") == 0
    manifest = Manifest.load(tmp_path / "out")
    originals = {path.read_bytes() for path in source.glob("*/*.jpg")}
    seen, pixels = [], []
    for shard in manifest.splits["train"]:
        reader = BetonReader(tmp_path / "out" / shard.name)
        for i in range(reader.num_samples):
            start = int(reader.pointer_N[i])
            data = reader.data[start : start + int(reader.size_N[i])].tobytes()
            originals.discard(data)
            size = int(reader.height_N[i]), int(reader.width_N[i]), 3
            stored = reader.mode_N[i] == MODE_RAW
            pixels.append(np.frombuffer(data, np.uint8).reshape(size) if stored else jpeg.decode(data))
            assert pixels[-1].shape == (reader.height_N[i], reader.width_N[i], 3) == (20, 40, 3)
            red, green, _ = pixels[-1].reshape(-1, 3).mean(0)
            assert round(red / 20) == reader.label_N[i]
            seen.append((int(reader.label_N[i]), round(green / 8)))
    assert not originals, "every JPEG is there byte for byte"
    assert sorted(seen) == [(c, i) for c in range(2) for i in range(12)]
    assert seen != sorted(seen)
    every = np.concatenate([p.reshape(-1, 3) for p in pixels]) / 255
    np.testing.assert_allclose(manifest.pixel_mean, every.mean(0), atol=0.01)
    np.testing.assert_allclose(manifest.pixel_std, every.std(0), atol=0.01)


def test_max_side_and_quality(source: Path, tmp_path: Path) -> None:
    assert run(source, tmp_path / "out", "--max-side", 16, "--quality", 50, "--workers", 1) == 0
    reader = BetonReader(tmp_path / "out" / "train-00000.beton")
    assert (reader.width_N == 16).all()
    assert (reader.height_N == 8).all()


def test_same_bytes_for_any_number_of_workers(source: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        assert run(source, tmp_path / str(workers), "--max-side", 30, "--shard-size", 9, "--workers", workers) == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert run(source, tmp_path / "3", "--max-side", 30, "--shard-size", 9, "--workers", 2, "--seed", 1) == 0
    assert contents(tmp_path / "1") != contents(tmp_path / "3")


def test_splits(tmp_path: Path) -> None:
    make_images(tmp_path / "source" / "train", 3, 4)
    make_images(tmp_path / "source" / "test", 2, 2)
    assert run(tmp_path / "source", tmp_path / "out", "--workers", 1) == 0
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.class_counts == {"train": [4, 4, 4], "val": [2, 2, 0]}
    assert [shard.name for shard in manifest.splits["val"]] == ["val-00000.beton"]


def test_val_fraction(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(source, tmp_path / "out", "--val-fraction", 0.25, "--workers", 1) == 0
    assert Manifest.load(tmp_path / "out").class_counts == {"train": [9, 9], "val": [3, 3]}
    make_images(tmp_path / "split" / "train", 1, 2)
    make_images(tmp_path / "split" / "val", 1, 2)
    assert run(tmp_path / "split", tmp_path / "out2", "--val-fraction", 0.5) == 2
    assert "has a validation split already" in capfd.readouterr().err


def test_flat_folder_has_no_labels(source: Path, tmp_path: Path) -> None:
    assert run(source / "class1", tmp_path / "out", "--workers", 1) == 0
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.classes == []
    assert manifest.class_counts == {"train": []}
    assert (BetonReader(tmp_path / "out" / "train-00000.beton").label_N == -1).all()


def test_unreadable_images_are_skipped_and_counted(run_command: RunCommand, tmp_path: Path) -> None:
    source = make_images(tmp_path / "source")
    for i in range(23):
        (source / "class0" / f"empty{i}.jpg").write_bytes(b"")
    good = (source / "class1" / "000.jpg").read_bytes()
    (source / "class1" / "cut.jpg").write_bytes(good[: len(good) - 30])
    (source / "class1" / "text.png").write_text("text")
    (source / "class1" / "dangling.jpg").symlink_to("nowhere.jpg")
    done = run_command(COMMAND, source, tmp_path / "out", "--shard-size", 6)
    assert done.returncode == convert.EXIT_SKIPPED == 3
    summary = summary_of(done.stdout)
    assert summary["images"] == 24
    assert summary["skipped"]["count"] == 26
    assert summary["skipped"]["reasons"] == {
        "a link that leads nowhere": 1, "empty file": 23, "truncated": 1,
        "not an image (JPEG, PNG, WebP, BMP, GIF or TIFF)": 1,
    }  # fmt: skip
    lines = done.stderr.splitlines()
    assert len([line for line in lines if line.startswith("skipped ")]) == 20
    assert "more images" in lines[-1]
    skipped = Manifest.load(tmp_path / "out").skipped
    assert {"path": "class1/cut.jpg", "reason": "truncated"} in skipped
    assert len(skipped) == 26
    again = run_command(COMMAND, source, tmp_path / "out", "--shard-size", 6)
    assert again.returncode == 3
    assert summary_of(again.stdout) == {**summary, "images_per_sec": 0.0}


def test_how_many_images_are_measured() -> None:
    def measured(count: int) -> int:
        plan = plan_shards({"train": Listing(Sample(str(i), -1) for i in range(count))}, count, "ffcv")
        return -(-count // plan[0].measure_every)

    assert [measured(count) for count in (1, 256, 300)] == [1, 256, 300]
    assert measured(3200) == 267
    assert measured(64_000) == 2000
    assert measured(400_000) == 10_000


def test_a_shard_without_usable_images_is_left_out(tmp_path: Path) -> None:
    source = make_images(tmp_path / "source", 1, 3)
    (source / "class0" / "empty.jpg").write_bytes(b"")
    assert run(source, tmp_path / "out", "--shard-size", 1, "--workers", 1) == 3
    manifest = Manifest.load(tmp_path / "out")
    manifest.check_shards(tmp_path / "out")
    assert [shard.num_samples for shard in manifest.splits["train"]] == [1, 1, 1]


def test_no_usable_image_at_all(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.jpg").write_bytes(b"")
    assert run(tmp_path / "source", tmp_path / "out", "--workers", 1) == 2
    assert "no image of the train split can be read; the first is a.jpg: empty file" in capfd.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_a_validation_split_without_usable_images(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_images(tmp_path / "split" / "train", 1, 2)
    (tmp_path / "split" / "val" / "class0").mkdir(parents=True)
    (tmp_path / "split" / "val" / "class0" / "bad.jpg").write_bytes(b"")
    assert run(tmp_path / "split", tmp_path / "out", "--workers", 1) == 2
    assert "no image of the val split can be read; the first is val/class0/bad.jpg" in capfd.readouterr().err
    source = make_images(tmp_path / "source", 1, 3)
    for path in source.glob("*/*.jpg"):
        path.write_bytes(b"")
    Image.new("RGB", (8, 8)).save(source / "class0" / "good.jpg")
    # One of the halves is without the one image that can be read.
    assert run(source, tmp_path / "halves", "--val-fraction", 0.5, "--workers", 1) == 2
    assert "split can be read; the first is class0/00" in capfd.readouterr().err


def test_its_own_output_as_source(source: Path, tmp_path: Path) -> None:
    assert run(source, tmp_path / "out", "--val-fraction", 0.25, "--workers", 1) == 0
    assert run(tmp_path / "out", tmp_path / "again", "--shard-size", 5, "--workers", 1) == 0
    old, new = Manifest.load(tmp_path / "out"), Manifest.load(tmp_path / "again")
    assert [len(new.splits[split]) for split in ("train", "val")] == [4, 2]
    assert (new.classes, new.class_counts) == (old.classes, old.class_counts)
    assert samples_of(tmp_path / "again") == samples_of(tmp_path / "out")


def samples_of(out: Path) -> set[tuple[str, str, int, bytes]]:
    """Split, name, label and content of every sample."""
    found = set()
    for split, shards in Manifest.load(out).splits.items():
        for shard in shards:
            reader = BetonReader(out / shard.name)
            for row, name in enumerate((out / shard.names.name).read_text().splitlines() if shard.names else ()):
                start = int(reader.pointer_N[row])
                stream = reader.data[start : start + int(reader.size_N[row])].tobytes()
                found.add((split, name, int(reader.label_N[row]), stream))
    assert len(found) == sum(Manifest.load(out).num_samples(split) for split in Manifest.load(out).splits)
    return found


def test_run_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, out = make_images(tmp_path / "source"), tmp_path / "out"
    assert run(source, out, "--workers", 1) == 0
    first = summary_of(capfd.readouterr().out)
    before = contents(out)
    assert run(source, out) == 0
    text = capfd.readouterr().out
    assert "already converted" in text
    assert summary_of(text) == {**first, "images_per_sec": 0.0}
    assert run(source, out, "--quality", 80) == 2
    assert "other settings: quality" in capfd.readouterr().err
    os.utime(source / "class0" / "000.jpg", (1, 1))
    assert run(source, out) == 0, "a copied source is the same source"
    with open(source / "class0" / "000.jpg", "ab") as file:
        file.write(b"x")
    assert run(source, out) == 2
    assert "the source has changed" in capfd.readouterr().err
    assert contents(out) == before


def test_an_unfinished_conversion_refuses_a_touched_source(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    copied, out = shutil.copytree(source, tmp_path / "source"), tmp_path / "out"

    def killed(*arguments: object) -> None:
        raise RunError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(convert, "complete", killed)
        assert run(copied, out, "--workers", 1) == 1
    touched = copied / "class0" / "000.jpg"
    before = touched.stat()
    os.utime(touched, (1, 1))
    assert run(copied, out, "--workers", 1) == 2
    assert "the source has changed" in capfd.readouterr().err
    os.utime(touched, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run(copied, out, "--workers", 1) == 0
    settings = json.loads((out / "manifest.json").read_bytes())["settings"]
    assert settings["source"] == fingerprint(scan_folder(source)), "without the times, which differ from copy to copy"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/missing", "{tmp}/out"], "no such folder"),
        (["{tmp}/empty", "{tmp}/out"], "no images"),
        (["{source}", "{source}"], "lies inside the source"),
        (["{source}", "{source}/class0/out"], "lies inside the source"),
        (["{source}", "{tmp}/full"], "is not empty and holds no conversion"),
        (["{source}", "{tmp}/full/file"], "not a folder"),
        (["{source}", "{tmp}/out", "--quality", "0"], "--quality must be at least 1 and at most 100, not 0"),
        (
            ["{source}", "{tmp}/out", "--val-fraction", "1"],
            "--val-fraction must be at least 0 and at most 0.99",
        ),
        (["{source}", "{tmp}/out", "--seed", "-1"], "--seed must be at least 0"),
        (["{source}", "{tmp}/out", "--workers", "0"], "--workers must be at least 1, not 0"),
    ],
)
def test_refusals(
    source: Path, tmp_path: Path, arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    assert run(*(argument.format(tmp=tmp_path, source=source) for argument in arguments)) == 2
    error = capfd.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["file"]


def test_unknown_option_and_help(run_command: RunCommand) -> None:
    done = run_command(COMMAND, "a", "b", "--qualty", 3)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "--qualty" in done.stderr
    done = run_command(COMMAND, "--help")
    assert done.returncode == 0
    assert "--max-side" in done.stdout
    assert "Exit status" in done.stdout


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of which each is encoded anew, to some kilobytes."""
    root = tmp_path_factory.mktemp("noise")
    pixels = np.random.default_rng(0).integers(0, 256, (120, 120, 3)).astype(np.uint8)
    for i in range(24):
        Image.fromarray(np.roll(pixels, i * 7, 0)).save(root / f"{i:02d}.jpg")
    return root


SIX_SHARDS = ("--max-side", 60, "--shard-size", 4, "--workers", 2)


@pytest.fixture(scope="module")
def whole_conversion(noise: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run(noise, out, *SIX_SHARDS) == 0
    return out


def _held(words: list[str], waiting: Path, released: Path) -> int:
    """A conversion in a session of its own that waits for its fourth shard's images until a file appears."""
    os.setsid()
    encode, calls, third = convert.encode_samples, itertools.count(), "train-00002.*.json"

    def encode_or_wait(reader: Reader, samples: Sequence, **settings: object) -> Iterator:
        late = next(calls) >= 3
        while late and not released.exists():
            if list(Path(words[1]).glob(third)) and "_next" in names_of_frames():  # of stream_in_order
                waiting.touch()
            time.sleep(0.01)
        yield from encode(reader, samples, **settings)

    convert.encode_samples = encode_or_wait
    return _named_convert(words)


def names_of_frames() -> list[str]:
    """What the main thread is in."""
    frame = sys._current_frames()[threading.main_thread().ident]  # type: ignore[index]
    return [entry.name for entry in traceback.extract_stack(frame)]


def _held_at_the_end(words: list[str], waiting: Path, released: Path) -> int:
    """A conversion whose manifest is not written until a file appears."""
    os.setsid()
    complete = convert.complete

    def wait_and_complete(*arguments: object) -> Manifest:
        waiting.touch()
        while not released.exists():
            time.sleep(0.01)
        return complete(*arguments)

    convert.complete = wait_and_complete
    return _named_convert(words)


def _named_convert(words: list[str]) -> int:
    sys.argv = ["convert.py"]
    return convert.main(words)


def signalled(hold: Callable, source: Path, out: Path, number: int, *options: object) -> Fork:
    """A held conversion that was sent a signal while it waited, and has ended."""
    words = [str(word) for word in (source, out, *SIX_SHARDS, *options)]
    waiting, released = out.parent / "waiting", out.parent / "released"
    fork = Fork(out.parent, hold, words, waiting, released)
    deadline = time.monotonic() + 150  # Ray starts slowly beside other work
    while not waiting.exists():
        assert time.monotonic() < deadline, fork.kill()
        assert fork.process.is_alive(), fork.kill()
        time.sleep(0.005)
    send = os.killpg if number == signal.SIGINT else os.kill  # to all of the session, as a terminal does
    send(fork.process.pid, number)
    released.touch()  # the signal is there before anything can go on
    fork.process.join(60)
    assert not fork.process.is_alive(), fork.kill()
    return fork


def running(session: int) -> list[str]:
    return [path.name for path in Path("/proc").glob("[0-9]*") if _session(path) == session]


def _session(path: Path) -> int | None:
    try:
        return int((path / "stat").read_text().rsplit(")", 1)[1].split()[3])
    except OSError:
        return None


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_conversion_continues(noise: Path, whole_conversion: Path, tmp_path: Path, number: int) -> None:
    out = tmp_path / "out"
    fork = signalled(_held, noise, out, number)
    session, done = fork.process.pid, fork.kill()
    assert not (out / "manifest.json").exists()
    with pytest.raises(ManifestError, match="not a converted data set"):
        Manifest.load(out)
    if number == signal.SIGINT:
        assert done.returncode == 130
        assert done.stderr.splitlines() == ["convert.py: error: interrupted"]
        assert not list(out.glob(".*"))
    deadline = time.monotonic() + 60
    while running(session):  # workers end with the process that was killed
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert run(noise, out, "--max-side", 50) == 2
    finished = (out / "train-00000.beton").stat().st_mtime_ns
    assert run(noise, out, *SIX_SHARDS) == 0
    assert (out / "train-00000.beton").stat().st_mtime_ns == finished, "a finished shard is kept"
    assert contents(out) == contents(whole_conversion)


def test_killed_tar_shards_continue(noise: Path, tmp_path: Path) -> None:
    tars = ("--format", "webdataset")
    assert run(noise, tmp_path / "whole", *SIX_SHARDS, *tars) == 0
    signalled(_held, noise, tmp_path / "out", signal.SIGKILL, *tars)
    assert not (tmp_path / "out" / "manifest.json").exists()
    finished = (tmp_path / "out" / "train-00000.tar").stat().st_mtime_ns
    assert run(noise, tmp_path / "out", *SIX_SHARDS, *tars) == 0
    assert (tmp_path / "out" / "train-00000.tar").stat().st_mtime_ns == finished, "a finished shard is kept"
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.usefixtures("ray_alone")
def test_a_killed_ray_driver_continues(noise: Path, whole_conversion: Path, tmp_path: Path) -> None:
    signalled(_held_at_the_end, noise, tmp_path / "out", signal.SIGKILL, "--engine", "ray")
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert run(noise, tmp_path / "out", *SIX_SHARDS, "--engine", "ray") == 0
    assert contents(tmp_path / "out") == contents(whole_conversion)


def test_full_disk(noise: Path, whole_conversion: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sizes = [path.stat().st_size for path in sorted(whole_conversion.glob("*.beton"))]

    words = [str(word) for word in (noise, out, *SIX_SHARDS)]
    done = finished(tmp_path, with_small_files, sizes[0] // 2, convert.main, words)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(lines) == 1
    assert "run the same command again to continue" in lines[0]
    assert "Traceback" not in done.stderr
    assert [path.name for path in out.iterdir()] == ["conversion.json"]
    assert run(noise, out, *SIX_SHARDS) == 0
    assert contents(out) == contents(whole_conversion)


def test_two_conversions_into_one_folder(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    with lock(tmp_path / "out", "held"):
        assert run(source, tmp_path / "out") == 2
    assert "another conversion is writing here" in capfd.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(
    source: Path, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def flock(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert run(source, tmp_path / "out", "--workers", 1) == 0
    warning = f"{tmp_path / 'out'} can't be locked ({os.strerror(number)}): two processes could write here at once"
    assert capfd.readouterr().err == f"warning: {warning}\n"


def test_manifest_errors(source: Path, tmp_path: Path) -> None:
    out, path = tmp_path / "out", tmp_path / "out" / "manifest.json"
    assert run(source, out, "--workers", 1) == 0
    manifest, content = Manifest.load(out), json.loads(path.read_bytes())
    manifest.save(tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == path.read_bytes()
    damages = {
        "not of version": {**content, "version": 99},
        "unknown format 'tape'": {**content, "format": "tape"},
        "malformed: .*classes": {name: value for name, value in content.items() if name != "classes"},
        "malformed: not a JSON object": [],
    }
    for message, damaged in damages.items():
        path.write_text(json.dumps(damaged))
        with pytest.raises(ManifestError, match=message):
            Manifest.load(out)
    path.write_text("{")
    with pytest.raises(ManifestError, match="malformed"):
        Manifest.load(out)
    with pytest.raises(ManifestError, match="no such folder"):
        Manifest.load(tmp_path / "missing")
    with open(out / "train-00000.beton", "ab") as file:
        file.write(b"x")
    with pytest.raises(ManifestError, match=r"train-00000.beton: \d+ bytes, but the manifest says"):
        manifest.check_shards(out)
    (out / "train-00000.beton").unlink()
    with pytest.raises(ManifestError, match=r"train-00000.beton: No such file"):
        manifest.check_shards(out)


def test_foreign_state_file(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "conversion.json").write_text("mine")
    assert run(source, tmp_path) == 2
    assert "was not written by a conversion" in capfd.readouterr().err


def test_converting_does_not_wait_for_torch() -> None:
    code = "import sys, fasttrain.dataprep.convert; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True
    )
    assert done.stdout.strip() == "False"
