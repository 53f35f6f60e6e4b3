"""An image file or its pixels to the JPEG, or the pixels, that a shard stores."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from fasttrain.dataprep.sources.source import Reader
from fasttrain.formats import jpeg
from fasttrain.formats.boundary import reason_of
from fasttrain.formats.image import (
    ImageError,
    check_size,
    decode_rgb,
    decode_strictly,
    exif_orientation,
    is_lossless,
    jpeg_header,
    sound,
    turned,
)
from fasttrain.formats.listing import Sample
from fasttrain.system.errors import RunError

# What libjpeg can encode; the .beton layout would hold 65535.
MAX_SIDE = 65500
# Statistics use every 8th row and column: 1/64 of the pixels, enough for a data set's mean.
_STATISTICS_STEP = 8
# Decoding to 1/8 reads the whole stream and finds the same damage, but saves most of the arithmetic.
_CHECK_SHRINK = 8

# --write smart: pixels as they are where they take at most this many times the bytes of the JPEG.
SMART_FACTOR = 3
# --write auto: pixels of lossless images up to this side; a JPEG would change them, and hardly save any bytes.
SMALL_SIDE = 96
# Above this quality, a lossless image keeps its colours at full size: halving them would be most of the error.
_FULL_ABOVE = 95
# What a source kept of its pixels: most JPEGs halve their colours, those of RGB do not.
_HALVED, _FULL, _LOSSLESS = range(3)

Write = Literal["auto", "jpeg", "raw", "smart"]
Check = Literal["decode", "none"]
# Antialiased; nearly as sharp as bicubic where images shrink, in two thirds of its time.
_FILTER = Image.Resampling.HAMMING


class PixelSums(NamedTuple):
    """Exact sums over a regular subsample of pixels, per channel R, G, B, of values 0 to 255 (integers: order-free)."""

    num_pixels: int
    total_3: tuple[int, int, int]
    square_3: tuple[int, int, int]


class EncodedImage(NamedTuple):
    """One image as a shard stores it.

    Attributes:
        stream: a JPEG or PNG, or if raw the height * width * 3 bytes of its RGB pixels.
        height, width: pixels.
        passed_through: whether the stream is the source's own.
        pixels: None unless they were asked for.
        raw: see stream.
    """

    stream: bytes
    height: int
    width: int
    passed_through: bool
    pixels: PixelSums | None
    raw: bool = False


class Encoding(NamedTuple):
    """What a conversion makes of images.

    Attributes:
        max_side: limit of the longer side in pixels; 0 = no limit.
        quality: JPEG quality, 1 to 100, of what has to be encoded.
        write: "jpeg"; "raw" stores pixels instead; "smart" does where they take at most SMART_FACTOR times the bytes;
            "auto" does for lossless images that are stored with sides of at most SMALL_SIDE.
        check: "none" passes a JPEG through by its header alone, damaged or not, unless its pixels are needed.
        png: whether pixels are stored as a PNG instead of raw.
    """

    max_side: int = 0
    quality: int = 90
    write: Write = "auto"
    check: Check = "decode"
    png: bool = False


def encode_image(content: bytes | np.ndarray, encoding: Encoding, measure: bool = True) -> EncodedImage:
    """Make what a shard stores of an image: the file's own bytes wherever they are good enough.

    A sound, upright grayscale or colour JPEG within the limit is passed through unchanged. Anything else is decoded,
    resized (antialiased) to a longer side of max_side if it is larger, and encoded.

    Args:
        content: the whole image file, as for read_rgb, or its pixels, (H, W, 3) uint8 RGB.
        encoding: what is wanted.
        measure: whether to sum the pixels. Without, a JPEG passed through is checked at 1/8 of its size: faster.

    Raises:
        ImageError: as read_rgb, or a side above MAX_SIDE pixels that stays.
    """
    if isinstance(content, np.ndarray):
        check_size(*content.shape[:2])
        return _encoded(Image.fromarray(content), content.shape[1::-1], _LOSSLESS, encoding, measure)
    header, orientation = jpeg_header(content), exif_orientation(content)
    if header is not None and orientation == 1 and (done := _as_it_lies(content, header, encoding, measure)):
        return done
    pixels_HW3 = decode_rgb(content, header, _shrink(header, encoding.max_side))
    height, width = (header.height, header.width) if header else pixels_HW3.shape[:2]
    image = turned(Image.fromarray(pixels_HW3), orientation)
    size = (width, height) if orientation < 5 else (height, width)
    colours = _FULL if header and header.colorspace == jpeg.COLORSPACE_RGB else _HALVED
    return _encoded(image, size, _LOSSLESS if is_lossless(content) else colours, encoding, measure)


def _as_it_lies(content: bytes, header: jpeg.JpegHeader, encoding: Encoding, measure: bool) -> EncodedImage | None:
    """Pass a JPEG through, or shrink it in its own planes; None where its pixels have to be made first."""
    if not encoding.max_side or max(header.height, header.width) <= encoding.max_side:
        return _passed_through(content, header, encoding, measure)
    if encoding.write in ("auto", "jpeg") and header.colorspace != jpeg.COLORSPACE_RGB:
        return _shrunk(content, header, encoding, measure)
    return None


def _passed_through(content: bytes, header: jpeg.JpegHeader, encoding: Encoding, measure: bool) -> EncodedImage | None:
    """Return the stream, or its pixels where those are to be stored; None if libjpeg has a harmless warning."""
    num_bytes, write = 3 * header.height * header.width, encoding.write
    as_pixels = write == "raw" or (write == "smart" and num_bytes <= SMART_FACTOR * len(content))
    sums = None
    if as_pixels or measure or encoding.check == "decode":
        pixels_HW3 = decode_strictly(content, header, 1 if as_pixels or measure else _CHECK_SHRINK)
        if pixels_HW3 is None:
            return None
        if as_pixels:
            return _pixels(pixels_HW3, encoding, measure)
        sums = _pixel_sums(pixels_HW3) if measure else None
    return EncodedImage(content, header.height, header.width, True, sums)


def _shrunk(content: bytes, header: jpeg.JpegHeader, encoding: Encoding, measure: bool) -> EncodedImage | None:
    """Resize a JPEG without leaving its own colour space; None if libjpeg has a harmless warning."""
    planes = sound(lambda: jpeg.decode_planes(content, header, _shrink(header, encoding.max_side)))
    if planes is None:
        return None
    width, height = _fitting((header.width, header.height), encoding.max_side)
    stream = jpeg.encode_planes(_resized_planes(planes, header.subsampling, height, width), encoding.quality)
    sums = _pixel_sums(jpeg.decode(stream)) if measure else None
    return EncodedImage(stream, height, width, False, sums)


def _encoded(
    image: Image.Image, size: tuple[int, ...], fidelity: int, encoding: Encoding, measure: bool
) -> EncodedImage:
    """Resize and encode an image.

    size: its width and height in the source, before it was shrunk while decoding. fidelity: what the source kept.
    """
    write, longer = encoding.write, max(size)
    if encoding.max_side and longer > encoding.max_side:
        image = image.resize(_fitting(size, encoding.max_side), _FILTER)
    if max(image.size) > MAX_SIDE:
        raise ImageError(f"a side is longer than {MAX_SIDE} pixels")
    pixels_HW3 = np.asarray(image)
    if write == "raw" or (write == "auto" and fidelity == _LOSSLESS and max(image.size) <= SMALL_SIDE):
        return _pixels(pixels_HW3, encoding, measure)
    stream = io.BytesIO()
    full = fidelity == _FULL or (fidelity == _LOSSLESS and encoding.quality > _FULL_ABOVE)
    image.save(stream, "JPEG", quality=encoding.quality, subsampling="4:4:4" if full else "4:2:0")
    if write == "smart" and pixels_HW3.nbytes <= SMART_FACTOR * stream.tell():
        return _pixels(pixels_HW3, encoding, measure)
    sums = _pixel_sums(pixels_HW3) if measure else None
    return EncodedImage(stream.getvalue(), image.height, image.width, False, sums)


def _pixels(pixels_HW3: np.ndarray, encoding: Encoding, measure: bool) -> EncodedImage:
    height, width, _ = pixels_HW3.shape
    sums = _pixel_sums(pixels_HW3) if measure else None
    if not encoding.png:
        return EncodedImage(pixels_HW3.tobytes(), height, width, False, sums, raw=True)
    stream = io.BytesIO()
    Image.fromarray(pixels_HW3).save(stream, "PNG")
    return EncodedImage(stream.getvalue(), height, width, False, sums)


def encode_samples(
    reader: Reader, task: Sequence[tuple[Sample, bool]], encoding: Encoding
) -> Iterator[EncodedImage | str]:
    """Encode samples, each with whether to measure it, as encode_image does; a string is why one is unusable.

    Each is read and encoded when it is asked for: pixels of many at once could fill the memory. Whatever a stranger's
    image makes a reader or a decoder raise, it costs that image alone. Raises RunError and MemoryError, which are
    about no image: storage that is gone, memory that is full.
    """
    for sample, measure in task:
        try:
            yield encode_image(reader.read(sample), encoding, measure)
        except (RunError, MemoryError):
            raise
        except Exception as error:
            yield reason_of(error)


def _shrink(header: jpeg.JpegHeader | None, max_side: int) -> int:
    """Return the largest shrinking while decoding that leaves at least twice the wanted side: no loss is seen then."""
    if header is None or not max_side:
        return 1
    longer = max(header.height, header.width)
    return next((factor for factor in (8, 4, 2) if longer >= 2 * factor * max_side), 1)


def _fitting(size: tuple[int, ...], max_side: int) -> tuple[int, int]:
    """Return the width and height to which a larger image shrinks; of the source, so that every way agrees on it."""
    width, height = (max(1, round(side * max_side / max(size))) for side in size)
    return width, height


def _resized_planes(planes: list[np.ndarray], subsampling: int, new_height: int, new_width: int) -> list[np.ndarray]:
    """Return Y resized, and the colours, if any, resized to half of that, rounded up.

    Whole blocks of colour are averaged first, as every encoder does that halves them.
    """
    from fasttrain.dataprep.resize import resize_plane  # here: only shrinking waits for numba

    height, width = planes[0].shape
    resized = [resize_plane(planes[0], new_height, new_width)]
    if block := jpeg.SAMPLE_SIZE[subsampling]:
        half_height, half_width = (new_height + 1) // 2, (new_width + 1) // 2
        # What half covers, in samples of the source: where a new side is odd, a little more than the image.
        covered = height / block[1] * 2 * half_height / new_height, width / block[0] * 2 * half_width / new_width
        resized += [resize_plane(plane, half_height, half_width, covered) for plane in planes[1:]]
    return resized


def _pixel_sums(pixels_HW3: np.ndarray) -> PixelSums:
    sample_N3 = pixels_HW3[::_STATISTICS_STEP, ::_STATISTICS_STEP].reshape(-1, 3).astype(np.int64)
    total, square = sample_N3.sum(0).tolist(), (sample_N3 * sample_N3).sum(0).tolist()
    return PixelSums(len(sample_N3), tuple(total), tuple(square))
