"""--part I/N: one set from several processes, in any order; killed parts, parts at once, and parts of damaged sets."""

import importlib.util
import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.commands import one_line_of
from support.forks import Fork
from support.pictures import make_images

from fasttrain.dataprep import convert
from fasttrain.dataprep.parts import Part, lock_part
from fasttrain.dataprep.plan import PlannedShard
from fasttrain.dataprep.sources.source import Reader
from fasttrain.formats.listing import Sample
from fasttrain.formats.manifest import Manifest
from fasttrain.system import columns
from fasttrain.system.errors import UserError
from fasttrain.system.lock import lock

OPTIONS = ("--max-side", "24", "--shard-size", "5", "--workers", "1", "--val-fraction", "0.25")


def run(*arguments: object) -> int:
    return convert.main([*map(str, arguments), *OPTIONS])


def files_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def last_line(text: str) -> dict:
    return json.loads(text.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_images(tmp_path_factory.mktemp("source"), 3, 16)
    (root / "class1" / "bad.jpg").write_bytes(b"")
    return root


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run(source, out) == convert.EXIT_SKIPPED
    return files_of(out)


@pytest.mark.parametrize("order", itertools.permutations((1, 2, 3)))
def test_parts_in_any_order_give_the_bytes_of_one_process(
    source: Path, whole: dict[str, bytes], tmp_path: Path, order: tuple[int, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    missing = []
    for number in order:
        assert not (out / "manifest.json").exists()
        status = run(source, out, "--part", f"{number}/3")
        line = last_line(capfd.readouterr().out)
        assert line["part"] == f"{number}/3"
        missing.append(line["shards_missing"])
        assert status == (0 if missing[-1] else convert.EXIT_SKIPPED)
    assert files_of(out) == whole
    assert missing[-1] == 0
    assert missing == sorted(missing, reverse=True)
    assert line["images"] == Manifest.load(out).num_samples("train") + Manifest.load(out).num_samples("val")
    assert run(source, out, "--part", "2/3") == convert.EXIT_SKIPPED
    assert "already converted" in capfd.readouterr().out
    assert files_of(out) == whole, "nothing is left of the locks"


def test_a_part_tells_of_its_own_share(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(source, tmp_path / "out", "--part", "1/3") == 0
    line = last_line(capfd.readouterr().out)
    shards = len(list((tmp_path / "out").glob("*.beton")))
    assert line["shards"] == shards > 0
    assert 0 < line["images"] <= 5 * shards
    assert line["shards_missing"] == len(range(0, 37, 5)) + len(range(0, 12, 5)) - shards


def test_more_parts_than_shards(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    for number in range(1, 21):
        run(source, tmp_path / "out", "--part", f"{number}/20")
    assert files_of(tmp_path / "out") == whole


def test_the_division_may_change_and_one_process_may_end_what_parts_began(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run(source, out, "--part", "2/3") == 0
    assert run(source, out, "--part", "1/2") == 0
    assert run(source, out) == convert.EXIT_SKIPPED
    assert files_of(out) == whole


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0", "-1/3", "1/3 ", "1.0/3"])
def test_what_is_no_part_is_refused(source: Path, tmp_path: Path, text: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(source, tmp_path / "out", f"--part={text}") == 2
    assert "not I/N with I from 1 to N" in one_line_of(capfd.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_shares_cover_the_plan_once() -> None:
    plan = [PlannedShard(f"train-{i:05d}.beton", "train", [Sample("a", -1)], 1) for i in range(17)]
    for of in (1, 2, 5, 17, 40):
        shares = [Part(number, of).share(plan) for number in range(1, of + 1)]
        assert [shard for share in shares for shard in share] == plan
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (Part(1, 2), "part 1/2 is being written by another process"),
        (Part(2, 3), r"parts of another division are being written here (.part-2-of-3.lock)"),
        (None, "another conversion, in one piece, is writing here"),
    ],
)
def test_two_that_would_write_the_same_shards_are_kept_apart(
    source: Path, tmp_path: Path, held: Part | None, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with lock_part(out, held) if held else lock(out, ""):
        capfd.readouterr()
        assert run(source, out, "--part", "1/2") == 2
        assert message in one_line_of(capfd.readouterr().err)
        if held:
            assert run(source, out) == 2
            assert "is being written here" in (error := capfd.readouterr().err) or "is writing here" in error
    with lock_part(out, Part(2, 2)):
        assert run(source, out, "--part", "1/2") == 0, "another part may run at the same time"


def test_parts_must_be_of_one_conversion(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(source, tmp_path / "out", "--part", "1/2") == 0
    assert run(source, tmp_path / "out", "--part", "2/2", "--quality", "50") == 2
    assert "other settings: quality" in capfd.readouterr().err


def test_a_shard_that_is_damaged_before_the_end_is_made_again(
    source: Path, whole: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(source, out, "--part", "1/2") == 0
    os.truncate(out / "train-00000.beton", 10)
    assert run(source, out, "--part", "2/2") == 0
    done = capfd.readouterr()
    assert last_line(done.out)["shards_missing"] == 1
    assert "the shard is made again" in done.err
    assert not (out / "manifest.json").exists()
    assert run(source, out, "--part", "1/2") == convert.EXIT_SKIPPED
    assert files_of(out) == whole


def _held(words: list[str], waiting: Path) -> int:
    """A part that has written some shards and then waits."""
    encode, calls = convert.encode_samples, itertools.count()

    def encode_or_wait(reader: Reader, samples: Sequence, **settings: object) -> Iterator:
        if next(calls) >= 3:
            while True:
                if list(Path(words[1]).glob("train-00001.*.json")):
                    waiting.touch()
                time.sleep(0.01)
        yield from encode(reader, samples, **settings)

    convert.encode_samples = encode_or_wait
    return convert.main(words)


def test_a_part_that_was_killed_continues(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out, waiting = tmp_path / "out", tmp_path / "waiting"
    assert run(source, out, "--part", "2/2") == 0
    fork = Fork(tmp_path, _held, [str(source), str(out), *OPTIONS, "--part", "1/2"], waiting)
    deadline = time.monotonic() + 100
    while not waiting.exists():
        assert time.monotonic() < deadline, fork.kill()
        assert fork.process.is_alive(), fork.kill()
        time.sleep(0.01)
    os.kill(fork.process.pid or 0, signal.SIGKILL)
    fork.kill()
    kept = (out / "train-00000.beton").stat().st_mtime_ns
    assert run(source, out, "--part", "1/2") == convert.EXIT_SKIPPED
    assert (out / "train-00000.beton").stat().st_mtime_ns == kept
    assert files_of(out) == whole


def test_a_source_that_is_far_away_is_not_downloaded_by_every_part(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("https://127.0.0.1:9/set.tar", tmp_path / "out", "--part", "1/2") == 2
    assert "each part would download SOURCE" in one_line_of(capfd.readouterr().err)


def test_a_listing_on_disk_gives_the_same_shards(
    source: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "SPILL_BYTES", 64)
    assert run(source, tmp_path / "out") == convert.EXIT_SKIPPED
    assert files_of(tmp_path / "out") == whole


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.usefixtures("ray_alone")
def test_parts_on_ray_and_here_give_the_same_shards(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    for part, engine in (("2/2", "ray"), ("1/2", "local")):
        run(source, tmp_path / "out", "--part", part, "--engine", engine)
    assert files_of(tmp_path / "out") == whole


def test_an_unfinished_conversion_of_an_earlier_version_is_refused(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(source, out, "--part", "1/2") == 0
    state = json.loads((out / "conversion.json").read_bytes())
    del state["order"], state["shuffle"]
    (out / "conversion.json").write_text(json.dumps(state))
    capfd.readouterr()
    for part in ((), ("--part", "2/2")):
        assert run(source, out, *part) == 2
        assert "an earlier version began" in one_line_of(capfd.readouterr().err)


def test_a_finished_set_of_an_earlier_version_counts_as_converted(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(source, tmp_path / "out") == convert.EXIT_SKIPPED
    settings = json.loads((tmp_path / "out" / "manifest.json").read_bytes())["settings"]
    assert sorted(settings) == sorted(
        ["format", "write", "max_side", "quality", "check", "shard_size", "val_fraction", "seed", "source"]
    )
    assert run(source, tmp_path / "out") == convert.EXIT_SKIPPED
    assert "already converted" in capfd.readouterr().out


@pytest.mark.parametrize("part", [False, True])
def test_of_many_skipped_images_the_manifest_names_the_first_and_a_file_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fasttrain.dataprep.totals.LISTED_SKIPS", 4)
    root = tmp_path / "source"
    root.mkdir()
    for i in range(9):
        (root / f"bad{i}\t.jpg").write_bytes(b"" if i % 2 else b"text")
    for i in range(12):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(root / f"good{i}.jpg")
    (root / "gone.jpg").symlink_to("nowhere")
    out = tmp_path / "out"
    words = [str(root), str(out), "--shard-size", "4", "--workers", "1"]
    if part:
        assert convert.main([*words, "--part", "2/2"]) == 0
        words += ["--part", "1/2"]
    assert convert.main(words) == convert.EXIT_SKIPPED
    line = last_line(capfd.readouterr().out)
    assert line["skipped"]["count"] == sum(line["skipped"]["reasons"].values()) == 10
    manifest = Manifest.load(out)
    assert len(manifest.skipped) == 4
    assert manifest.skips is not None
    assert manifest.skips.count == 10
    lines = (out / "skipped.txt").read_text().splitlines()
    names = [*(f"bad{i}\\x09.jpg" for i in range(9)), "gone.jpg"]
    assert sorted(line.split("\t")[0] for line in lines) == names
    assert [line.split("\t")[1] for line in lines[:4]] == [skip["reason"] for skip in manifest.skipped]
    assert manifest.skips.file is not None
    assert (out / "skipped.txt").stat().st_size == manifest.skips.file.num_bytes
    assert not list(out.glob(".*"))


def test_a_share_is_no_manifest(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Callable] = []
    monkeypatch.setattr(Manifest, "save", lambda *arguments: saved.append(arguments))
    run(source, tmp_path / "out", "--part", "1/2")
    assert not saved


def test_a_part_number_is_bounded() -> None:
    with pytest.raises(UserError):
        Part.parse("1/10000000")
