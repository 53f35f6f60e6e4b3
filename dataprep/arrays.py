"""Arrays as a source: CIFAR-10 and CIFAR-100 batches (Python and binary version) and .npz files.

Uncompressed arrays are mapped into memory; pickles and compressed arrays are unpacked once in every process, up to
MAX_UNPACKED_BYTES.
"""

from __future__ import annotations

import functools
import io
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from fasttrain.dataprep.archives import read_range
from fasttrain.dataprep.labels import Labels, number_labels, whole_numbers
from fasttrain.dataprep.listing import VAL_NAMES, Listing, Sample, Source, SourceError

MAX_UNPACKED_BYTES = 1 << 31
_NUMPY_MODULES = {"numpy", *(f"numpy.{c}.{part}" for c in ("core", "_core") for part in ("multiarray", "numeric"))}
_CIFAR_SIDE = 32
_CIFAR_PIXELS = 3 * _CIFAR_SIDE * _CIFAR_SIDE
_MAX_PICKLED_ARRAYS, _MAX_SCALAR_BYTES = 4, 16


class _ArrayUnpickler(pickle.Unpickler):
    """Calls only what pickled arrays and numbers need, and only so that the result is about as large as the pickle.

    A few bytes may ask for any call again, on the same data: texts are encoded up to the size of the pickle, and there
    is a limit to the number of arrays.
    """

    def __init__(self, file: BinaryIO, num_bytes: int) -> None:
        """num_bytes: the size of the pickle."""
        super().__init__(file, encoding="bytes")
        self._bytes_left, self._arrays_left = num_bytes, _MAX_PICKLED_ARRAYS

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401 - as the overridden method
        if (module, name) == ("_codecs", "encode"):
            return self._encoded
        if module not in _NUMPY_MODULES or name not in ("_reconstruct", "scalar", "ndarray", "dtype", "_frombuffer"):
            raise SourceError(f"the pickle names {module}.{name}, which no array needs: not loaded")
        if name == "ndarray":
            return "ndarray"  # it is but an argument of _reconstruct
        return {"_reconstruct": self._array, "scalar": self._scalar}.get(name) or super().find_class(module, name)

    def _encoded(self, text: str, codec: str) -> bytes:
        if codec != "latin1":
            raise SourceError(f"the pickle encodes as {codec!r}, which no array needs: not loaded")
        self._bytes_left -= len(text)
        if self._bytes_left < 0:
            raise SourceError("the pickle unpacks to much more than its size: not loaded")
        return text.encode("latin1")

    def _array(self, *_: object) -> np.ndarray:
        self._arrays_left -= 1
        if self._arrays_left < 0:
            raise SourceError(f"the pickle holds more than {_MAX_PICKLED_ARRAYS} arrays: not loaded")
        return np.ndarray((0,), np.uint8)  # the pickle fills it

    @staticmethod
    def _scalar(kind: np.dtype, content: bytes) -> np.generic:
        if kind.itemsize > _MAX_SCALAR_BYTES:
            raise SourceError(f"the pickle holds a number of {kind.itemsize} bytes: not loaded")
        return np.frombuffer(content, kind)[0]


def load_pickle(path: str) -> dict[str, Any]:
    """Load a pickled dictionary of arrays, lists and text; its keys as str.

    Raises:
        SourceError: larger than MAX_UNPACKED_BYTES, damaged, or it does anything that arrays do not need.
        OSError: it can't be read.
    """
    size = Path(path).stat().st_size
    if size > MAX_UNPACKED_BYTES:
        raise SourceError(f"{path}: larger than {MAX_UNPACKED_BYTES} bytes")
    try:
        with open(path, "rb") as file:
            content = _ArrayUnpickler(file, size).load()
        return {_text(key): value for key, value in content.items()}
    except SourceError as error:
        raise SourceError(f"{path}: {error}") from None
    except OSError:
        raise
    except Exception as error:  # damaged pickles raise errors of nearly every type
        raise SourceError(f"{path}: damaged pickle: {type(error).__name__}") from None


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


class CifarReader(NamedTuple):
    """Reads CIFAR images; place = (file, row, bytes before the pixels of a binary record; 0 = a pickle)."""

    files: tuple[str, ...]

    def read(self, sample: Sample) -> np.ndarray:
        file, row, header = sample.place
        if header:
            record = read_range(self.files[file], row * (header + _CIFAR_PIXELS) + header, _CIFAR_PIXELS)
            planes = np.frombuffer(record, np.uint8)
        else:
            planes = _pickled_pixels(self.files[file])[row]
        return np.ascontiguousarray(planes.reshape(3, _CIFAR_SIDE, _CIFAR_SIDE).transpose(1, 2, 0))

    def size(self, sample: Sample) -> int:
        return _CIFAR_PIXELS


@functools.lru_cache(maxsize=16)  # CIFAR has at most six such files
def _pickled_pixels(path: str) -> np.ndarray:
    pixels = load_pickle(path).get("data")
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (_CIFAR_PIXELS,):
        raise SourceError(f"{path}: no array `data` of N x {_CIFAR_PIXELS} bytes")
    return pixels


def cifar_folder(root: Path) -> Path | None:
    """Return the folder that holds CIFAR batches, root or its only sub-folder; None if neither does."""
    inside = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return next((folder for folder in (root, *inside[:1]) if len(inside) < 2 and _cifar_files(folder)), None)


def _cifar_files(folder: Path) -> dict[str, list[Path]]:
    """Return the batches by split; {} if there are none."""
    for train, test, extra in (("data_batch_*.bin", "test_batch.bin", ""), ("data_batch_?", "test_batch", ""),
                               ("train.bin", "test.bin", ""), ("train", "test", "meta")):  # fmt: skip
        files = {"train": sorted(folder.glob(train)), "val": sorted(folder.glob(test))}
        if files["train"] and all(path.is_file() for path in files["train"]) and (folder / extra).exists():
            return {split: found for split, found in files.items() if found}
    return {}


def cifar_source(root: Path) -> Source:
    """List CIFAR-10 or CIFAR-100 (fine labels), Python or binary version. Raises SourceError, OSError."""
    folder = cifar_folder(root) if root.is_dir() else None
    if folder is None:
        raise SourceError(f"{root}: no folder of CIFAR batches")
    by_split = _cifar_files(folder)
    files = tuple(str(path) for group in by_split.values() for path in group)
    splits, values = {}, {}
    for split, group in by_split.items():
        parts = [_cifar_batch(str(path)) for path in group]
        values[split] = np.concatenate([labels for labels, _ in parts])
        splits[split] = Listing(
            Sample(f"{path.name}/{row}", -1, (files.index(str(path)), row, header))
            for path, (labels, header) in zip(group, parts, strict=True)
            for row in range(len(labels))
        )
    classes, labels = number_labels({**values}, _cifar_classes(folder))
    labelled = {split: listing.labelled(labels[split]) for split, listing in splits.items()}
    return Source(root, classes, labelled, CifarReader(files), files)


def _cifar_batch(path: str) -> tuple[np.ndarray, int]:
    """Return the labels of a batch, and the bytes before the pixels of each record (0: a pickle)."""
    if not path.endswith(".bin"):
        content = load_pickle(path)
        pixels = _pickled_pixels(path)
        labels = np.array(content.get("fine_labels", content.get("labels", ())), np.int64).reshape(-1)
        if len(labels) != len(pixels):
            raise SourceError(f"{path}: {len(pixels)} images, but {len(labels)} labels")
        return labels, 0
    header = 2 if Path(path).name in ("train.bin", "test.bin") else 1
    size = Path(path).stat().st_size
    if size % (header + _CIFAR_PIXELS):
        raise SourceError(f"{path}: truncated: {size} bytes is no multiple of {header + _CIFAR_PIXELS}")
    records = np.memmap(path, np.uint8, "r").reshape(-1, header + _CIFAR_PIXELS)
    return records[:, header - 1].astype(np.int64), header


def _cifar_classes(folder: Path) -> list[str]:
    for name in ("batches.meta.txt", "fine_label_names.txt"):
        if (folder / name).exists():
            return (folder / name).read_text("utf-8", "replace").split()
    for name, key in (("batches.meta", "label_names"), ("meta", "fine_label_names")):
        if (folder / name).exists():
            return [_text(label) for label in load_pickle(str(folder / name)).get(key, ())]
    return []


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
