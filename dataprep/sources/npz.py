"""Arrays of an .npz as a source. Stored arrays are mapped, compressed ones unpacked once in every process."""

from __future__ import annotations

import functools
import itertools
import math
import os
import re
import sys
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from fasttrain.dataprep.sources.archive import ZIP_ERRORS, open_zip, read_range
from fasttrain.dataprep.sources.labels import (
    MAX_NAMES_BYTES,
    Labels,
    NoClasses,
    decoded,
    number_labels,
    whole_numbers,
)
from fasttrain.dataprep.sources.source import MAX_UNPACKED_BYTES, Source
from fasttrain.formats.listing import Listing, Sample, SourceError, Unused
from fasttrain.formats.splits import pick, split_of

# NumPy tells whoever reads arrays of Python 2 to save them again.
warnings.filterwarnings("ignore", category=UserWarning, module=__name__)

_ENCRYPTED = 1  # bit of a zip member's flags
_LOCAL_HEADER_BYTES = 30  # of a zip member, before its name
_MOST_DEFLATED = 1032  # times its own size that a deflated stream may hold
_UNPACKED_AT_ONCE = 1 << 20
_TEXTS_AT_ONCE = 1 << 12
_FEW_ROWS = 1 << 16  # cost little, whatever the file says
_LONGEST_NAME = 255  # characters of an array's, which every image in it is called by


class NpzReader(NamedTuple):
    """Reads images of an .npz; place = (array, row), or (array, first byte, one past the last) of JPEG streams."""

    file: str
    names: tuple[str, ...]

    def read(self, sample: Sample) -> bytes | np.ndarray:
        array, *place = sample.place
        values = npz_array(self.file, self.names[array])
        if len(place) == 2:
            return values[place[0] : place[1]].tobytes()
        pixels = values[place[0]]
        planes = pixels[..., None] if pixels.ndim == 2 else pixels
        return np.repeat(planes, 3, 2) if planes.shape[2] == 1 else np.ascontiguousarray(planes)

    def size(self, sample: Sample) -> int:
        array, *place = sample.place
        return place[1] - place[0] if len(place) == 2 else npz_array(self.file, self.names[array])[0].nbytes


@functools.lru_cache(maxsize=8)
def npz_array(path: str, name: str, max_bytes: int | None = None) -> np.ndarray:
    """Return an array of an .npz: mapped if it is stored, unpacked if it is compressed.

    What it says of its size is held against that of the file before anything is read.

    Raises:
        SourceError: damaged, a single number, an array of objects, larger than max_bytes (MAX_UNPACKED_BYTES) when
            unpacked, or of more rows than the file has bytes.
        OSError: it can't be read.
    """
    try:
        with open_zip(path) as archive:
            member = archive.getinfo(f"{name}.npy")
            if reason := _unusable_array(member, max_bytes or MAX_UNPACKED_BYTES):
                raise SourceError(f"{name} {reason}")
            with archive.open(member) as file:
                header = _read_header(file)
                if reason := _unusable_header(header, member.file_size, os.path.getsize(path)):
                    raise SourceError(f"{name} {reason}")
                if member.compress_type != zipfile.ZIP_STORED:
                    return _with_sound_text(_unpacked(file, header))
            if not member.file_size - header.num_bytes:
                return np.empty(header.shape, header.dtype)
            start = _data_offset(path, member) + header.num_bytes
            return _with_sound_text(np.memmap(path, header.dtype, "r", start, header.shape))
    except SourceError as error:
        raise SourceError(f"{path}: {error}") from None
    except KeyError:
        raise SourceError(f"{path}: no array {name!r}") from None
    except (*ZIP_ERRORS, zlib.error, SyntaxError, tokenize.TokenError, TypeError, MemoryError) as error:
        raise SourceError(f"{path}: array {name!r} can't be read: {error or type(error).__name__}") from None


class _Header(NamedTuple):
    """What an .npy says of itself; num_bytes: its own length."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype
    num_bytes: int


def _read_header(file: IO[bytes]) -> _Header:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return _Header(*read(file), file.tell())


def _unusable_array(member: zipfile.ZipInfo, max_bytes: int) -> str | None:
    """Return why the member of a zip is not read at all."""
    if member.flag_bits & _ENCRYPTED:
        return "is encrypted"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is compressed by a method other than deflate"
    if member.compress_type == zipfile.ZIP_DEFLATED and member.file_size > max_bytes:
        return f"is compressed and larger than {max_bytes} bytes: use numpy.savez"
    packed = member.compress_size * (1 if member.compress_type == zipfile.ZIP_STORED else _MOST_DEFLATED)
    return "has another size than its header says" if member.file_size > packed else None


def _unusable_header(header: _Header, member_bytes: int, file_bytes: int) -> str | None:
    """Return why an array is not used, by what its header says."""
    if header.dtype.hasobject or (header.fortran and len(header.shape) > 1):
        return "is an array of objects or in Fortran order"
    if not header.shape:
        return "is a single value, not one for each image"
    if any(type(side) is not int or side < 0 for side in header.shape):
        return "has a shape that is none"
    if header.num_bytes + math.prod(header.shape) * header.dtype.itemsize != member_bytes:
        return "has another size than its header says"
    return "has more rows than the file has bytes" if header.shape[0] > max(file_bytes, _FEW_ROWS) else None


def _unpacked(file: IO[bytes], header: _Header) -> np.ndarray:
    """Unpack an array; memory is taken as its bytes come, as a header may promise any number of them."""
    values = np.empty(header.shape, header.dtype)
    flat = values.reshape(-1).view(np.uint8) if values.nbytes else np.empty(0, np.uint8)
    for start in range(0, flat.size, _UNPACKED_AT_ONCE):
        part = flat[start : start + _UNPACKED_AT_ONCE]
        content = file.read(part.size)
        if len(content) != part.size:
            raise SourceError("an array is shorter than its header says")
        part[:] = np.frombuffer(content, np.uint8)
    file.read(1)  # at the end its checksum is compared
    return values


def _with_sound_text(values: np.ndarray) -> np.ndarray:
    """Return the array; SourceError for text with numbers that are no characters, which NumPy takes all the same."""
    if values.dtype.kind != "U" or not values.size:
        return values
    if np.ascontiguousarray(values).view(f"{values.dtype.str[0]}u4").max() > sys.maxunicode:
        raise SourceError("an array of text holds what is no character")
    return values


def _data_offset(path: str, member: zipfile.ZipInfo) -> int:
    """Return where the content of a stored member begins."""
    local = read_range(path, member.header_offset, _LOCAL_HEADER_BYTES)
    lengths = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    return member.header_offset + _LOCAL_HEADER_BYTES + lengths


def _npz_names(path: Path) -> list[str]:
    try:
        with open_zip(path) as archive:
            names = [name[:-4] for name in archive.namelist() if name.endswith(".npy")]
    except ZIP_ERRORS as error:
        raise SourceError(f"{path}: damaged or truncated: {error}") from None
    if any(len(name) > _LONGEST_NAME for name in names):
        raise SourceError(f"{path}: an array has a name of more than {_LONGEST_NAME} characters")
    return names


_JOINED = "jpeg"
_IMAGES = (_JOINED, "images", "image", "imgs", "img", "x", "data", "pixels")
_LABELS = ("labels", "label", "y", "targets", "target", "fine_labels", "class_id", "cls")
_CLASSES = ("classes", "class_names", "label_names")


def npz_source(path: Path, labels: str = "auto") -> Source:
    """List the images of an .npz.

    By split: `<split>_images` or `x_<split>` with `<split>_labels` or `y_<split>`, in any spelling of either, uint8
    N x H x W x 3, N x H x W x 1 or N x H x W; or `<split>_jpeg`, the streams joined, with `<split>_offsets` (N + 1
    numbers); without splits `images` and `labels`. Labels are N numbers or names, or one-hot rows. `classes` holds the
    names.

    Args:
        path: the file.
        labels: "auto", "none", or the name of the array of labels, with or without its split.

    Raises:
        SourceError, OSError: also for a named array that is missing or holds no classes.
    """
    unused, notes = Unused(), list[str]()
    names = _npz_names(path)
    arrays = _by_split(names)
    chosen = _chosen_splits(arrays)
    if not chosen:
        raise SourceError(f"{path}: no images (arrays: {', '.join(names)})")
    wanted = _LABELS if labels == "auto" else () if labels == "none" else (labels, _role(labels)[1])
    images, listings, values, used = [], {}, {}, set()
    for split, name in chosen.items():
        of_role = arrays[name]
        images.append(next(of_role[role] for role in _IMAGES if role in of_role))
        array = next((of_role[role] for role in wanted if role in of_role), None)
        if array is None and labels not in ("auto", "none"):
            raise SourceError(f"{path}: no array {labels!r} (arrays: {', '.join(names)})")
        listings[split] = _npz_rows(path, images[-1], len(images) - 1, of_role)
        try:
            values[split] = _npz_labels(path, array, len(listings[split]))
        except NoClasses as error:
            if labels != "auto":
                raise
            notes.append(f"no labels: {error}")
            values[split] = np.full(len(listings[split]), -1)
        used |= {images[-1], array, of_role.get("offsets")}
    in_classes = next((arrays[""][role] for role in _CLASSES if role in arrays.get("", {})), None)
    found = npz_array(str(path), in_classes, MAX_NAMES_BYTES).tolist() if in_classes else []
    classes = list(map(decoded, found))
    for name in (name for name in names if name not in used | {in_classes}):
        unused.add("arrays", name)
    known, numbers = number_labels({**values}, classes)
    labelled = {split: listing.labelled(numbers[split]) for split, listing in listings.items()}
    reader = NpzReader(str(path), tuple(images))
    return Source(path, known, labelled, reader, (str(path),), unused=unused, notes=notes)


def _role(name: str) -> tuple[str, str]:
    """Return the split that an array's name speaks of, and what it holds: ("train", "x") for x_train and TrainX."""
    words = [word for word in re.split(r"[\W_]+|(?<=[a-z])(?=[A-Z])", name) if word]
    splits = [split_of(word, whole=True) for word in words]
    role = "_".join(word.lower() for word, split in zip(words, splits, strict=True) if not split)
    return next(filter(None, splits), ""), role


def _by_split(names: list[str]) -> dict[str, dict[str, str]]:
    """Return split ("" = none) -> role -> name of the array."""
    arrays: dict[str, dict[str, str]] = {}
    for name in names:
        split, role = _role(name)
        arrays.setdefault(split, {}).setdefault(role or name, name)
    return arrays


def _chosen_splits(arrays: dict[str, dict[str, str]]) -> dict[str, str]:
    """Return "train" and perhaps "val", by the splits of arrays of images; {} if there are none."""
    with_images = [split for split, of_role in arrays.items() if any(role in of_role for role in _IMAGES)]
    picked = pick(with_images)
    if picked.train or "" in with_images:
        return {"train": picked.train, **({"val": picked.val} if picked.val else {})}
    return {"train": picked.val} if picked.val else {}


def _npz_rows(path: Path, name: str, number: int, of_role: dict[str, str]) -> Listing:
    values = npz_array(str(path), name)
    if of_role.get(_JOINED) == name:
        ends = npz_array(str(path), of_role.get("offsets", f"{name.removesuffix(_JOINED)}offsets"))
        if ends.ndim != 1 or ends.dtype.kind not in "iu" or values.ndim != 1:
            raise SourceError(f"{path}: {name} and its offsets are no rows of whole numbers")
        ends = ends.astype(np.int64)
        if values.dtype != np.uint8 or np.any(np.diff(ends) < 0) or ends.size == 0 or ends[-1] > values.size or ends[0]:
            raise SourceError(f"{path}: {name} and its offsets do not match")
        places = itertools.pairwise(ends.tolist())
        return Listing(Sample(f"{name}/{row}", -1, (number, *place)) for row, place in enumerate(places))
    if values.dtype != np.uint8 or values.ndim not in (3, 4) or (values.ndim == 4 and values.shape[3] not in (1, 3)):
        wanted = "uint8 N x H x W x 3, N x H x W x 1 or N x H x W"
        raise SourceError(f"{path}: {name} is {values.dtype} {values.shape}, not {wanted}")
    if len(values) and not values[0].size:
        raise SourceError(f"{path}: {name} is {values.shape}: images without pixels")
    return Listing(Sample(f"{name}/{row}", -1, (number, row)) for row in range(len(values)))


def _npz_labels(path: Path, name: str | None, count: int) -> Labels | np.ndarray:
    """Return the labels, -1 where there are none. Raises NoClasses; SourceError for another number of them."""
    if name is None:
        return np.full(count, -1)
    values = npz_array(str(path), name)
    if values.ndim == 0 or len(values) != count:
        raise SourceError(f"{path}: {count} images, but {values.size} labels in {name}")
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    try:
        if values.ndim == 2:
            return _one_hot(values)
        if values.ndim == 1 and values.dtype.kind in "US":
            return Labels(_texts(values))
        if values.ndim == 1 and values.dtype.kind in "buif":
            return whole_numbers(values)
    except SourceError as error:
        raise NoClasses(f"{path}: {name}: {error}") from None
    raise NoClasses(f"{path}: {name} is {values.dtype} {values.shape}: neither whole numbers nor text")


def _texts(values_N: np.ndarray) -> Iterator[str]:
    """Yield an array of text, a part at a time."""
    for start in range(0, len(values_N), _TEXTS_AT_ONCE):
        yield from map(decoded, values_N[start : start + _TEXTS_AT_ONCE].tolist())


def _one_hot(values: np.ndarray) -> np.ndarray:
    """Return the place of the only 1 of each row of zeros; SourceError for other rows."""
    if values.dtype.kind not in "buif" or not (((values == 0) | (values == 1)).all() and (values.sum(1) == 1).all()):
        raise SourceError(f"{values.dtype} {values.shape}, several for an image")
    return values.argmax(1)
