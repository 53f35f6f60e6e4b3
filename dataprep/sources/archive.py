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
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fasttrain.dataprep.sources.source import Source
from fasttrain.formats.folder import arrange
from fasttrain.formats.listing import IMAGE_EXTENSIONS, MAX_FILE_BYTES, Listing, Sample, SourceError
from fasttrain.formats.tar_headers import TarDamage, tar_headers
from fasttrain.system.regular import open_regular

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: signature, ..., length of its name, of its extra field
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
_LONGEST_NAME = 4096  # characters, as of a path on disk
# What zipfile raises for a directory or a member that is damaged, encrypted, or of a kind that it can't read.
ZIP_ERRORS = zipfile.BadZipFile, ValueError, struct.error, NotImplementedError, RuntimeError, OverflowError, EOFError
Skipped = list[dict[str, str]]


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
    """List the images of a tar of an image folder. Raises SourceError, OSError."""
    skipped: Skipped = []
    members = Listing(
        Sample(plain_name(member.name), -1, (0, member.offset_data, member.size))
        for member in tar_members(str(path), skipped)
        if member.name.lower().endswith(IMAGE_EXTENSIONS)
    )
    classes, splits = arrange(ArchiveTree(str(path), members))
    return Source(path, classes, splits, TarReader((str(path),)), (str(path),), skipped)


def zip_source(path: Path) -> Source:
    """List the images of a zip of an image folder. Raises SourceError (also for a truncated zip), OSError."""
    skipped: Skipped = []
    try:
        with open_zip(path) as archive:
            members = Listing(_zip_images(archive, skipped))
    except ZIP_ERRORS as error:
        raise SourceError(f"{path}: damaged or truncated zip: {error}") from None
    classes, splits = arrange(ArchiveTree(str(path), members))
    return Source(path, classes, splits, ZipReader(str(path)), (str(path),), skipped)


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


def _zip_images(archive: zipfile.ZipFile, skipped: Skipped) -> Iterator[Sample]:
    for member in zip_members(archive, skipped):
        if member.is_dir() or not member.filename.lower().endswith(IMAGE_EXTENSIONS):
            continue
        if reason := _unusable_zip(member):
            skipped.append({"path": member.filename, "reason": reason})
            continue
        place = (member.header_offset, member.compress_type, member.compress_size, member.file_size, member.CRC)
        yield Sample(plain_name(member.filename), -1, place)


def _unusable_zip(member: zipfile.ZipInfo) -> str | None:
    if stat.S_ISLNK(member.external_attr >> 16):
        return "a link, which is not followed"
    if member.flag_bits & 1:
        return "encrypted"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "compressed by a method other than deflate"
    too_large = max(member.file_size, member.compress_size) > MAX_FILE_BYTES
    return f"larger than {MAX_FILE_BYTES} bytes" if too_large else None


class ArchiveTree:
    """The folders that the member names of an archive speak of; one common root folder is looked through.

    Names are only names: nothing is written under them. A name with a hidden part (`.x`, `..`) is left out.
    """

    def __init__(self, root: str, members: Listing) -> None:
        self.root = root
        self._members = members
        self._folders: dict[str, tuple[set[str], list[int]]] = {"": (set(), [])}
        for row, sample in enumerate(members):
            folder, name = _split(sample.path)
            if not any(part.startswith(".") for part in (*folder.split("/"), name) if part):
                self._folder(folder)[1].append(row)
        names, files = self._folders[""]
        self._top = next(iter(names)) if len(names) == 1 and not files and names != {"train"} else ""

    def _folder(self, folder: str) -> tuple[set[str], list[int]]:
        if folder not in self._folders:
            self._folders[folder] = (set(), [])
            above, name = _split(folder)
            self._folder(above)[0].add(name)
        return self._folders[folder]

    def entries(self, folder: str) -> tuple[list[str], list[Sample]]:
        names, rows = self._folders["/".join(filter(None, (self._top, folder)))]
        last = {
            sample.path: sample for sample in map(self._members.__getitem__, rows)
        }  # as in tar, the last one counts
        return sorted(names), [last[path] for path in sorted(last)]


def _split(path: str) -> tuple[str, str]:
    folder, _, name = path.rpartition("/")
    return folder, name
