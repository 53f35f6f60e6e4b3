"""Arrays of an .npz as a source. Stored arrays are mapped, compressed ones unpacked once in every process."""

from __future__ import annotations

import functools
import io
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fasttrain.dataprep.sources.archive import read_range
from fasttrain.dataprep.sources.labels import Labels, number_labels, whole_numbers
from fasttrain.dataprep.sources.source import MAX_UNPACKED_BYTES, Source
from fasttrain.formats.listing import VAL_NAMES, Listing, Sample, SourceError


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
        return np.repeat(pixels[..., None], 3, 2) if pixels.ndim == 2 else np.ascontiguousarray(pixels)

    def size(self, sample: Sample) -> int:
        array, *place = sample.place
        return place[1] - place[0] if len(place) == 2 else npz_array(self.file, self.names[array])[0].nbytes


@functools.lru_cache(maxsize=8)
def npz_array(path: str, name: str) -> np.ndarray:
    """Return an array of an .npz: mapped if it is stored, unpacked if it is compressed.

    Raises:
        SourceError: damaged, an array of objects, or larger than MAX_UNPACKED_BYTES when unpacked.
        OSError: it can't be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.getinfo(f"{name}.npy")
            if member.compress_type != zipfile.ZIP_STORED and member.file_size > MAX_UNPACKED_BYTES:
                raise SourceError(f"{name} is compressed and larger than {MAX_UNPACKED_BYTES} bytes: use numpy.savez")
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, fortran, dtype = read(file)
                header = file.tell()
            if dtype.hasobject or (fortran and len(shape) > 1):
                raise SourceError(f"{name} is an array of objects or in Fortran order")
            count = int(np.prod(shape, dtype=object))
            if header + count * dtype.itemsize != member.file_size:
                raise SourceError(f"{name} has another size than its header says")
            if member.compress_type == zipfile.ZIP_STORED and count:
                local = read_range(path, member.header_offset, 30)
                start = (
                    member.header_offset
                    + 30
                    + int.from_bytes(local[26:28], "little")
                    + int.from_bytes(local[28:30], "little")
                )
                return np.memmap(path, dtype, "r", start + header, shape)
            return np.load(io.BytesIO(archive.read(member)), allow_pickle=False)
    except SourceError as error:
        raise SourceError(f"{path}: {error}") from None
    except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError) as error:
        raise SourceError(f"{path}: array {name!r} can't be read: {error}") from None


def _npz_names(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return [name[:-4] for name in archive.namelist() if name.endswith(".npy")]
    except zipfile.BadZipFile as error:
        raise SourceError(f"{path}: damaged or truncated: {error}") from None


def npz_source(path: Path) -> Source:
    """List the images of an .npz. Raises SourceError, OSError.

    By split (train and one of val, valid, validation, test): `<split>_images` or `x_<split>` with `<split>_labels` or
    `y_<split>`, uint8 N x H x W x 3 or N x H x W; or `<split>_jpeg`, the streams joined, with `<split>_offsets` (N + 1
    numbers); without splits `images` and `labels`. `classes` holds the names.
    """
    names = _npz_names(path)
    found = {split: _npz_split(names, split) for split in ("train", *VAL_NAMES)}
    splits = {"train": found["train"] or _npz_split(names, "")}
    splits["val"] = next((found[name] for name in VAL_NAMES if found[name]), None) if found["train"] else None
    if splits["train"] is None:
        raise SourceError(f"{path}: no images (arrays: {', '.join(names)})")
    arrays = tuple(array for pair in splits.values() if pair for array in pair[:1])
    listings, values = {}, {}
    for split, pair in splits.items():
        if pair:
            rows = _npz_rows(path, pair[0], arrays.index(pair[0]))
            listings[split] = Listing(rows)
            values[split] = _npz_labels(path, pair[1], len(rows))
    classes = [str(name) for name in npz_array(str(path), "classes").tolist()] if "classes" in names else []
    known, labels = number_labels({**values}, classes)
    labelled = {split: listing.labelled(labels[split]) for split, listing in listings.items()}
    return Source(path, known, labelled, NpzReader(str(path), arrays), (str(path),))


def _npz_split(names: list[str], split: str) -> tuple[str, str | None] | None:
    """Return the names of the arrays of images and of labels; None if the split has no images."""
    prefix, suffix = (f"{split}_", f"_{split}") if split else ("", "")
    images = next((n for n in (f"{prefix}jpeg", f"{prefix}images", f"x{suffix}", f"{prefix}data") if n in names), None)
    labels = next((name for name in (f"{prefix}labels", f"y{suffix}", f"{prefix}label") if name in names), None)
    return (images, labels) if images else None


def _npz_rows(path: Path, name: str, number: int) -> list[Sample]:
    values = npz_array(str(path), name)
    if name.endswith("jpeg"):
        ends = npz_array(str(path), name[:-4] + "offsets").astype(np.int64)
        if values.dtype != np.uint8 or np.any(np.diff(ends) < 0) or ends.size == 0 or ends[-1] > values.size or ends[0]:
            raise SourceError(f"{path}: {name} and its offsets do not match")
        return [Sample(f"{name}/{i}", -1, (number, *ends[i : i + 2].tolist())) for i in range(ends.size - 1)]
    if values.dtype != np.uint8 or values.ndim not in (3, 4) or (values.ndim == 4 and values.shape[3] != 3):
        raise SourceError(f"{path}: {name} is {values.dtype} {values.shape}, not uint8 N x H x W x 3 or N x H x W")
    return [Sample(f"{name}/{i}", -1, (number, i)) for i in range(len(values))]


def _npz_labels(path: Path, name: str | None, count: int) -> Labels | np.ndarray:
    """Return the labels; -1 where there are none, or several for an image."""
    if name is None:
        return np.full(count, -1)
    values = npz_array(str(path), name)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if len(values) != count:
        raise SourceError(f"{path}: {count} images, but {len(values)} labels in {name}")
    if values.ndim != 1:
        return np.full(count, -1)
    if values.dtype.kind in "US":
        return Labels(values.astype(str).tolist())
    if values.dtype.kind not in "buif":
        raise SourceError(f"{path}: {name} is {values.dtype}: neither whole numbers nor text")
    try:
        return whole_numbers(values)
    except SourceError as error:
        raise SourceError(f"{path}: {name}: {error}") from None
