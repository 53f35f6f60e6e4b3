"""Whether a JPEG defines the tables that its scans use, found by walking over its segments as libjpeg does.

A decompressor keeps the tables of the image before: a stream without its own would be decoded with those of a stranger.
And it passes over the whole image for every scan of a few bytes: a small stream of many would take it hours. Imported
late, because numba takes a while.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import numba
import numpy as np
from numba import types

MOST_SCANS = 100  # encoders write 10 to 20
_ALL_DEFINED, _NO_QUANTISATION, _NO_HUFFMAN, _TOO_MANY_SCANS, _SEVERAL_SCANS = range(5)
_REASONS = (
    "",
    "it uses a quantisation table that it does not define",
    "it uses a Huffman table that it does not define",
    f"more than {MOST_SCANS} scans",
)

_Number = Any  # in compiled code
_CACHE = os.environ.get("NUMBA_CACHE_DIR") != ""  # empty: no folder can be written
_compiled = numba.njit(cache=_CACHE, error_model="numpy")

_RST0, _SOI, _EOI, _SOS, _DQT, _DHT = 0xD0, 0xD8, 0xD9, 0xDA, 0xDB, 0xC4
_PROGRESSIVE, _LOSSLESS, _ARITHMETIC, _ARITHMETIC_PROGRESSIVE = 0xC2, 0xC3, 0xC9, 0xCA
_IN_PASSES = (_PROGRESSIVE, _ARITHMETIC_PROGRESSIVE)
_WITHOUT_HUFFMAN = (_ARITHMETIC, _ARITHMETIC_PROGRESSIVE)  # its own parameters have defaults in the standard
_NO_FRAME = (_DHT, 0xC8, 0xCC)  # among 0xC0 to 0xCF: DHT, JPG, DAC


@_compiled
def _byte(data: np.ndarray, at: int) -> _Number:
    return np.int64(data[at])  # signed, as places are: of the two kinds together numba makes floats


@_compiled
def _next_marker(data: np.ndarray, at: int, size: int) -> int:
    """Where the second byte of the next marker lies; size if there is none. Passes over pixels, fill bytes and RSTn."""
    while at < size:
        if _byte(data, at) == 0xFF:
            while at < size and _byte(data, at) == 0xFF:
                at += 1
            if at < size and _byte(data, at) > 0x01 and not _RST0 <= _byte(data, at) < _SOI:
                return at
        at += 1
    return size


@_compiled
def _defined_quantisation(data: np.ndarray, at: int, end: int) -> int:
    """A bit for each table of a DQT segment, whose content lies between at and end."""
    found = 0
    while at < end:
        found |= 1 << (_byte(data, at) & 15)
        at += 129 if _byte(data, at) >> 4 else 65
    return found


@_compiled
def _defined_huffman(data: np.ndarray, at: int, end: int) -> int:
    """A bit for each table of a DHT segment: DC tables from bit 0, AC tables from bit 16."""
    found = 0
    while at + 17 <= end:
        found |= 1 << ((_byte(data, at) & 15) + (_byte(data, at) & 16))
        codes = 0
        for length in range(1, 17):
            codes += _byte(data, at + length)
        at += 17 + codes
    return found


@_compiled
def _of_scan(data: np.ndarray, frame: int, scan: int, quantised: int, huffman: int) -> int:
    """What one scan lacks; frame, scan: where the second bytes of their markers lie."""
    kind, components = _byte(data, frame), _byte(data, scan + 3)
    spectrum = scan + 4 + 2 * components
    from_dc, refines = _byte(data, spectrum) == 0, _byte(data, spectrum + 2) >> 4 > 0
    needs_dc = kind != _PROGRESSIVE or (from_dc and not refines)
    needs_ac = kind != _LOSSLESS and (kind != _PROGRESSIVE or not from_dc)
    for i in range(components):
        at = scan + 4 + 2 * i
        entry = frame + 9 + 3 * i
        while entry < frame + 9 + 3 * _byte(data, frame + 8) and _byte(data, entry) != _byte(data, at):
            entry += 3
        if entry >= frame + 9 + 3 * _byte(data, frame + 8):
            return _ALL_DEFINED  # an unknown component: no decoder takes it
        if kind != _LOSSLESS and not quantised >> min(_byte(data, entry + 2), 31) & 1:
            return _NO_QUANTISATION
        dc_table, ac_table = _byte(data, at + 1) >> 4, 16 + (_byte(data, at + 1) & 15)
        lacks = (needs_dc and not huffman >> dc_table & 1) or (needs_ac and not huffman >> ac_table & 1)
        if lacks and kind not in _WITHOUT_HUFFMAN:
            return _NO_HUFFMAN
    return _ALL_DEFINED


@numba.cfunc(types.int64(types.voidptr, types.int64, types.int64), cache=_CACHE, error_model="numpy")
def _walk(address: _Number, size: int, every_scan: int) -> int:
    data = numba.carray(address, (size,), np.uint8)
    quantised = huffman = frame = scans = 0
    at = _next_marker(data, 2, size)
    # Whatever is odd ends the walk: the decoder meets the same, and has its own words for it.
    while at + 2 < size and _byte(data, at) != _EOI and _byte(data, at) != _SOI:
        marker, end = _byte(data, at), at + 1 + (_byte(data, at + 1) << 8) + _byte(data, at + 2)
        if end > size:
            break
        if marker == _DQT:
            quantised |= _defined_quantisation(data, at + 3, end)
        elif marker == _DHT:
            huffman |= _defined_huffman(data, at + 3, end)
        elif 0xC0 <= marker <= 0xCF and marker not in _NO_FRAME:
            if end < at + 9 or end < at + 9 + 3 * _byte(data, at + 8):
                break
            frame = at
        elif marker == _SOS:
            if not frame or end < at + 7 or end < at + 7 + 2 * _byte(data, at + 3):
                break
            lacks = _of_scan(data, frame, at, quantised, huffman)
            whole = _byte(data, frame) not in _IN_PASSES and _byte(data, at + 3) == _byte(data, frame + 8)
            if lacks or whole:
                return lacks
            if not every_scan:
                return _SEVERAL_SCANS
            scans += 1
            if scans > MOST_SCANS:
                return _TOO_MANY_SCANS
        at = _next_marker(data, end, size)
    return _ALL_DEFINED


# first_scan(address, size, 0) is 0 for a stream of one scan that defines all it uses. It takes half a microsecond, for
# which the interpreter's lock is kept; all scans take a nanosecond a byte.
_arguments = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64  # the result's type comes first
_address: _Number = _walk.address
first_scan, _all_scans = ctypes.PYFUNCTYPE(*_arguments)(_address), ctypes.CFUNCTYPE(*_arguments)(_address)


def objection(address: int, size: int) -> str:
    """Why a JPEG at an address is not decoded: it uses a table that it does not define, or has more than MOST_SCANS.

    "" also where the stream is no sound JPEG: every decoder refuses that by itself.
    """
    found: int = first_scan(address, size, 0)
    return _REASONS[_all_scans(address, size, 1) if found == _SEVERAL_SCANS else found]
