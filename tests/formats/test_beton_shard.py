"""A shard that is read sample by sample tells what the reader of all tables tells, and finds the same damage."""

from pathlib import Path

import numpy as np
import pytest

from fasttrain.formats import beton_shard
from fasttrain.formats.beton import ALLOCATION, METADATA_START, SAMPLE, BetonError, BetonReader, BetonWriter
from fasttrain.formats.beton_shard import _ALLOCATION, _SAMPLE, BetonShard
from fasttrain.system.mapped import map_file

ROWS = 10


@pytest.fixture(autouse=True, params=[0, ROWS], ids=["copied", "held"])
def held_samples(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of the shards here are read entry by entry, or held."""
    monkeypatch.setattr(beton_shard, "HELD_SAMPLES", request.param)


def write(path: Path, rows: int = ROWS, room: int = ROWS) -> Path:
    with BetonWriter(path, room) as writer:
        for row in range(rows):
            raw = row % 3 == 0
            writer.write(bytes(3 * (4 + row) * 5 if raw else 40 + row), 4 + row, 5, row - 1, raw=raw)
    return path


@pytest.mark.parametrize("room", [ROWS, 50])
def test_every_sample_is_that_of_the_reader_of_all(tmp_path: Path, room: int) -> None:
    path = write(tmp_path / "a.beton", room=room)
    shard, reader = BetonShard(path), BetonReader(path)
    assert shard.num_samples == reader.num_samples == ROWS
    assert [shard.image(row) for row in range(ROWS)] == [reader.image(row) for row in range(ROWS)]
    assert [shard.label(row) for row in range(ROWS)] == reader.label_N.tolist() == list(range(-1, ROWS - 1))


def test_both_forms_of_a_layout_agree() -> None:
    generator = np.random.default_rng(0)
    for dtype, layout in ((SAMPLE, _SAMPLE), (ALLOCATION, _ALLOCATION)):
        assert layout.size == dtype.itemsize
        content = generator.bytes(dtype.itemsize)
        values = np.frombuffer(content, dtype)[0].tolist()
        flat = (*values[0], values[1]) if dtype is SAMPLE else values
        assert layout.unpack(content) == flat


HEADER_DAMAGE = [
    (0, np.uint16(1), "version 1"),
    (8, np.uint64(2**60), "tables of 1152921504606846976 samples do not fit"),
    (8, np.uint64(9), "do not fit"),
    (8, np.uint64(0), "do not fit"),
    (16, np.uint64(0), "do not fit"),
    (16, np.uint64(2**63), "do not fit"),
    (24, np.uint8(5), "not a .beton file as convert.py writes it"),
]
SAMPLE_DAMAGE = [
    (METADATA_START, np.uint8(7), "has an unknown image mode"),
    (METADATA_START + 24, np.uint8(1), "is a raw image of the wrong size"),
    (METADATA_START + 1, np.uint16(0), "is an image without pixels"),
    (METADATA_START + 5, np.uint64(2**63), "disagree"),
    (-240, np.uint64(3), "disagree"),
    (-232, np.uint64(2**63), "disagree"),
    (-224, np.uint64(0), "disagree"),
    (-224, np.uint64(2**64 - 8), "lies outside the file"),
    (-224, np.uint64(2**20), "lies outside the file"),
]


def damaged(path: Path, offset: int, value: np.generic) -> Path:
    content = bytearray(write(path).read_bytes())
    start = offset % len(content)
    content[start : start + value.nbytes] = value.tobytes()
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(("offset", "value", "message"), HEADER_DAMAGE)
def test_a_damaged_header_is_found_at_once(tmp_path: Path, offset: int, value: np.generic, message: str) -> None:
    path = damaged(tmp_path / "a.beton", offset, value)
    with pytest.raises(BetonError, match=message) as error:
        BetonShard(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("offset", "value", "message"), SAMPLE_DAMAGE)
def test_a_damaged_entry_harms_its_own_sample_alone(
    tmp_path: Path, offset: int, value: np.generic, message: str
) -> None:
    row = 1 if offset == METADATA_START + 24 else 0
    path = damaged(tmp_path / "a.beton", offset, value)
    with pytest.raises(BetonError):
        BetonReader(path)
    shard = BetonShard(path)
    with pytest.raises(BetonError, match=message):
        shard.image(row)
    for other in set(range(ROWS)) - {row}:
        assert shard.image(other).height == 4 + other


def test_files_that_are_cut_are_found(tmp_path: Path) -> None:
    content = write(tmp_path / "a.beton").read_bytes()
    for length in (0, 10, 24, 1000, METADATA_START, len(content) // 2, len(content) - 24, len(content) - 1):
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(BetonError, match="cut: "):
            BetonShard(tmp_path / "cut")
    with pytest.raises(BetonError, match="No such file"):
        BetonShard(tmp_path / "missing")


def test_an_entry_that_leads_out_after_the_shard_was_opened_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beton_shard, "HELD_SAMPLES", 0)
    path = write(tmp_path / "a.beton")
    shard = BetonShard(path)
    with open(path, "r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert shard.data[-1] == 0xFF
    for row in range(ROWS):
        with pytest.raises(BetonError):
            shard.image(row)


def test_a_part_of_a_mapped_file_keeps_it(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(100)))
    whole = map_file(tmp_path / "a")
    part = whole[10:13]
    assert not whole.flags.writeable
    del whole
    (tmp_path / "a").unlink()
    assert part.tolist() == [10, 11, 12]
    del part
    assert str(tmp_path) not in Path("/proc/self/maps").read_text("utf-8")


def test_what_is_no_file_is_not_mapped(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for name, reason in (("empty", "empty file"), ("missing", "No such file"), (".", "not a regular file")):
        with pytest.raises(OSError, match=reason):
            map_file(tmp_path / name)
