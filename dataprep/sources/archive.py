"""Images inside .tar and .zip files, read in place: nothing is unpacked, no link is followed, sizes are limited."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from fasttrain.dataprep.sources.files import relative_names, source_files
from fasttrain.dataprep.sources.source import Reader, Source
from fasttrain.formats.layout import Skipped, arrange
from fasttrain.formats.listing import (
    IMAGE_EXTENSIONS,
    MAX_FILE_BYTES,
    Listing,
    Sample,
    SourceError,
    Unused,
    other_file,
)
from fasttrain.formats.signature import HEAD_BYTES, is_image
from fasttrain.formats.tar_headers import TarDamage, tar_headers
from fasttrain.system.regular import open_regular

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: signature, ..., length of its name, of its extra field
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
_LONGEST_NAME = 4096  # characters, as of a path on disk
# What zipfile raises for a directory or a member that is damaged, encrypted, or of a kind that it can't read.
ZIP_ERRORS = zipfile.BadZipFile, ValueError, struct.error, NotImplementedError, RuntimeError, OverflowError, EOFError
_MAX_DEPTH, _SHOWN = 100, 200  # of folders in a member's name; of its characters, where it is refused


@functools.lru_cache(maxsize=128)
def _opened(path: str) -> BinaryIO:
    return open_regular(path, buffering=0)


def read_range(path: str, offset: int, size: int) -> bytes:
    """Return size bytes of a file from offset on; SourceError if it ends before, OSError if it can't be read."""
    file = _opened(path)  # held, or another thread's use of the cache could close it meanwhile
    if not 0 <= offset <= offset + size <= os.fstat(file.fileno()).st_size:  # before memory is taken for it
        raise SourceError("truncated archive")
    data = os.pread(file.fileno(), size, offset)
    while len(data) < size:
        more = os.pread(file.fileno(), size - len(data), offset + len(data))
        if not more:
            raise SourceError("truncated archive")
        data += more
    return data


class TarReader(NamedTuple):
    """Reads members of tar files; place = (file, offset, size)."""

    files: tuple[str, ...]

    def read(self, sample: Sample) -> bytes:
        file, offset, size = sample.place
        return read_range(self.files[file], offset, size)

    def size(self, sample: Sample) -> int:
        return sample.place[2]


class ZipReader(NamedTuple):
    """Reads members of a zip file; place = (offset of the local header, method, compressed size, size, CRC)."""

    file: str

    def read(self, sample: Sample) -> bytes:
        offset, method, compressed, size, checksum = sample.place
        signature, name, extra = _LOCAL_HEADER.unpack(read_range(self.file, offset, _LOCAL_HEADER.size))
        if signature != b"PK\x03\x04":
            raise SourceError("damaged archive: no member where the directory says")
        data = read_range(self.file, offset + _LOCAL_HEADER.size + name + extra, compressed)
        if method == zipfile.ZIP_DEFLATED:
            try:
                data = zlib.decompressobj(-15).decompress(data, size + 1)
            except zlib.error as error:
                raise SourceError(f"damaged archive: {error}") from None
        if len(data) != size or zlib.crc32(data) != checksum:
            raise SourceError("damaged archive: wrong checksum")
        return data

    def size(self, sample: Sample) -> int:
        return sample.place[3]


def tar_members(path: str, skipped: Skipped) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files of a tar, in order; links, sparse and oversized ones and a cut end go to skipped.

    Raises:
        SourceError: no tar, or a compressed one.
        OSError: it can't be read.
    """
    with open_regular(path) as file:
        start = file.read(2)
        if start in _COMPRESSED:
            raise SourceError(f"{path}: compressed with {_COMPRESSED[start]}: decompress it first")
        size = os.fstat(file.fileno()).st_size
        try:
            for member in tar_headers(file):
                if reason := _unusable(member, size):
                    skipped.append({"path": member.name[:_LONGEST_NAME], "reason": reason})
                elif member.isreg():
                    yield member
        except TarDamage as error:
            if not error.at:
                raise SourceError(f"{path}: no tar archive: {error}") from None
            skipped.append({"path": path, "reason": str(error)})


def _unusable(member: tarfile.TarInfo, archive_size: int) -> str | None:
    if len(member.name) > _LONGEST_NAME:
        return f"a name of more than {_LONGEST_NAME} characters"
    if member.islnk() or member.issym():
        return "a link, which is not followed"
    if member.type == tarfile.GNUTYPE_SPARSE:
        return "a sparse file"
    if not (member.isreg() or member.isdir()):
        return "not a regular file"
    if member.isreg() and member.size > MAX_FILE_BYTES:
        return f"larger than {MAX_FILE_BYTES} bytes"
    return "truncated archive" if member.isreg() and member.offset_data + member.size > archive_size else None


def plain_name(name: str) -> str:
    """Return a member's name without the leading `./` or `/` that some archivers write."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def tar_source(path: Path) -> Source:
    """List the images of a tar of an image folder. Of several, in a folder or by a pattern, each tar is a folder.

    So a tar may be a class, or hold the classes of a split. Raises SourceError, OSError.
    """
    skipped, unused = Skipped(), Unused()
    files = source_files(path, ".tar", unused)
    tops = [f"{os.path.splitext(name)[0]}/" for name in relative_names(files)] if len(files) > 1 else [""]
    members = Listing(
        sample
        for row, (file, top) in enumerate(zip(files, tops, strict=True))
        for sample in _tar_images(file, row, top, skipped, unused)
    )
    tree = ArchiveTree(str(path), members, skipped, unused)
    source = archive_source(path, tree, TarReader(tuple(files)), tuple(files))
    if len(files) > 1:
        as_shards = "--kind webdataset takes them for shards"
        source.notes.append(
            f"each of {len(files)} .tar files is taken for a folder, the first is {tops[0]}: {as_shards}"
        )
    return source


def _tar_images(file: str, row: int, top: str, skipped: Skipped, unused: Unused) -> Iterator[Sample]:
    for member in tar_members(file, skipped):
        name = plain_name(member.name)
        if _is_image(name, lambda m=member: read_range(file, m.offset_data, min(m.size, HEAD_BYTES))):  # type: ignore[misc]
            yield Sample(top + name, -1, (row, member.offset_data, member.size))
        elif not _is_hidden(name):
            unused.add(other_file(name), name)


def zip_source(path: Path) -> Source:
    """List the images of a zip of an image folder. Raises SourceError (also for a truncated zip), OSError."""
    skipped, unused = Skipped(), Unused()
    try:
        with open_zip(path) as archive:
            members = Listing(_zip_images(archive, skipped, unused))
    except ZIP_ERRORS as error:
        raise SourceError(f"{path}: damaged or truncated zip: {error}") from None
    return archive_source(path, ArchiveTree(str(path), members, skipped, unused), ZipReader(str(path)), (str(path),))


def archive_source(path: Path, tree: ArchiveTree, reader: Reader, files: tuple[str, ...]) -> Source:
    """Return the source that a tree of an archive is. Raises SourceError."""
    found = arrange(tree)
    return Source(
        path,
        found.classes,
        found.splits,
        reader,
        files,
        found.skipped,
        in_sequence=isinstance(reader, TarReader),
        unused=found.unused,
        notes=found.notes,
    )


@contextlib.contextmanager
def open_zip(path: str | os.PathLike[str]) -> Iterator[zipfile.ZipFile]:
    """Read the directory of a zip. Raises ZIP_ERRORS, OSError."""
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        yield archive


def zip_members(archive: zipfile.ZipFile, skipped: Skipped) -> Iterator[zipfile.ZipInfo]:
    """Yield the members of a zip; those without a name, and those whose data reaches into another's, go to skipped.

    A small zip whose members share their data unpacks without end.
    """
    by_place = sorted(archive.infolist(), key=lambda member: member.header_offset)
    following = {id(member): after.header_offset for member, after in itertools.pairwise(by_place)}
    for member in archive.infolist():
        end = member.header_offset + _LOCAL_HEADER.size + len(member.filename) + member.compress_size
        if not member.filename:
            skipped.append({"path": str(archive.filename), "reason": "a member without a name"})
        elif end > following.get(id(member), end):
            skipped.append({"path": member.filename, "reason": "its data is that of another member, too"})
        else:
            yield member


def _zip_images(archive: zipfile.ZipFile, skipped: Skipped, unused: Unused) -> Iterator[Sample]:
    for member in zip_members(archive, skipped):
        name = plain_name(member.filename.replace("\\", "/"))  # as some archivers of Windows write them
        if member.is_dir() or member.filename.endswith("\\"):
            continue
        reason = _unusable_zip(member)
        if not _is_image(name, lambda m=member, r=reason: b"" if r else _zip_head(archive, m)):  # type: ignore[misc]
            if not _is_hidden(name):
                unused.add(other_file(name), name)
            continue
        if reason:
            skipped.append({"path": member.filename[:_LONGEST_NAME], "reason": reason})
            continue
        place = (member.header_offset, member.compress_type, member.compress_size, member.file_size, member.CRC)
        yield Sample(name, -1, place)


def _zip_head(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    try:
        with archive.open(member) as file:
            return file.read(HEAD_BYTES)
    except (*ZIP_ERRORS, zlib.error):  # damaged: no image then
        return b""


def _is_image(name: str, head: Callable[[], bytes]) -> bool:
    """Whether a member is an image: by its extension, or where it has none by its first bytes."""
    last = name.rpartition("/")[2]
    return last.lower().endswith(IMAGE_EXTENSIONS) or ("." not in last and is_image(head()))


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part != ".." for part in name.split("/"))


def _unusable_zip(member: zipfile.ZipInfo) -> str | None:
    if len(member.filename) > _LONGEST_NAME:
        return f"a name of more than {_LONGEST_NAME} characters"
    if stat.S_ISLNK(member.external_attr >> 16):
        return "a link, which is not followed"
    if member.flag_bits & 1:
        return "encrypted"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "compressed by a method other than deflate"
    too_large = max(member.file_size, member.compress_size) > MAX_FILE_BYTES
    return f"larger than {MAX_FILE_BYTES} bytes" if too_large else None


class ArchiveTree:
    """The folders that the member names of an archive speak of.

    Names are only names: nothing is written under them. A name with a hidden part (`.x`) is left out.
    """

    def __init__(self, root: str, members: Listing, skipped: Skipped, unused: Unused) -> None:
        self.root, self.skipped, self.unused = root, skipped, unused
        self._members = members
        self._folders: dict[str, tuple[set[str], array[int]]] = {"": (set(), array("q"))}
        for row, sample in enumerate(members):
            folder = sample.path.rpartition("/")[0]
            if folder.count("/") > _MAX_DEPTH:
                skipped.append({"path": f"{sample.path[:_SHOWN]}…", "reason": "in folders nested too deep"})
            elif ".." in folder.split("/"):
                unused.add("names that lead out of the archive", sample.path)
            elif not _is_hidden(sample.path):
                self._rows(folder).append(row)

    def _rows(self, folder: str) -> array[int]:
        rows = self._folders.setdefault(folder, (set(), array("q")))[1]
        while folder:
            above, _, name = folder.rpartition("/")
            known = above in self._folders and name in self._folders[above][0]
            self._folders.setdefault(above, (set(), array("q")))[0].add(name)
            folder = "" if known else above
        return rows

    def entries(self, folder: str) -> tuple[list[str], list[Sample]]:
        names, rows = self._folders[folder]
        last: dict[str, Sample] = {}
        for sample in self._members.take(np.array(rows, np.int64)):
            if sample.path in last:  # as in tar, the last one counts
                self.unused.add("images written again later", sample.path)
            last[sample.path] = sample
        return sorted(names), [last[path] for path in sorted(last)]
