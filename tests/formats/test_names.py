"""The names of samples: one printable line each, every name another, read only where one is asked for."""

import os
from pathlib import Path

import pytest

from fasttrain.formats.names import (
    NamesWriter,
    count_lines,
    escaped,
    name_of,
    names_path,
    read_names,
    sample_name,
    unescaped,
)
from fasttrain.system.errors import DataError

ODD = [
    "apple/000.jpg", "Äpfel/日本.jpg", "a b.jpg", "a\nb.jpg", "a\\nb.jpg", "a\\\nb", "\\", "\\\\",
    "\r", "\t", "\x1b[2J",
    "\x85", "\xa0", "\u2028", "\u202e", "\udc80\udcff", "\U000e0001", "\\x41", "\\udc80", "", "x" * 5000,
]  # fmt: skip


def write(folder: Path, names: list[str]) -> Path:
    shard = folder / "train-00000.beton"
    writer = NamesWriter(shard)
    for name in names:
        writer.write(name)
    writer.publish()
    return names_path(shard)


def test_odd_names_come_back_as_they_were(tmp_path: Path) -> None:
    path = write(tmp_path, ODD)
    assert read_names(path, len(ODD)) == ODD
    assert count_lines(path) == len(ODD)
    lines = path.read_text("utf-8").split("\n")
    assert len(set(lines)) == len(ODD), "the end of the last line is the empty name's line, too"
    assert all(line.isprintable() for line in lines)
    assert lines[0] == "apple/000.jpg"
    assert lines[1] == "Äpfel/日本.jpg"
    assert [unescaped(escaped(name)) for name in ODD] == ODD


def test_one_name_is_found_among_many_blocks(tmp_path: Path) -> None:
    names = [f"folder-{i % 7}/{'x' * (i % 90)}{i}.jpg" for i in range(9000)]
    path = write(tmp_path, names)
    assert path.stat().st_size > 4 << 16
    for row in (0, 1, 1234, 8999, *range(1300, 1400)):
        assert name_of(path, row) == names[row]
    assert name_of(path, 9000) is None
    assert sample_name(tmp_path / "train-00000.beton", 1, path).endswith("train-00000.beton (folder-1/x1.jpg)")


def test_a_message_has_a_number_where_there_is_no_name(tmp_path: Path) -> None:
    shard, path = tmp_path / "a.beton", tmp_path / "a.names"
    plain = f"sample 3 of {shard}"
    assert sample_name(shard, 3, None) == plain
    assert sample_name(shard, 3, path) == plain
    for content in (b"", b"one\n", b"no end", b"x" * (1 << 20)):
        path.write_bytes(content)
        assert sample_name(shard, 3, path) == plain
    path.unlink()
    os.mkfifo(path)
    assert sample_name(shard, 3, path) == plain


def test_what_anybody_wrote_is_shown_short_and_printable(tmp_path: Path) -> None:
    path = tmp_path / "a.names"
    path.write_bytes(b"\x1b[2J\xff\\x1b \\UFFFFFFFF\\Uffffffff\n" + b"y" * 3000 + b"\n")
    for row in (0, 1):
        assert len(sample_name(Path("a"), row, path)) < 250
        assert sample_name(Path("a"), row, path).isprintable()


def test_another_number_of_names_is_an_error_for_who_needs_all(tmp_path: Path) -> None:
    path = write(tmp_path, ["a", "b"])
    for count in (1, 3):
        with pytest.raises(DataError, match=f"not {count} lines"):
            read_names(path, count)
