"""JPEG decoding and encoding at the speed of libjpeg-turbo: a thin ctypes binding of libturbojpeg.

Each thread owns a decompressor, and every call releases the GIL, so plain threads decode on all cores. The pixels are
those of Pillow, bit for bit: FFCV's flag for a fast inverse DCT saves 2 % and is off by a grey level and more.

A decompressor keeps the tables of one image for the next. Nothing is decoded that does not define its own: it would
come out in colours that depend on what the thread decoded before (tables.py).
"""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import NamedTuple

import numpy as np

from fasttrain.system.errors import DataError

# Values of turbojpeg.h.
COLORSPACE_RGB, COLORSPACE_YCBCR, COLORSPACE_GRAY, _COLORSPACE_CMYK, _COLORSPACE_YCCK = range(5)
_PIXEL_FORMAT_RGB, _PIXEL_FORMAT_RGBX, _PIXEL_FORMAT_CMYK = 0, 2, 11
_SAMPLING_420, _SAMPLING_GRAY = 2, 3
# TJSAMP_ number -> how many pixels wide and high one sample of colour is; gray has none.
SAMPLE_SIZE = {0: (1, 1), 1: (2, 1), 2: (2, 2), 3: (), 4: (1, 2), 5: (4, 1), 6: (1, 4)}
_FLAG_NO_REALLOCATION = 1024

_SONAME = "libturbojpeg.so.0"


class JpegError(DataError):
    """The bytes are not a sound JPEG; the text is libjpeg's own message."""


class JpegHeader(NamedTuple):
    """What the header of a JPEG says; subsampling and colorspace are the TJSAMP_ and TJCS_ numbers of turbojpeg.h."""

    height: int
    width: int
    subsampling: int
    colorspace: int


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(_SONAME)
    except OSError:  # other systems name it differently; asked second, since find_library starts processes
        from ctypes.util import find_library

        name = find_library("turbojpeg")
        if name is None:
            raise OSError("libturbojpeg is not installed (Debian package: libturbojpeg0)") from None
        library = ctypes.CDLL(name)
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_ulong
    library.tjInitDecompress.restype = pointer
    library.tjDestroy.argtypes = [pointer]
    library.tjGetErrorStr2.argtypes = [pointer]
    library.tjGetErrorStr2.restype = ctypes.c_char_p
    library.tjDecompressHeader3.argtypes = [pointer, pointer, size, pointer, pointer, pointer, pointer]
    library.tjDecompress2.argtypes = [pointer, pointer, size, pointer, *[integer] * 5]
    library.tjInitCompress.restype = pointer
    library.tjBufSize.restype = size
    library.tjDecompressToYUVPlanes.argtypes = [pointer, pointer, size, pointer, integer, pointer, *[integer] * 2]
    library.tjCompressFromYUVPlanes.argtypes = [pointer, pointer, integer, pointer, integer, integer, pointer, pointer,
                                                *[integer] * 2]  # fmt: skip
    return library


class _Handle:
    """Owner of one decompressor: destroyed with the thread that used it."""

    def __init__(self) -> None:
        self._destroy = _library().tjDestroy
        self.address: int = _library().tjInitDecompress()

    def __del__(self) -> None:
        if hasattr(self, "address"):
            self._destroy(self.address)


class _Decompressor(threading.local):
    """This thread's decompressor, with the places where libturbojpeg leaves the header."""

    def __init__(self) -> None:
        library = _library()
        self.header, self.decompress, self.message = (
            library.tjDecompressHeader3,
            library.tjDecompress2,
            library.tjGetErrorStr2,
        )
        self._renew()
        from fasttrain.formats import tables  # here: numba takes longer to import than all the rest

        self.first_scan, self._objection = tables.first_scan, tables.objection
        self.width, self.height = ctypes.c_int(), ctypes.c_int()
        self.subsampling, self.colorspace = ctypes.c_int(), ctypes.c_int()
        # The order of the function's arguments: width, height, subsampling, colour space.
        fields = (self.width, self.height, self.subsampling, self.colorspace)
        self.fields = tuple(ctypes.addressof(field) for field in fields)

    def _renew(self) -> None:
        self.owner = _Handle()
        self.handle = self.owner.address

    def check_tables(self, address: int, size: int) -> None:
        """Raises JpegError for a stream that uses a table and does not define it, or has too many scans."""
        if reason := self._objection(address, size):
            raise JpegError(reason)

    def error(self) -> JpegError:
        """Return the error of the last call as an exception, and take a new decompressor.

        After some errors in a header a decompressor takes the next stream, sound as it may be, for the rest of that
        header, and after some damaged tables libjpeg-turbo 2.1.5 refuses every later image ("Bogus Huffman table").
        """
        text: bytes = self.message(self.handle)
        self._renew()
        return JpegError(text.decode("ascii", "replace").strip())


@functools.cache
def _decompressor() -> _Decompressor:
    # Made on first use, so that importing this module neither needs nor loads the library.
    return _Decompressor()


def _as_array(data: np.ndarray | bytes) -> np.ndarray:
    if len(data) == 0:
        raise JpegError("empty")
    return np.frombuffer(data, np.uint8)


def read_header(data: np.ndarray | bytes) -> JpegHeader:
    """Read the size and the kind of a JPEG, decoding nothing.

    Args:
        data: the whole JPEG stream, bytes or a contiguous uint8 array.

    Raises:
        JpegError: the bytes are not a JPEG, or one that libturbojpeg cannot name the subsampling of.
        OSError: libturbojpeg is not installed.
    """
    source = _as_array(data)
    own = _decompressor()
    own.width.value = 0
    if own.header(own.handle, source.ctypes.data, source.size, *own.fields):
        raise own.error()
    if own.width.value == 0:  # a stream of tables alone counts as success, and leaves the fields as they were
        raise JpegError("no image in the JPEG")
    return JpegHeader(own.height.value, own.width.value, own.subsampling.value, own.colorspace.value)


def check_tables(data: np.ndarray | bytes) -> None:
    """Raises JpegError for a stream that uses a table and does not define it: no two decoders agree on its pixels.

    Also for one of so many scans that a decoder takes hours.
    """
    source = _as_array(data)
    _decompressor().check_tables(source.ctypes.data, source.size)


def defines_tables(data: np.ndarray | bytes) -> bool:
    """Whether check_tables takes a stream."""
    try:
        check_tables(data)
    except JpegError:
        return False
    return True


def decode(data: np.ndarray | bytes, header: JpegHeader | None = None, shrink: int = 1) -> np.ndarray:
    """Decode a JPEG to pixels.

    Args:
        data: the whole JPEG stream, bytes or a contiguous uint8 array.
        header: what read_header said of the same bytes, if it was asked before.
        shrink: 1, 2, 4 or 8: each side is divided by this (rounded up) while decoding, which saves time.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        JpegError: damaged data, also where libjpeg only warns (such as truncated data).
        OSError: libturbojpeg is not installed.
    """
    source = _as_array(data)
    height, width, _, _ = header or read_header(data)
    height, width = -(-height // shrink), -(-width // shrink)
    pixels_HW3 = np.empty((height, width, 3), np.uint8)
    own = _decompressor()
    address, size = source.ctypes.data, source.size  # asked once: numpy takes a while for it
    if own.first_scan(address, size, 0):
        own.check_tables(address, size)
    if own.decompress(own.handle, address, size, pixels_HW3.ctypes.data,
                      width, 0, height, _PIXEL_FORMAT_RGB, 0):  # fmt: skip
        raise own.error()
    return pixels_HW3


def check_pixels(data: np.ndarray | bytes, header: JpegHeader) -> None:
    """Raises JpegError for what decode does, of CMYK, too: decoded to 1/8, for nothing else.

    header: what read_header said of the same bytes.
    """
    source, own = _as_array(data), _decompressor()
    height, width = -(-header.height // 8), -(-header.width // 8)
    in_four = header.colorspace in (_COLORSPACE_CMYK, _COLORSPACE_YCCK)
    pixels_HW4 = np.empty((height, width, 4), np.uint8)
    own.check_tables(source.ctypes.data, source.size)
    if own.decompress(own.handle, source.ctypes.data, source.size, pixels_HW4.ctypes.data, width, 0, height,
                      _PIXEL_FORMAT_CMYK if in_four else _PIXEL_FORMAT_RGBX, 0):  # fmt: skip
        raise own.error()


def decode_planes(data: np.ndarray | bytes, header: JpegHeader, shrink: int = 1) -> list[np.ndarray]:
    """Decode a JPEG to its own planes, before colours are enlarged and converted: less work where these are resized.

    Args:
        data: the whole JPEG stream, in gray or YCbCr.
        header: what read_header said of the same bytes.
        shrink: as for decode.

    Returns:
        Y, or Y, Cb and Cr, each (H, W) uint8; those of colour are smaller as SAMPLE_SIZE says, rounded up.

    Raises:
        JpegError: damaged data, also where libjpeg only warns.
    """
    source = _as_array(data)
    library, own = _library(), _decompressor()
    own.check_tables(source.ctypes.data, source.size)
    height, width = -(-header.height // shrink), -(-header.width // shrink)
    planes = [
        np.empty(
            (
                library.tjPlaneHeight(i, height, header.subsampling),
                library.tjPlaneWidth(i, width, header.subsampling),
            ),
            np.uint8,
        )
        for i in range(3 if SAMPLE_SIZE[header.subsampling] else 1)
    ]
    if library.tjDecompressToYUVPlanes(own.handle, source.ctypes.data, source.size, _addresses(planes), width, None,
                                       height, 0):  # fmt: skip
        raise own.error()
    return [planes[0][:height, :width], *planes[1:]]  # the library makes the sides of Y even


def encode_planes(planes: list[np.ndarray], quality: int) -> bytes:
    """Encode planes as decode_planes returns them, colours at half the size, rounded up (4:2:0), or Y alone as gray."""
    library = _library()
    height, width = planes[0].shape
    sampling = _SAMPLING_420 if len(planes) == 3 else _SAMPLING_GRAY
    if len(planes) == 3:  # the library reads as if the sides of Y were even
        planes = [np.pad(planes[0], ((0, height % 2), (0, width % 2)), "edge"), *planes[1:]]
    planes = [np.ascontiguousarray(plane) for plane in planes]
    stream = np.empty(library.tjBufSize(width, height, sampling), np.uint8)
    address, size = ctypes.c_void_p(stream.ctypes.data), ctypes.c_ulong(stream.size)
    handle = library.tjInitCompress()
    try:
        if library.tjCompressFromYUVPlanes(handle, _addresses(planes), width, None, height, sampling,
                                           ctypes.addressof(address), ctypes.addressof(size), quality,
                                           _FLAG_NO_REALLOCATION):  # fmt: skip
            raise JpegError(library.tjGetErrorStr2(handle).decode("ascii", "replace"))
    finally:
        library.tjDestroy(handle)
    return stream[: size.value].tobytes()


def _addresses(planes: list[np.ndarray]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * 3)(*(plane.ctypes.data for plane in planes))


def decode_into(source: int, size: int, height: int, width: int, out: int) -> None:
    """Decode a JPEG at one address to pixels at another: the inner call of the loaders.

    Args:
        source: address of the JPEG stream.
        size: length of the stream in bytes.
        height: height that the stream must have, in pixels.
        width: width that the stream must have, in pixels.
        out: address of height * width * 3 writable bytes; receives (height, width, 3) uint8, RGB.

    Raises:
        JpegError: damaged data, also where libjpeg only warns, or another size than the one stated. What lies at
            `out` is undefined then, but nothing beyond its end was written.
        OSError: libturbojpeg is not installed.
    """
    own = _decompressor()
    handle = own.handle
    # The decoder scales an image of another size to fit, without a word: so the size is compared first.
    if own.header(handle, source, size, *own.fields):
        raise own.error()
    if own.height.value != height or own.width.value != width:
        raise JpegError(f"the JPEG is {own.height.value} x {own.width.value} pixels, not {height} x {width}")
    if own.first_scan(source, size, 0):  # most streams have no other scan: one call less for a small image
        own.check_tables(source, size)
    if own.decompress(handle, source, size, out, width, 0, height, _PIXEL_FORMAT_RGB, 0):
        raise own.error()
