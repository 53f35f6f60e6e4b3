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
    jpeg_header,
    sound,
    turned,
)
from fasttrain.formats.listing import Sample

# What libjpeg can encode; the .beton layout would hold 65535.
MAX_SIDE = 65500
# Statistics use every 8th row and column: 1/64 of the pixels, enough for a data set's mean.
_STATISTICS_STEP = 8
# Decoding to 1/8 reads the whole stream and finds the same damage, but saves most of the arithmetic.
_CHECK_SHRINK = 8

# --write smart: pixels as they are where they take at most this many times the bytes of the JPEG.
SMART_FACTOR = 3

Write = Literal["jpeg", "raw", "smart"]
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
        stream: a JPEG, or if raw the height * width * 3 bytes of its RGB pixels.
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


def encode_image(
    content: bytes | np.ndarray,
    max_side: int,
    quality: int,
    write: Write = "jpeg",
    measure: bool = True,
    check: Check = "decode",
) -> EncodedImage:
    """Make what a shard stores of an image: the file's own bytes wherever they are good enough.

    A sound, upright grayscale or colour JPEG within the limit is passed through unchanged. Anything else is decoded,
    resized (antialiased) to a longer side of max_side if it is larger, and encoded.

    Args:
        content: the whole image file, as for read_rgb, or its pixels, (H, W, 3) uint8 RGB.
        max_side: limit of the longer side in pixels; 0 = no limit.
        quality: JPEG quality, 1 to 100, of what has to be encoded.
        write: "jpeg"; "raw" stores pixels instead; "smart" does where they take at most SMART_FACTOR times the bytes.
        measure: whether to sum the pixels. Without, a JPEG passed through is checked at 1/8 of its size: faster.
        check: "none" passes a JPEG through by its header alone, damaged or not, unless its pixels are needed.

    Raises:
        ImageError: as read_rgb, or a side above MAX_SIDE pixels that stays.
    """
    if isinstance(content, np.ndarray):
        check_size(*content.shape[:2])
        return _encoded(_resized(Image.fromarray(content), max_side), quality, write, measure)
    header, orientation = jpeg_header(content), exif_orientation(content)
    if header is not None and orientation == 1:
        fits = not max_side or max(header.height, header.width) <= max_side
        done = None
        if fits:
            done = _passed_through(content, header, write, measure, check)
        elif write == "jpeg":
            done = _shrunk(content, header, max_side, quality, measure)
        if done is not None:
            return done
    image = Image.fromarray(decode_rgb(content, header, _shrink(header, max_side)))
    return _encoded(_resized(turned(image, orientation), max_side), quality, write, measure)


def _passed_through(
    content: bytes, header: jpeg.JpegHeader, write: Write, measure: bool, check: Check
) -> EncodedImage | None:
    """Return the stream, or its pixels where those are to be stored; None if libjpeg has a harmless warning."""
    num_bytes = 3 * header.height * header.width
    as_pixels = write == "raw" or (write == "smart" and num_bytes <= SMART_FACTOR * len(content))
    sums = None
    if as_pixels or measure or check == "decode":
        pixels_HW3 = decode_strictly(content, header, 1 if as_pixels or measure else _CHECK_SHRINK)
        if pixels_HW3 is None:
            return None
        if as_pixels:
            return _raw(pixels_HW3, measure)
        sums = _pixel_sums(pixels_HW3) if measure else None
    return EncodedImage(content, header.height, header.width, True, sums)


def _shrunk(content: bytes, header: jpeg.JpegHeader, max_side: int, quality: int, measure: bool) -> EncodedImage | None:
    """Resize a JPEG without leaving its own colour space; None if libjpeg has a harmless warning."""
    planes = sound(lambda: jpeg.decode_planes(content, header, _shrink(header, max_side)))
    if planes is None:
        return None
    planes = _resized_planes(planes, header.subsampling, max_side)
    stream = jpeg.encode_planes(planes, quality)
    sums = _pixel_sums(jpeg.decode(stream)) if measure else None
    return EncodedImage(stream, planes[0].shape[0], planes[0].shape[1], False, sums)


def _encoded(image: Image.Image, quality: int, write: Write, measure: bool) -> EncodedImage:
    if max(image.size) > MAX_SIDE:
        raise ImageError(f"a side is longer than {MAX_SIDE} pixels")
    pixels_HW3 = np.asarray(image)
    if write == "raw":
        return _raw(pixels_HW3, measure)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    if write == "smart" and pixels_HW3.nbytes <= SMART_FACTOR * stream.tell():
        return _raw(pixels_HW3, measure)
    sums = _pixel_sums(pixels_HW3) if measure else None
    return EncodedImage(stream.getvalue(), image.height, image.width, False, sums)


def _raw(pixels_HW3: np.ndarray, measure: bool) -> EncodedImage:
    height, width, _ = pixels_HW3.shape
    sums = _pixel_sums(pixels_HW3) if measure else None
    return EncodedImage(pixels_HW3.tobytes(), height, width, False, sums, raw=True)


def encode_samples(
    reader: Reader,
    task: Sequence[tuple[Sample, bool]],
    max_side: int,
    quality: int,
    write: Write = "jpeg",
    check: Check = "decode",
) -> Iterator[EncodedImage | str]:
    """Encode samples, each with whether to measure it, as encode_image does; a string is why one is unusable.

    Each is read and encoded when it is asked for: pixels of many at once could fill the memory. Whatever a stranger's
    image makes a reader or a decoder raise, it costs that image alone.
    """
    for sample, measure in task:
        try:
            yield encode_image(reader.read(sample), max_side, quality, write, measure, check)
        except Exception as error:
            yield reason_of(error)


def _shrink(header: jpeg.JpegHeader | None, max_side: int) -> int:
    """Return the largest shrinking while decoding that leaves at least twice the wanted side: no loss is seen then."""
    if header is None or not max_side:
        return 1
    longer = max(header.height, header.width)
    return next((factor for factor in (8, 4, 2) if longer >= 2 * factor * max_side), 1)


def _resized(image: Image.Image, max_side: int) -> Image.Image:
    longer = max(image.size)
    if not max_side or longer <= max_side:
        return image
    return image.resize(_fitting(image.size, max_side), _FILTER)


def _fitting(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    width, height = (max(1, round(side * max_side / max(size))) for side in size)
    return width, height


def _resized_planes(planes: list[np.ndarray], subsampling: int, max_side: int) -> list[np.ndarray]:
    """Return Y resized to the longer side, and the colours, if any, to half of that, rounded up.

    Whole blocks of colour are averaged first, as every encoder does that halves them.
    """
    from fasttrain.dataprep.resize import resize_plane  # here: only shrinking waits for numba

    height, width = planes[0].shape
    new_width, new_height = _fitting((width, height), max_side)
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
