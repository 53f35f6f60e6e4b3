"""Any supported image file (JPEG, PNG, WebP, BMP, GIF, TIFF) to RGB pixels."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from fasttrain.formats import jpeg, png
from fasttrain.formats.markers import may_state_orientation, padding, tidied, unusual
from fasttrain.system.errors import DataError

# Pillow warns from half of MAX_PIXELS on; here an image is either fine or an error.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# What it finds odd in EXIF and the like, which does not cost the picture.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

# The size from which Pillow refuses to decode, too: a small file that claims more is an attack or a mistake.
MAX_PIXELS = 178_956_970

Decoded = TypeVar("Decoded")

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_JPEG = b"\xff\xd8"
_TIFF_BITS, _TIFF_KIND, _WHITE_IS_ZERO = 258, 262, 0  # tags of samples, and what 0 is
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

_ORIENTATION_TAG = 0x0112

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# libjpeg's warnings after which every pixel may still be known. It tells of its first alone, so more may follow.
_HARMLESS = ("extraneous bytes", "unknown JFIF revision", "Unknown Adobe color transform", "Invalid SOS parameters")
# What it says where a scan is complete. Data that it lost its place in ends so, too, and so does padding.
_BEFORE_END = re.compile(r"(\d+) extraneous bytes before marker 0xd9")


class ImageError(DataError):
    """The bytes cannot be used as an image; the text is the reason, in one line."""


def read_rgb(data: bytes) -> np.ndarray:
    """Decode an image file; EXIF orientation is applied, transparency is put on white.

    Args:
        data: the whole file: JPEG, PNG, WebP, BMP, GIF or TIFF, of any mode; the first frame or page of several.
            16 bits a channel are scaled to 8.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        ImageError: empty, truncated, damaged, no image, or more than MAX_PIXELS pixels.
    """
    pixels_HW3, orientation = decode_rgb(data, jpeg_header(data), 1), exif_orientation(data)
    return pixels_HW3 if orientation == 1 else np.array(turned(Image.fromarray(pixels_HW3), orientation))


def jpeg_header(data: bytes) -> jpeg.JpegHeader | None:
    """Return the header of a JPEG that libturbojpeg can decode to RGB; None leaves the file to Pillow."""
    if not data:
        raise ImageError("empty file")
    if not data.startswith(_JPEG):
        return None
    try:
        header = jpeg.read_header(data)
    except jpeg.JpegError:
        return None
    check_size(header.height, header.width)
    plain = header.colorspace in (jpeg.COLORSPACE_RGB, jpeg.COLORSPACE_YCBCR, jpeg.COLORSPACE_GRAY)
    return header if plain else None


def is_lossless(data: bytes) -> bool:
    """Whether a file keeps pixels as they were: PNG, BMP, GIF, TIFF, and still WebP of that kind."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return any(kind == b"VP8L" for kind in _webp_chunks(data))
    return data.startswith((png.SIGNATURE, b"BM", b"GIF8", *_TIFF))


def _webp_chunks(data: bytes) -> Iterator[bytes]:
    at = 12
    while at + 8 <= len(data):
        yield data[at : at + 4]
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8 + size + size % 2


def check_size(height: int, width: int) -> None:
    """Raises ImageError for more than MAX_PIXELS."""
    if height * width > MAX_PIXELS:
        raise ImageError(f"more than {MAX_PIXELS} pixels")


def decode_rgb(data: bytes, header: jpeg.JpegHeader | None, shrink: int) -> np.ndarray:
    """Decode a file to its stored orientation, (H, W, 3) uint8 RGB; ImageError for a damaged one.

    header: of a JPEG, None for other formats. shrink: 1, 2, 4 or 8, by which a sound JPEG's sides are divided, rounded
    up; others keep their size.
    """
    pixels_HW3 = None if header is None else decode_strictly(data, header, shrink)
    return _decode_with_pillow(data) if pixels_HW3 is None else pixels_HW3


def decode_strictly(data: bytes, header: jpeg.JpegHeader, shrink: int) -> np.ndarray | None:
    """Decode a JPEG with libturbojpeg as decode_rgb does; None after a warning that may be harmless.

    Raises ImageError for a damaged one.
    """
    return sound(lambda: jpeg.decode(data, header, shrink))


def sound(decode: Callable[[], Decoded]) -> Decoded | None:
    """Return what is decoded, None after a warning that may be harmless; ImageError for damaged data."""
    try:
        return decode()
    except jpeg.JpegError as error:
        text = str(error)
        if any(warning in text for warning in _HARMLESS):
            return None
        raise _damage(text) from None


def _damage(text: str) -> ImageError:
    return ImageError("truncated" if "premature end" in text.lower() else f"damaged: {text}")


def _decode_with_pillow(data: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(_to_open(data)), formats=_FORMATS) as image:
            check_size(image.height, image.width)
            image.load()
            return to_rgb(image)
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise ImageError(f"more than {MAX_PIXELS} pixels") from None
    except Exception as error:  # damaged files make Pillow raise errors of nearly every type
        raise ImageError(_reason(data, error)) from None


def _to_open(data: bytes) -> bytes:
    """Return what Pillow is to read of a file. Raises DataError where it would not see damage."""
    if data.startswith(png.SIGNATURE):
        return png.pixels_alone(data)
    if data.startswith(_JPEG):
        jpeg.check_tables(data)
        _check_pixels(tidied(data))
    return data


def _check_pixels(data: bytes) -> None:
    """Raises ImageError for a JPEG, tidied, whose pixels are damaged: Pillow would hide that as gray areas."""
    try:
        header = jpeg.read_header(data)
    except jpeg.JpegError:  # of a rare kind, or Pillow says why not
        return
    check_size(header.height, header.width)
    try:
        jpeg.check_pixels(data, header)
    except jpeg.JpegError as error:
        odd = _BEFORE_END.search(str(error))
        if not odd or int(odd[1]) > padding(data):
            raise _damage(str(error)) from None


def _reason(data: bytes, error: Exception) -> str:
    text = (str(error).splitlines() or [type(error).__name__])[0]
    if data.startswith(_JPEG) and (kind := unusual(data)):
        return f"{kind}, which is not read"
    if isinstance(error, UnidentifiedImageError) and data.startswith(_TIFF):
        return "a TIFF of a kind that is not read"
    if isinstance(error, UnidentifiedImageError):
        return "not an image (JPEG, PNG, WebP, BMP, GIF or TIFF)"
    if isinstance(error, png.PngError):
        return text
    return "truncated" if "truncated" in text.lower() else f"damaged: {text}"


def to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode in ("I", "F"):
        raise ImageError("pixels of 32 bits, or with a sign: how bright they are is not known")
    if image.mode.startswith("I;16"):  # convert() would clip instead of scale
        return np.repeat(_scaled(image)[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGB", layer.size, "white")
        image.paste(layer, mask=layer.getchannel("A"))
    return np.array(image.convert("RGB"))


def _scaled(image: Image.Image) -> np.ndarray:
    tags = getattr(image, "tag_v2", {})
    gray_HW = (np.asarray(image) >> (tags.get(_TIFF_BITS, (16,))[0] - 8)).astype(np.uint8)
    return 255 - gray_HW if tags.get(_TIFF_KIND) == _WHITE_IS_ZERO else gray_HW  # Pillow minds that for 8 bits only


def exif_orientation(data: bytes) -> int:
    """Return the orientation, 1 (upright) to 8, of the pixels that decode_rgb gives: by EXIF, else by XMP."""
    if data.startswith(_TIFF):  # Pillow turns it by itself
        return 1
    # A JPEG is searched first: opening it with Pillow takes longer than decoding a small one.
    if data.startswith(_JPEG) and not may_state_orientation(data):
        return 1
    try:
        files = png.orientation_notes(data) if data.startswith(png.SIGNATURE) else (data,)
        return next((found for found in map(_stated_orientation, files) if found in _TRANSPOSE), 1)
    except png.PngError:  # decoding will say so
        return 1


def _stated_orientation(data: bytes) -> int:
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # broken metadata of any kind leaves the pixels as they are
        return 1


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """Return an image upright, by its EXIF orientation, 1 to 8."""
    return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image
