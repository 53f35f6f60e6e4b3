"""representation.npz: what a run's report shows of how its encoder represents images. Arrays, read without pickle.

Axes in names: M maps, N images on them, Q queries, K neighbours of each, C classes, P pairs of classes.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import pathlib
import zipfile
import zlib
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from fasttrain.system.cli import said, warn
from fasttrain.system.durable import replace_file
from fasttrain.system.regular import read_at_most

FILE = "representation.npz"
MAX_BYTES = 1 << 26  # of it
PICTURE_BYTES = 1 << 22  # of all pictures
LARGEST = 1e30  # of a coordinate
_ABOUT, _PICTURES, _OFFSETS = "about", "pictures", "pictures_at"
_DAMAGE = (ValueError, TypeError, LookupError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
_JPEG = b"\xff\xd8\xff"


@dataclass(frozen=True)
class Representation:
    """What is kept of one evaluation; labels and predictions are -1 where there is none, similarities are cosines.

    step, data, features: of which weights, on which images, of which layer. size: of the encoder's views, in pixels.
    predicted_by: the protocol, "" for none. maps: the names of map_MN2. variance: the shares of the features' variance
    along the axes of PCA. memory_C, count_C: a class's images in train and in val; right_C: how many of those in val
    were classified right. confusion_CC: how many of a class (row) were taken for each, (0, 0) where there are many
    classes. pair_P3: the most frequent mistakes as class, class predicted, images. thumbnails: each query and its
    neighbours, Q·(1 + K). views: image and central view, in turn.
    """

    step: int
    data: str
    features: str
    size: int
    predicted_by: str
    classes: tuple[str, ...]
    maps: tuple[str, ...]
    variance: tuple[float, ...]
    map_MN2: np.ndarray  # fp32, as are the similarities; all others are int64
    label_N: np.ndarray
    predicted_N: np.ndarray
    query_label_Q: np.ndarray
    query_predicted_Q: np.ndarray
    neighbour_label_QK: np.ndarray
    similarity_QK: np.ndarray
    memory_C: np.ndarray
    count_C: np.ndarray
    right_C: np.ndarray
    confusion_CC: np.ndarray
    pair_P3: np.ndarray
    thumbnails: tuple[bytes, ...]  # JPEG
    views: tuple[bytes, ...]

    def __post_init__(self) -> None:
        """Raises ValueError for what a damaged file may hold."""
        n, q, c, k = len(self.label_N), len(self.query_label_Q), len(self.classes), self.neighbour_label_QK.shape[-1]
        shapes = (len(self.maps), n, 2), (n,), (n,), (q,), (q,), (q, k), (q, k), (c,), (c,), (c,)
        wrong = [name for name, shape in zip(ARRAYS, shapes, strict=False) if getattr(self, name).shape != shape]
        wrong += [name for name in _CLASSES if not _within(getattr(self, name), -1, c)]
        wrong += [name for name in _COUNTS if not _within(getattr(self, name), 0, np.inf)]
        wrong += [name for name in _FLOATS if not _within(getattr(self, name), -LARGEST, LARGEST)]
        pictures = self.thumbnails + self.views
        odd = {
            "confusion_CC": self.confusion_CC.shape not in ((0, 0), (c, c)),
            "pair_P3": self.pair_P3.shape[1:] != (3,) or not _within(self.pair_P3[:, :2], 0, c),
            "thumbnails": len(self.thumbnails) != q * (1 + k),
            "views": len(self.views) % 2 == 1,
            "pictures": not all(picture[:3] == _JPEG for picture in pictures)
            or sum(map(len, pictures)) > PICTURE_BYTES,
            "numbers": type(self.step) is not int or type(self.size) is not int,
            "variance": not all(type(share) is float and math.isfinite(share) for share in self.variance),
            "names": not all(isinstance(n, str) for n in (self.data, self.features, *self.classes, *self.maps)),
            "predicted_by": not isinstance(self.predicted_by, str),
        }
        if wrong := wrong + [name for name, is_odd in odd.items() if is_odd]:
            raise ValueError(f"{', '.join(wrong)} can't be so")


_TYPES = {field.name: field.type for field in fields(Representation)}
ARRAYS = [name for name, kind in _TYPES.items() if kind == "np.ndarray"]
_FLOATS = "map_MN2", "similarity_QK"
_COUNTS = "memory_C", "count_C", "right_C", "confusion_CC", "pair_P3"
_CLASSES = "label_N", "predicted_N", "query_label_Q", "query_predicted_Q", "neighbour_label_QK"
_TOLD = [name for name, kind in _TYPES.items() if name not in ("thumbnails", "views", *ARRAYS)]


def write_representation(run: pathlib.Path, kept: Representation) -> None:
    """Put it into the run folder, in place of an older one. Raises OSError."""
    about = {name: getattr(kept, name) for name in _TOLD} | {"views": len(kept.views)}
    pictures = kept.thumbnails + kept.views
    arrays = {name: getattr(kept, name) for name in ARRAYS} | {
        _ABOUT: np.frombuffer(json.dumps(about).encode("ascii"), np.uint8),
        _PICTURES: np.frombuffer(b"".join(pictures), np.uint8),
        _OFFSETS: np.cumsum([0, *map(len, pictures)]),
    }
    content = io.BytesIO()  # a zip is written back and forth
    np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
    replace_file(run / FILE, lambda file: file.write(content.getbuffer()))


def read_representation(run: pathlib.Path) -> Representation | None:
    """What the run folder holds; None where there is nothing, or, with a warning, a damaged file."""
    path = run / FILE
    try:
        return _unpacked(read_at_most(path, MAX_BYTES))
    except FileNotFoundError:
        return None
    except OSError as error:
        warn(f"{said(error)}: left out of the report")
    except _DAMAGE as error:
        warn(f"{path} is damaged and left out of the report: evaluate.py writes it again ({error})")
    return None


def _unpacked(content: bytes) -> Representation:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if sum(member.file_size for member in archive.infolist()) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes are packed in it")
        arrays = {name: _array(archive.read(f"{name}.npy")) for name in (*ARRAYS, _ABOUT, _PICTURES, _OFFSETS)}
    for name, array in arrays.items():
        expected = np.float32 if name in _FLOATS else np.uint8 if name in (_ABOUT, _PICTURES) else np.int64
        if array.dtype != expected:
            raise ValueError(f"{name} is {array.dtype}")
    about: dict[str, Any] = json.loads(arrays[_ABOUT].tobytes())
    bounds, joined = arrays[_OFFSETS].tolist(), arrays[_PICTURES].tobytes()
    pictures = tuple(joined[first:last] for first, last in itertools.pairwise(bounds))
    told: dict[str, Any] = {name: about[name] for name in _TOLD}
    told |= {name: tuple(value) for name, value in told.items() if isinstance(value, list)}
    parted = len(pictures) - int(about["views"])
    told |= {name: arrays[name] for name in ARRAYS}
    return Representation(**told, thumbnails=pictures[:parted], views=pictures[parted:])


def _array(content: bytes) -> np.ndarray:
    """An .npy file's array. What its header claims takes no memory before it is seen to be there."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"an array of version {version}")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject or fortran or math.prod(shape) * dtype.itemsize != len(content) - file.tell():
        raise ValueError("an array is not of the size that its header tells")
    return np.frombuffer(content, dtype, offset=file.tell()).reshape(shape)


def _within(numbers: np.ndarray, least: float, end: float) -> bool:
    """Also whether they are numbers at all."""
    return bool(((numbers >= least) & (numbers < end)).all())
