"""What lies in OUT already: damaged records are made again, links are neither followed nor written through."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.commands import one_line_of
from support.pictures import make_images

from fasttrain.dataprep import convert
from fasttrain.formats.manifest import Manifest
from fasttrain.input import open_dataset
from fasttrain.system.errors import RunError

OPTIONS = ("--shard-size", "8", "--workers", "1")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("source"), 2, 10)


@pytest.fixture(scope="module", params=["ffcv", "webdataset"])
def whole(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert convert.main([str(source), str(out), "--format", request.param, *OPTIONS]) == 0
    return out


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.fixture
def unfinished(source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A conversion that was killed when all shards had been written, but not the manifest."""

    def killed(*arguments: object) -> None:
        raise RunError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(convert, "complete", killed)
        assert convert.main([str(source), str(tmp_path / "out"), "--format", kind(whole), *OPTIONS]) == 1
    return tmp_path / "out"


def kind(whole: Path) -> str:
    return Manifest.load(whole).format


def record_of(out: Path) -> Path:
    return next(iter(sorted(out.glob("train-00001.*.json"))))


def change(**changes: Any) -> Callable[[Path], object]:
    def damage(out: Path) -> None:
        content = json.loads(record_of(out).read_bytes())
        record_of(out).write_text(json.dumps({**content, **changes}))

    return damage


def change_shard(**changes: Any) -> Callable[[Path], object]:
    def damage(out: Path) -> None:
        content = json.loads(record_of(out).read_bytes())
        change(shard={**content["shard"], **changes})(out)

    return damage


def shard_of(out: Path) -> Path:
    return out / record_of(out).stem


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)


def swap(out: Path) -> None:
    other = record_of(out).with_name(record_of(out).name.replace("00001", "00000"))
    record_of(out).write_bytes(other.read_bytes())


def link(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no JSON": lambda out: record_of(out).write_text("{"),
    "empty": lambda out: record_of(out).write_text(""),
    "deep": lambda out: record_of(out).write_text("[" * 100_000),
    "a list": lambda out: record_of(out).write_text("[]"),
    "nothing": lambda out: record_of(out).write_text("{}"),
    "pixels": change(pixels=[1, [1, 2, 3]]),
    "pixels of text": change(pixels=["1", [1, 2, 3], [1, 2, 3]]),
    "skipped": change(skipped=[{"path": 7, "reason": ""}]),
    "skipped more": change(skipped=[{"path": "a", "reason": "b"}]),
    "counts of another class": change(class_counts={"99": 1}),
    "counts by no number": change(class_counts={"ant": 1}),
    "counts of text": change(class_counts="12"),
    "no shard": change(shard=None),
    "samples": change_shard(num_samples=7),
    "size": change_shard(num_bytes=7),
    "glimpses": change_shard(glimpses=["a", "b", "c"]),
    "no names": change_shard(names=None),
    "leaves the folder": change_shard(name="../train-00001.beton"),
    "of another shard": swap,
    "another file": lambda out: flip(shard_of(out), shard_of(out).stat().st_size // 2),
    "no file": lambda out: shard_of(out).unlink(),
    "no names file": lambda out: shard_of(out).with_suffix(".names").unlink(),
    "a link for a record": lambda out: link(record_of(out)),
    "a link for a shard": lambda out: link(shard_of(out)),
    "a link for names": lambda out: link(shard_of(out).with_suffix(".names")),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_shard_whose_record_is_damaged_is_made_again(
    source: Path, whole: Path, unfinished: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    DAMAGES[name](unfinished)
    capfd.readouterr()
    assert convert.main([str(source), str(unfinished), "--format", kind(whole), *OPTIONS]) == 0
    lines = [line for line in capfd.readouterr().err.splitlines() if "is made again" in line]
    assert len(lines) == 1, lines
    assert "train-00001" in lines[0]
    (unfinished / "moved").unlink(missing_ok=True)
    assert contents(unfinished) == contents(whole)
    assert not any(path.is_symlink() for path in unfinished.iterdir())


NAMES = ["train-00001.beton", ".train-00001.beton.tmp", "train-00001.names", ".train-00001.names.tmp", "manifest.json",
         ".manifest.json.tmp", "train-00001.beton.json", ".train-00001.beton.json.tmp", ".conversion.json.tmp",
         "train-00001.tar", "train-00001.idx", ".train-00001.idx.tmp"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_written_through_a_link(source: Path, whole: Path, unfinished: Path, name: str) -> None:
    elsewhere = unfinished.parent / "elsewhere"
    for path in (*unfinished.glob("train-00001.*"), unfinished / name):
        path.unlink(missing_ok=True)
    (unfinished / name).symlink_to(elsewhere)
    assert convert.main([str(source), str(unfinished), "--format", kind(whole), *OPTIONS]) == 0
    assert not elsewhere.exists()
    found = contents_of_files(unfinished)
    assert {name: found[name] for name in contents(whole)} == contents(whole)


def contents_of_files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if not path.is_symlink()}


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "7"])
def test_a_damaged_state_is_one_line(
    source: Path, whole: Path, unfinished: Path, text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (unfinished / "conversion.json").write_text(text)
    capfd.readouterr()
    assert convert.main([str(source), str(unfinished), "--format", kind(whole), *OPTIONS]) == 2
    line = one_line_of(capfd.readouterr().err)
    assert "was not written by a conversion" in line or "holds a conversion that differs" in line


def test_the_state_is_not_read_through_a_link(
    source: Path, whole: Path, unfinished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    link(unfinished / "conversion.json")
    capfd.readouterr()
    assert convert.main([str(source), str(unfinished), "--format", kind(whole), *OPTIONS]) == 2
    assert "was not written by a conversion" in one_line_of(capfd.readouterr().err)


def test_names_are_those_of_the_source(source: Path, whole: Path) -> None:
    names = [name for path in sorted(whole.glob("*.names")) for name in path.read_text().splitlines()]
    assert sorted(names) == sorted(str(path.relative_to(source)) for path in source.glob("*/*.jpg"))
    store = open_dataset(whole, "train")
    for index in (0, 9, 19):
        label = int(store.labels(np.array([index]))[0])
        assert f"(class{label}/" in store.name(index)
        assert f"({names[index]})" in store.name(index)
