"""The members of a tar, header by header, whatever the headers say.

Python's tarfile walks backwards on a member of negative size, for ever; it recurses with every extended header, and
reads as much as one promises. Here a step always leads ahead in the file, and no header takes more than MAX_EXTENDED
bytes.
"""

from __future__ import annotations

import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from fasttrain.system.errors import DataError

MAX_EXTENDED = 1 << 20  # bytes of one long name, or of one header's pax records
_BLOCK = tarfile.BLOCKSIZE
_PAX_TYPES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_ASIDE_TYPES = (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK, b"V", b"D")  # global records; volume label, list of names
_WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
_TYPE = 156  # where a header says of what kind a member is
_NAME_BYTES, _SIZE, _CHECKSUM, _PREFIX = 100, 124, slice(148, 156), 345
_USUAL = re.compile(rb"([0-7]{11})[\0 ].{12}([0-7]{6})\0 0", re.DOTALL)  # size, time, checksum, type of a file
_END = bytes(_BLOCK)
_SPARSE_FLAG, _SPARSE_BLOCK_FLAG = 482, 504  # where an old sparse header, and a further block of it, says "one more"
_SPARSE, _SPARSE_NAME = b"GNU.sparse.", b"GNU.sparse.name"
_READ = (b"path", b"size", _SPARSE_NAME)  # keys of pax records
_RECORD = re.compile(rb"(\d{1,10}) ([^=\n]+)=")


class TarDamage(DataError):
    """The walk can't go on; at: the byte where (0: it is no tar). The text is one line without the file's name."""

    def __init__(self, reason: str, at: int) -> None:
        super().__init__(reason)
        self.at = at


def tar_headers(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar, links and folders too, in order, up to its end mark.

    The data of the last one may end after the file does. A sparse file has the type GNUTYPE_SPARSE in each of the ways
    that tars say so. Global pax records are left out.

    Raises:
        TarDamage: no end mark, or a header that leads nowhere.
        OSError: it can't be read.
    """
    end, offset = os.fstat(file.fileno()).st_size, 0
    extended: dict[bytes, bytes] = {}
    while (block := _read(file, offset, _BLOCK, end)) != _END:
        try:
            member = _usual(block) or tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.TarError, ValueError, OverflowError) as error:
            raise TarDamage(f"damaged archive: {error}: what follows is lost", offset) from None
        if member.size < 0:
            raise TarDamage("damaged archive: a member of negative size: what follows is lost", offset)
        member.offset, offset = offset, offset + _BLOCK
        if member.type in (*_PAX_TYPES, tarfile.GNUTYPE_LONGNAME):
            if member.size > MAX_EXTENDED:
                raise TarDamage(f"damaged archive: an extended header of {member.size} bytes", member.offset)
            content = _read(file, offset, member.size, end)
            named = {b"path": content.partition(b"\0")[0]}
            extended.update(named if member.type == tarfile.GNUTYPE_LONGNAME else _records(content, member.offset))
            offset += _padded(member.size)
        elif member.type in _ASIDE_TYPES:
            offset += _padded(member.size)
        else:
            if block[_TYPE : _TYPE + 1] == tarfile.AREGTYPE and b"path" in extended:
                # An old kind of file, which its name made a folder: only the whole name may.
                member.type = tarfile.DIRTYPE if extended[b"path"].endswith(b"/") else tarfile.AREGTYPE
            _apply(member, extended)
            extended = {}
            if member.type == tarfile.GNUTYPE_SPARSE and block[_SPARSE_FLAG : _SPARSE_FLAG + 1] == b"\1":
                offset = _after_sparse_blocks(file, offset, end)
            member.offset_data = offset
            offset += 0 if member.type in _WITHOUT_DATA else _padded(member.size)
            yield member


def _usual(block: bytes) -> tarfile.TarInfo | None:
    """Read the header of a file as most archivers write it, in a fourth of the time that tarfile takes; None: another.

    The sum of the bytes is the first half of Adler-32, modulo 65,521. The checksum's own bytes count as spaces.
    """
    found = _USUAL.match(block, _SIZE)
    if not found or block[_PREFIX]:
        return None
    total = int(found[2], 8) - 8 * ord(" ") + sum(block[_CHECKSUM])
    if (1 + total) % 65521 != zlib.adler32(block) & 0xFFFF:
        return None
    member = tarfile.TarInfo(block[:_NAME_BYTES].partition(b"\0")[0].decode("utf-8", "surrogateescape"))
    member.size = int(found[1], 8)
    return member


def _read(file: BinaryIO, offset: int, size: int, end: int) -> bytes:
    data = os.pread(file.fileno(), size, offset) if offset + size <= end else b""
    if len(data) < size:
        raise TarDamage("truncated archive: it has no end mark, what follows is lost", offset)
    return data


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _records(content: bytes, at: int) -> dict[bytes, bytes]:
    """Return those pax records, `LENGTH KEY=VALUE\\n` each, that say where a member lies and what it is called."""
    records, start = {}, 0
    while start < len(content) and content[start]:
        found = _RECORD.match(content, start)
        stop = start + int(found[1]) if found else 0
        if not found or not found.end() < stop <= len(content):
            raise TarDamage("damaged archive: a pax header without records: what follows is lost", at)
        if found[2] in _READ:  # all others could fill the memory, header by header
            records[found[2]] = content[found.end() : stop - 1]
        elif found[2].startswith(_SPARSE):
            records[_SPARSE] = b""
        start = stop
    return records


def _apply(member: tarfile.TarInfo, extended: dict[bytes, bytes]) -> None:
    """Give a member the name and the size that extended headers state."""
    name = extended.get(_SPARSE_NAME, extended.get(b"path"))
    if name is not None:
        member.name = name.decode("utf-8", "surrogateescape").rstrip("/")
    if (size := extended.get(b"size")) is not None:
        if not re.fullmatch(rb"\d{1,18}", size):
            raise TarDamage("damaged archive: a size that is no number: what follows is lost", member.offset)
        member.size = int(size)
    if _SPARSE in extended or _SPARSE_NAME in extended:
        member.type = tarfile.GNUTYPE_SPARSE


def _after_sparse_blocks(file: BinaryIO, offset: int, end: int) -> int:
    """Return where the data of an old sparse file begins, whose map has further blocks."""
    more = True
    while more:
        more = _read(file, offset, _BLOCK, end)[_SPARSE_BLOCK_FLAG] == 1
        offset += _BLOCK
    return offset
