"""Arrays as a source: CIFAR-10 and CIFAR-100 batches (Python and binary version) and .npz files.

Uncompressed arrays are mapped into memory; pickles and compressed arrays are unpacked once in every process, up to
MAX_UNPACKED_BYTES.
"""

from __future__ import annotations

import functools
import pickle
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from fasttrain.dataprep.sources.archive import read_range
from fasttrain.dataprep.sources.labels import number_labels
from fasttrain.dataprep.sources.source import MAX_UNPACKED_BYTES, Source
from fasttrain.formats.listing import Listing, Sample, SourceError, Unused, other_file

_NUMPY_MODULES = {"numpy", *(f"numpy.{c}.{part}" for c in ("core", "_core") for part in ("multiarray", "numeric"))}
_CIFAR_SIDE = 32
_CIFAR_PIXELS = 3 * _CIFAR_SIDE * _CIFAR_SIDE
_TELLING_NAMES = ("data_batch_1", "data_batch_1.bin", "test_batch", "test_batch.bin", "train.bin", "meta")
_OTHER_FILES = ("batches.meta", "batches.meta.txt", "meta", "fine_label_names.txt", "coarse_label_names.txt")
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
    """Return the folder that holds CIFAR batches, root or one in it, as torchvision keeps them; None if there is none.

    Raises:
        SourceError: several folders in root hold CIFAR batches.
    """
    inside = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    found = [root] if _cifar_files(root) else [path for path in inside if _looks_like_cifar(path)]
    if len(found) > 1:
        raise SourceError(f"{root}: CIFAR lies in {' and in '.join(sorted(map(str, found)))}: name one of them")
    return found[0] if found else None


def _looks_like_cifar(folder: Path) -> bool:
    # By name first: it may be one of thousands of class folders, and finding files takes reading it.
    return any((folder / name).is_file() for name in _TELLING_NAMES) and bool(_cifar_files(folder))


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
    unused = _beside(root, folder, {*files, *(str(folder / name) for name in _OTHER_FILES)})
    notes = [f"CIFAR is read from {folder}"] if folder != root and unused.count else []
    return Source(root, classes, labelled, CifarReader(files), files, unused=unused, notes=notes)


def _beside(root: Path, folder: Path, used: set[str]) -> Unused:
    """Return what lies in the folder of the batches beside them, and beside that folder."""
    unused = Unused()
    for path in sorted({*folder.iterdir(), *root.iterdir()} - {folder}):
        if str(path) not in used and not path.name.startswith("."):
            unused.add(
                "folders beside CIFAR's" if path.is_dir() else other_file(path.name), str(path.relative_to(root))
            )
    return unused


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
