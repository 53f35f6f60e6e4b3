"""What the segments of a JPEG say before anything is decoded: found by their markers and lengths."""

from __future__ import annotations

import re
from collections.abc import Iterator

_START, _END, _SCAN = b"\xff\xd8", b"\xff\xd9", 0xDA
_DHT, _JPG, _DAC, _APP1 = 0xC4, 0xC8, 0xCC, 0xE1
_FRAMES = {*range(0xC0, 0xD0)} - {_DHT, _JPG, _DAC}
_LOSSLESS = (0xC3, 0xC7, 0xCB, 0xCF)
_EXIF, _XMP, _XMP_ORIENTATION = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"tiff:Orientation"
_NOTES_WITHIN = 1 << 17  # bytes: EXIF and XMP are among the first segments, and each has 64 KiB at most
_SEQUENTIAL, _WHOLE_SPECTRUM = (0xC0, 0xC1), b"\0\x3f\0"
_NOTES = (*range(0xE0, 0xF0), 0xFE)  # segments of applications, and comments
_SEGMENT = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")  # how one begins that has a length
_TAIL = 64  # bytes in which a sound stream's end marker lies; some writers append a little after it


def segments(data: bytes) -> Iterator[tuple[int, int]]:
    """The marker (its second byte) of each segment and where it begins; the scan's, 0xDA, is the last.

    Ends before that where the bytes between segments are odd, or the stream does.
    """
    at = len(_START)
    while at + 4 <= len(data) and data[at] == 0xFF:
        yield data[at + 1], at
        if data[at + 1] == _SCAN:
            return
        at += 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))


def unusual(data: bytes) -> str | None:
    """What a JPEG's frame says that decoders do not take; None for a usual one."""
    for marker, at in segments(data):
        if marker in _FRAMES and at + 4 < len(data):
            if marker in _LOSSLESS:
                return "a lossless JPEG"
            if data[at + 4] != 8:
                return f"a JPEG of {data[at + 4]} bits a sample"
            return "a JPEG in arithmetic coding" if marker > _JPG else None
    return None


def may_state_orientation(data: bytes) -> bool:
    """Whether a JPEG has EXIF before its pixels, or XMP that speaks of an orientation."""
    for marker, at in segments(data):
        if marker == _SCAN:
            return False
        if marker == _APP1 and (data.startswith(_EXIF, at + 4) or _is_xmp_with_orientation(data, at)):
            return True
    # Odd bytes lie between segments.
    return any(data.find(sought, 0, _NOTES_WITHIN) >= 0 for sought in (_EXIF, _XMP_ORIENTATION))


def _is_xmp_with_orientation(data: bytes, at: int) -> bool:
    end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data.startswith(_XMP, at + 4) and data.find(_XMP_ORIENTATION, at, end) >= 0


def tidied(data: bytes) -> bytes:
    """The same pixels without what decoders find odd before them: a warning about that would be the only one.

    Bytes that belong to no segment go, notes with their versions, and limits in a scan that takes the whole spectrum.
    """
    tidy, at, sequential = bytearray(_START), len(_START), False
    while found := _SEGMENT.search(data, at):
        at, marker = found.start(), data[found.start() + 1]
        end = at + 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
        if marker == _SCAN:
            return bytes(tidy) + (data[at : end - 3] + _WHOLE_SPECTRUM if sequential else data[at:end]) + data[end:]
        if marker not in _NOTES:
            tidy += data[at:end]
        sequential = marker in _SEQUENTIAL or (sequential and marker not in _FRAMES)
        at = end
    return data


def padding(data: bytes) -> int:
    """How many bytes before a JPEG's end marker are 00 or FF, as some cameras write to fill a block."""
    scan = next((at for marker, at in segments(data) if marker == _SCAN), len(data))
    pixels = data[scan : max(scan, data.find(_END, scan))]
    return len(pixels) - len(pixels.rstrip(b"\0\xff"))


def looks_whole(data: bytes) -> bool:
    """Whether a JPEG's segments lead to its pixels, and these to an end marker that is the last thing in it."""
    scan = next((at for marker, at in segments(data) if marker == _SCAN), None)
    return data.startswith(_START) and scan is not None and data.find(_END, scan) >= len(data) - _TAIL
