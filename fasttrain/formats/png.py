"""The chunks of a PNG: the checksums of those that make its pixels, and a file of those alone.

Pillow reads pixels without comparing the checksums of their chunks, and gives up a sound picture for a damaged or very
long comment.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from fasttrain.system.errors import DataError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
# How chunks begin in which writers put EXIF, or XMP.
_EXIF, _XMP = b"Raw profile type exif\0", b"XML:com.adobe.xmp\0"
_ORIENTATION = (b"eXIf", b"tEXt" + _EXIF, b"zTXt" + _EXIF, b"iTXt" + _XMP)
_MOST_CHUNKS = 1 << 18  # writers fill 8 KiB and more; a file of empty ones alone would take minutes and gigabytes
_AROUND = 12  # bytes of a chunk beside its content: length and kind before it, a checksum behind


class PngError(DataError):
    """The file is no sound PNG; the text is one line."""


class Chunk(NamedTuple):
    """A chunk's kind, and where it lies in the file with all that belongs to it."""

    kind: bytes
    start: int
    end: int


def _chunks(data: bytes) -> Iterator[Chunk]:
    at, kind, count = len(SIGNATURE), b"", 0
    while kind != b"IEND":
        end = at + _AROUND + int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        if end > len(data):
            raise PngError("truncated")
        if not kind.isalpha():
            raise PngError("damaged: a chunk without a name")
        count += 1
        if count > _MOST_CHUNKS:
            raise PngError(f"more than {_MOST_CHUNKS} chunks")
        yield Chunk(kind, at, end)
        at = end


def _is_sound(data: bytes, chunk: Chunk) -> bool:
    content = memoryview(data)[chunk.start + 4 : chunk.end - 4]
    return zlib.crc32(content) == int.from_bytes(data[chunk.end - 4 : chunk.end], "big")


def pixels_alone(data: bytes) -> bytes:
    """Return a PNG of the chunks alone that make the pixels, as they are.

    Raises:
        PngError: one of them is damaged or missing, or the file ends too early.
    """
    parts, seen = [memoryview(SIGNATURE)], set()
    for chunk in _chunks(data):
        if chunk.kind in _PIXELS:
            if not _is_sound(data, chunk):
                raise PngError(f"damaged: the checksum of its {chunk.kind.decode()} is wrong")
            parts.append(memoryview(data)[chunk.start : chunk.end])
            seen.add(chunk.kind)
    if b"IDAT" not in seen:
        raise PngError("damaged: no pixels")
    return b"".join(parts)


def orientation_notes(data: bytes) -> Iterator[bytes]:
    """Yield a PNG of one pixel around each sound chunk that may state an orientation: quick to open.

    Raises PngError where the file ends too early.
    """
    chunks = list(_chunks(data))
    for start in _ORIENTATION:
        for chunk in chunks:
            if data.startswith(start, chunk.start + 4) and _is_sound(data, chunk):
                yield _BEFORE + data[chunk.start : chunk.end] + _BEHIND
                break


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", len(content), kind) + content + struct.pack(">I", zlib.crc32(kind + content))


_BEFORE = SIGNATURE + _chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
_BEHIND = _chunk(b"IDAT", zlib.compress(b"\0\0")) + _chunk(b"IEND", b"")
