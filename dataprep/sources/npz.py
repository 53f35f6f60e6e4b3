"""Arrays of an .npz as a source. Stored arrays are mapped, compressed ones unpacked once in every process."""

from __future__ import annotations

import functools
import io
import re
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fasttrain.dataprep.sources.archive import read_range
from fasttrain.dataprep.sources.labels import Labels, NoClasses, decoded, number_labels, whole_numbers
from fasttrain.dataprep.sources.source import MAX_UNPACKED_BYTES, Source
from fasttrain.formats.listing import Listing, Sample, SourceError, Unused
from fasttrain.formats.splits import pick, split_of


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


_JOINED = "jpeg"
_IMAGES = (_JOINED, "images", "image", "imgs", "img", "x", "data", "pixels")
_LABELS = ("labels", "label", "y", "targets", "target", "fine_labels", "class_id", "cls")
_CLASSES = ("classes", "class_names", "label_names")


def npz_source(path: Path, labels: str = "auto") -> Source:
    """List the images of an .npz.

    By split: `<split>_images` or `x_<split>` with `<split>_labels` or `y_<split>`, in any spelling of either, uint8
    N x H x W x 3 or N x H x W; or `<split>_jpeg`, the streams joined, with `<split>_offsets` (N + 1 numbers); without
    splits `images` and `labels`. Labels are N numbers or names, or one-hot rows. `classes` holds the names.

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
        rows = _npz_rows(path, images[-1], len(images) - 1, of_role)
        listings[split] = Listing(rows)
        try:
            values[split] = _npz_labels(path, array, len(rows))
        except NoClasses as error:
            if labels != "auto":
                raise
            notes.append(f"no labels: {error}")
            values[split] = np.full(len(rows), -1)
        used |= {images[-1], array, of_role.get("offsets")}
    in_classes = next((arrays[""][role] for role in _CLASSES if role in arrays.get("", {})), None)
    classes = [decoded(name) for name in npz_array(str(path), in_classes).tolist()] if in_classes else []
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


def _npz_rows(path: Path, name: str, number: int, of_role: dict[str, str]) -> list[Sample]:
    values = npz_array(str(path), name)
    if of_role.get(_JOINED) == name:
        ends = npz_array(str(path), of_role.get("offsets", "offsets")).astype(np.int64)
        if values.dtype != np.uint8 or np.any(np.diff(ends) < 0) or ends.size == 0 or ends[-1] > values.size or ends[0]:
            raise SourceError(f"{path}: {name} and its offsets do not match")
        return [Sample(f"{name}/{i}", -1, (number, *ends[i : i + 2].tolist())) for i in range(ends.size - 1)]
    if values.dtype != np.uint8 or values.ndim not in (3, 4) or (values.ndim == 4 and values.shape[3] != 3):
        raise SourceError(f"{path}: {name} is {values.dtype} {values.shape}, not uint8 N x H x W x 3 or N x H x W")
    return [Sample(f"{name}/{i}", -1, (number, i)) for i in range(len(values))]


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
            return Labels(map(decoded, values.tolist()))
        if values.ndim == 1 and values.dtype.kind in "buif":
            return whole_numbers(values)
    except SourceError as error:
        raise NoClasses(f"{path}: {name}: {error}") from None
    raise NoClasses(f"{path}: {name} is {values.dtype} {values.shape}: neither whole numbers nor text")


def _one_hot(values: np.ndarray) -> np.ndarray:
    """Return the place of the only 1 of each row of zeros; SourceError for other rows."""
    if values.dtype.kind not in "buif" or not (((values == 0) | (values == 1)).all() and (values.sum(1) == 1).all()):
        raise SourceError(f"{values.dtype} {values.shape}, several for an image")
    return values.argmax(1)
