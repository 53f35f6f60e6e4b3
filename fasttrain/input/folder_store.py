"""Plain image files as a store: no conversion, and no more decoding than the views can show."""

from __future__ import annotations

import pathlib
from typing import NamedTuple, cast

import numpy as np
from PIL import Image

from fasttrain.formats import jpeg
from fasttrain.formats.folder import folder_fingerprint, list_folder, read_regular
from fasttrain.formats.image import decode_rgb, exif_orientation, jpeg_header, read_rgb, turned
from fasttrain.formats.layout import Layout, lines_of
from fasttrain.formats.listing import SourceError
from fasttrain.formats.manifest import ManifestError
from fasttrain.formats.splits import seeded_order, set_apart
from fasttrain.input.stores import Encoded, as_encoded, tell_once, write_pixels

# A photograph is shrunk while decoding only as far as its shorter side keeps this many times a view's side. The whole
# image as a crop is then still averaged from two pixels or more for each of the view's, and a crop of 20 % of the area
# (the smallest of the MoCo recipes) still has 0.9 of the view's side.
LEAST_SIDE_IN_VIEWS = 2
CONVERTIBLE = (".tar", ".zip", ".parquet", ".npz")  # what of convert.py's sources is known by its name


class _Stream(NamedTuple):
    """An upright JPEG to be decoded straight into the batch."""

    data: bytes
    header: jpeg.JpegHeader
    shrink: int


class FolderStore:
    """The image files of one split of a folder, decoded as they are, or at 1/2, 1/4 or 1/8 of their size."""

    def __init__(self, root: pathlib.Path, split: str, view_size: int = 0, val_fraction: float = 0.0) -> None:
        """What can't be used, and what else lies there, is said on stderr once.

        view_size: side of the views to be cut, in pixels; 0 decodes every image at its full size. val_fraction: part
        of each class that is the validation split, the images that a conversion with its default seed sets apart.
        Raises DataError for a missing folder, one without images, a split it does not have, or one it has already.
        """
        layout = list_images(root)
        tell_once(str(root), lines_of(layout))
        self.classes, splits = layout.classes, layout.splits
        if val_fraction:
            apart_V, train = set_apart(splits, val_fraction, 0, root), splits["train"]
            order_N = seeded_order(len(train), 0)
            is_apart_N = np.isin(order_N, apart_V)
            splits = {"train": train.take(order_N[~is_apart_N]), "val": train.take(order_N[is_apart_N])}
        if split not in splits:
            apart = "training with --val-fraction sets one apart"
            raise ManifestError(f"{root} has no {split!r} split; it has: {', '.join(splits)} ({apart})")
        self.fingerprint = folder_fingerprint(root, self.classes, splits)
        self._root = root
        self._samples = splits[split]
        self._least_side = view_size * LEAST_SIDE_IN_VIEWS
        self.num_samples = len(self._samples)
        self._label_N = np.array([sample.label for sample in self._samples], dtype=np.int64)

    def labels(self, index_N: np.ndarray) -> np.ndarray:
        return self._label_N[index_N]

    def read(self, index: int) -> Encoded:
        data = read_regular(self.name(index))
        header, orientation = jpeg_header(data), exif_orientation(data)
        if header is None:
            return as_encoded(read_rgb(data))
        shrink = shrink_factor(header.height, header.width, self._least_side)
        if orientation != 1:
            image = Image.fromarray(_decode(data, header, shrink))
            return as_encoded(np.array(turned(image, orientation)))
        height, width = -(-header.height // shrink), -(-header.width // shrink)
        return Encoded(height, width, _Stream(data, header, shrink))

    def write(self, sample: Encoded, address: int) -> None:
        pixels = sample.content
        if isinstance(pixels, _Stream):
            if pixels.shrink == 1 and _decoded_into(pixels.data, pixels.header, address):
                return
            pixels = _decode(*pixels)
        write_pixels(cast("np.ndarray", pixels), sample, address)

    def name(self, index: int) -> str:
        return str(self._root / self._samples[index].path)

    place = name

    def source_name(self, index: int) -> str:
        return self._samples[index].path


def list_images(root: pathlib.Path) -> Layout:
    """As list_folder; where a folder without images holds what can be converted, the error says so."""
    try:
        return list_folder(root)
    except SourceError as error:
        if any(f"({extension})" in str(error) for extension in CONVERTIBLE):  # among what it counts as not used
            raise SourceError(f"{error}: convert them first, by dataprep/convert.py") from None
        raise


def shrink_factor(height: int, width: int, least_side: int) -> int:
    """The largest of 8, 4, 2, 1 that leaves the shorter side at least `least_side` pixels (0: no shrinking)."""
    shorter = min(height, width)
    return next((factor for factor in (8, 4, 2) if least_side and shorter >= factor * least_side), 1)


def _decode(data: bytes, header: jpeg.JpegHeader, shrink: int) -> np.ndarray:
    pixels = decode_rgb(data, header, shrink)
    if shrink > 1 and pixels.shape[:2] == (header.height, header.width):  # decoded by Pillow after a harmless warning
        return np.array(Image.fromarray(pixels).reduce(shrink))
    return pixels


def _decoded_into(data: bytes, header: jpeg.JpegHeader, address: int) -> bool:
    """Decode at full size into memory; False after any complaint, which formats tells harmless or not."""
    try:
        source = np.frombuffer(data, np.uint8)
        jpeg.decode_into(source.ctypes.data, len(data), header.height, header.width, address)
    except jpeg.JpegError:
        return False
    return True
