"""What the source called the samples of a shard: a text file beside it, one line a sample, in their order.

UTF-8; a backslash, what can't be printed and bytes that are no UTF-8 are written as Python writes them in a text.
Nothing but messages needs a name, so a file is opened only where one is asked for.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import BinaryIO

from fasttrain.formats.listing import MAX_FILE_BYTES
from fasttrain.system.durable import NewFile
from fasttrain.system.errors import DataError
from fasttrain.system.regular import open_regular, read_at_most

EXTENSION = ".names"
_BLOCK_BYTES = 1 << 16
_SHOWN = 200  # characters of a name in a message
_ESCAPE = re.compile(r"\\(?:(\\)|x([0-9a-f]{2})|u([0-9a-f]{4})|U([0-9a-f]{8}))")


def names_path(shard: Path) -> Path:
    """Return where the names of a shard's samples lie."""
    return shard.with_suffix(EXTENSION)


def escaped(name: str) -> str:
    """Return a name as a line holds it: printable, and another line for every other name."""
    if name.isprintable() and "\\" not in name:
        return name
    return "".join(c if c.isprintable() and c != "\\" else _as_python(c) for c in name)


def _as_python(character: str) -> str:
    code = ord(character)
    if character == "\\":
        return "\\\\"
    return f"\\x{code:02x}" if code < 1 << 8 else f"\\u{code:04x}" if code < 1 << 16 else f"\\U{code:08x}"


def unescaped(line: str) -> str:
    """Return the name that a line holds; what is no escape stands for itself."""
    return _ESCAPE.sub(lambda m: "\\" if m[1] else _character(m[2] or m[3] or m[4], m[0]), line)


def _character(digits: str, otherwise: str) -> str:
    code = int(digits, 16)
    return chr(code) if code <= 0x10FFFF else otherwise


class NamesWriter:
    """Writes the names of one shard, under a temporary name until it is published."""

    def __init__(self, shard: Path) -> None:
        """Open the temporary file."""
        self._new = NewFile(names_path(shard), _BLOCK_BYTES)

    def write(self, name: str) -> None:
        """Append a name. Raises OSError when the disk is full."""
        self._new.file.write(f"{escaped(name)}\n".encode())

    def publish(self) -> None:
        """Make the file durable and give it its name. Raises OSError."""
        try:
            self._new.publish()
        finally:
            self._new.discard()

    def discard(self) -> None:
        """Remove the temporary file; nothing once it has its name."""
        self._new.discard()


def sample_name(shard: Path | str, row: int, names: Path | None) -> str:
    """Return what messages call a sample: its number, its shard and, from a file of names, its name."""
    name = name_of(names, row) if names else None
    return f"sample {row} of {shard}" + (f" ({name})" if name else "")


def name_of(path: Path, row: int) -> str | None:
    """Return the line of a sample, shortened; None where the file does not have it or can't be read.

    It is read through in blocks, not mapped: storage that hangs here must not keep others from saying so.
    """
    try:
        with open_regular(path) as file:
            line = _line(file, row)
    except OSError:
        return None
    if line is None:
        return None
    name = escaped(unescaped(line.decode("utf-8", "replace")))  # anybody may have written it
    return f"{name[:_SHOWN]}{'…' * (len(name) > _SHOWN)}"


def _line(file: BinaryIO, row: int) -> bytes | None:
    while block := file.read(_BLOCK_BYTES):
        before = block.count(b"\n")
        if row <= before:  # the line begins in this block, and ends in it or the next
            line, end, _ = (block.split(b"\n", row)[row] + file.read(_BLOCK_BYTES)).partition(b"\n")
            return line if end else None
        row -= before
    return None


def read_names(path: Path, count: int, sha256: str = "") -> list[str]:
    """Return the names of all samples of a shard; DataError or OSError for a file that has not so many.

    sha256: in hex, of the file that it has to be; "" for any.
    """
    content = read_at_most(path, MAX_FILE_BYTES)
    if sha256 not in ("", hashlib.sha256(content).hexdigest()):
        raise DataError(f"{path}: not the names that the manifest tells of: damaged, or converted anew")
    lines = content.decode("utf-8", "replace").split("\n")
    if len(lines) != count + 1 or lines[-1]:
        raise DataError(f"{path}: not {count} lines")
    return [unescaped(line) for line in lines[:-1]]


def count_lines(path: Path) -> int:
    """Return the number of lines of a file of names. Raises OSError."""
    with open_regular(path) as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(_BLOCK_BYTES), b""))
