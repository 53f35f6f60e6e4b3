"""Whether a file is an image, told by its first bytes."""

from __future__ import annotations

HEAD_BYTES = 18

_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)  # bytes of the header that follows; two letters alone say little


def is_image(head: bytes) -> bool:
    """Whether the first HEAD_BYTES of a file are those of a JPEG, PNG, GIF, TIFF, WebP or BMP."""
    if head.startswith(_STARTS):
        return True
    if head[:4] == b"RIFF":
        return head[8:12] == b"WEBP"
    return head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADERS
