"""Is the entropy-coded data of a JPEG whole? Answered three times faster than by decoding: no coefficient is kept.

Every code is looked up and every bit accounted for: valid codes, 64 coefficients a block, restart markers in order, all
blocks, and the end marker right after the last. Only streams of the common form (baseline, Huffman, one scan) can be
found sound; of any other, and of a damaged one, libjpeg-turbo is asked. Form and rules: ITU-T T.81, annexes B and F.
"""

from __future__ import annotations

import threading
from typing import Any

import numba
import numpy as np

Array = np.ndarray
Number = Any  # an int; numba has signed and unsigned ones, which must not be mixed
_compiled = numba.njit(nogil=True, cache=True, error_model="numpy")

# Bits that index a table: with 13 the tables of two threads leave the first-level cache that they share.
_BITS = 12
_ENTRIES = 1 << _BITS
# An entry of a table: how many bits it takes, and from _ADVANCE on by how many coefficients it advances; _END_OF_BLOCK
# among these. _UNKNOWN takes no bits: the code is longer than the index, or there is none.
_LENGTH, _ADVANCE, _END_OF_BLOCK, _CODE_LENGTH = 63, 6, 64, 13
_UNKNOWN = 127 << _ADVANCE
_BLOCK = 64
# Within a block a damaged stream may be read beyond its end: by 64 codes of 16 bits with 15 more each at most.
_PADDING = 512
# Larger differences than 8-bit samples can have, and sums of so many of them, could overflow in libjpeg.
_MAX_DC_BITS, _MAX_BLOCKS = 11, 1 << 20
_MAX_MCU_BLOCKS = 10
_SOI, _EOI, _SOS, _DHT, _DQT, _DRI, _COM, _RST0 = 0xD8, 0xD9, 0xDA, 0xC4, 0xDB, 0xDD, 0xFE, 0xD0
_SOF0, _SOF1, _APP0, _APP14, _APP15 = 0xC0, 0xC1, 0xE0, 0xEE, 0xEF
_JFIF, _ADOBE = np.frombuffer(b"JFIF\0", np.uint8), np.frombuffer(b"Adobe", np.uint8)

_thread = threading.local()


def is_sound(stream: bytes) -> bool:
    """Return whether libjpeg-turbo certainly decodes a JPEG without a warning; False leaves that open."""
    data = np.frombuffer(stream, np.uint8)
    if getattr(_thread, "scan", np.empty(0)).size < data.size + _PADDING:
        _thread.scan = np.empty(data.size + data.size // 4 + _PADDING, np.uint8)
    return bool(_is_sound(data, _thread.scan))


@_compiled
def _is_sound(data: Array, scan: Array) -> bool:
    """scan: scratch, _PADDING bytes larger than data."""
    # Per component: horizontal and vertical sampling, quantisation table, DC and AC table.
    frame = np.zeros((3, 5), np.int64)
    # By class and number of each Huffman table: how many codes of each length, [0] if it is defined; and the symbols.
    count = np.zeros((2, 4, 17), np.uint8)
    symbol = np.zeros((2, 4, 256), np.uint8)
    components, height, width, interval, start = _headers(data, frame, count, symbol)
    if start == 0:
        return False
    first = np.zeros((2, 3, _ENTRIES), np.uint32)
    table = np.zeros((2, 3, _ENTRIES), np.uint16)
    plan = np.zeros(_MAX_MCU_BLOCKS, np.int64)
    blocks = 0
    for c in range(components):
        dc, ac = frame[c, 3], frame[c, 4]
        if not (
            _singles(count[0, dc], symbol[0, dc], True, first[0, c])
            and _singles(count[1, ac], symbol[1, ac], False, first[1, c])
        ):
            return False
        _join(first[0, c], first[1, c], table[0, c])
        _join(first[1, c], first[1, c], table[1, c])
        for _ in range(frame[c, 0] * frame[c, 1] if components > 1 else 1):
            if blocks == _MAX_MCU_BLOCKS:
                return False
            plan[blocks] = c
            blocks += 1
    across = 8 * (frame[:, 0].max() if components > 1 else 1)
    down = 8 * (frame[:, 1].max() if components > 1 else 1)
    units = ((width + across - 1) // across) * ((height + down - 1) // down)
    if units * blocks >= _MAX_BLOCKS:
        return False
    at, expected = start, 0
    while True:
        size, at = _unstuffed(data, at, scan)
        now = min(units, interval) if interval else units
        if not _segment(scan, size, now, plan[:blocks], frame, count, symbol, table.reshape(-1)):
            return False
        units -= now
        if at + 1 >= data.size:
            return False
        if units == 0:
            return data[at + 1] == _EOI
        if data[at + 1] != _RST0 + expected:
            return False
        at += 2
        expected = (expected + 1) & 7


@_compiled
def _headers(data: Array, frame: Array, count: Array, symbol: Array) -> tuple[Number, Number, Number, Number, Number]:
    """Read all segments before the scan; return components, height, width, restart interval, and where the scan starts.

    The last is 0 for a stream that is not of the common form.
    """
    no = (0, 0, 0, 0, 0)
    components: Number = 0
    height: Number = 0
    width: Number = 0
    interval: Number = 0
    quantised = np.zeros(4, np.bool_)
    ids = np.zeros(3, np.uint8)
    if data.size < 4 or data[0] != 0xFF or data[1] != _SOI:
        return no
    at = 2
    while at + 4 <= data.size:
        marker, size = data[at + 1], (np.int64(data[at + 2]) << 8) + data[at + 3]
        end = at + 2 + size
        if data[at] != 0xFF or size < 2 or end > data.size:
            return no
        body = data[at + 4 : end]
        at = end
        if marker == _DQT:
            i = 0
            while i < body.size:
                i0, wide = body[i] & 15, body[i] >> 4
                if i0 > 3 or wide > 1:
                    return no
                quantised[i0] = True
                i += 65 + 64 * wide
            if i != body.size:
                return no
        elif marker == _DHT:
            if not _read_tables(body, count, symbol):
                return no
        elif marker in (_SOF0, _SOF1):
            if (
                components
                or body.size < 6
                or body[0] != 8
                or (body[5] != 1 and body[5] != 3)
                or body.size != 6 + 3 * body[5]
            ):
                return no
            components = np.int64(body[5])
            height, width = (np.int64(body[1]) << 8) + body[2], (np.int64(body[3]) << 8) + body[4]
            for c in range(components):
                ids[c] = body[6 + 3 * c]
                frame[c, 0], frame[c, 1], frame[c, 2] = body[7 + 3 * c] >> 4, body[7 + 3 * c] & 15, body[8 + 3 * c]
                if not (1 <= frame[c, 0] <= 4 and 1 <= frame[c, 1] <= 4 and frame[c, 2] <= 3):
                    return no
        elif marker == _DRI:
            if body.size != 2:
                return no
            interval = (np.int64(body[0]) << 8) + body[1]
        elif marker == _SOS:
            if not components or body.size != 4 + 2 * components or body[0] != components or not height or not width:
                return no
            for c in range(components):
                frame[c, 3], frame[c, 4] = body[2 + 2 * c] >> 4, body[2 + 2 * c] & 15
                if body[1 + 2 * c] != ids[c] or frame[c, 3] > 3 or frame[c, 4] > 3 or not quantised[frame[c, 2]]:
                    return no
            if body[body.size - 3] != 0 or body[body.size - 2] != 63 or body[body.size - 1] != 0:
                return no
            return components, height, width, interval, at
        elif marker == _APP0:  # libjpeg warns of versions and colours that it does not know
            if _begins(body, _JFIF) and body.size > 5 and body[5] != 1:
                return no
        elif marker == _APP14:
            if _begins(body, _ADOBE) and body.size > 11 and body[11] > 1:
                return no
        elif not (_APP0 < marker <= _APP15 or marker == _COM):
            return no
    return no


@_compiled
def _begins(body: Array, name: Array) -> bool:
    return body.size >= name.size and bool((body[: name.size] == name).all())


@_compiled
def _read_tables(body: Array, count: Array, symbol: Array) -> bool:
    i = 0
    while i < body.size:
        kind, number = body[i] >> 4, body[i] & 15
        if kind > 1 or number > 3 or i + 17 > body.size:
            return False
        total: Number = 0
        code: Number = 0
        count[kind, number, 0] = 1
        for length in range(1, 17):
            count[kind, number, length] = body[i + length]
            total += np.int64(body[i + length])
            code = 2 * code + np.int64(body[i + length])
            if code >= 1 << length and body[i + length]:  # no code may consist of ones only
                return False
        if total > 256 or i + 17 + total > body.size:
            return False
        symbol[kind, number, :total] = body[i + 17 : i + 17 + total]
        i += 17 + total
    return True


@_compiled
def _singles(count: Array, symbol: Array, dc: bool, entry: Array) -> bool:
    """Fill a table with one symbol for each index; False if the Huffman table is missing or can't be used."""
    if not count[0]:
        return False
    entry[:] = _UNKNOWN
    code, s = 0, 0
    for length in range(1, 17):
        for _ in range(count[length]):
            if dc and symbol[s] > _MAX_DC_BITS:
                return False
            if length <= _BITS:
                low = code << (_BITS - length)
                entry[low : low + (1 << (_BITS - length))] = _entry(symbol[s], length, dc)
            s += 1
            code += 1
        code *= 2
    return True


@_compiled
def _entry(symbol: Number, length: Number, dc: bool) -> Number:
    size, run = symbol & 15, symbol >> 4
    if dc:
        advance = 1
    elif size == 0 and run != 15:
        advance = _END_OF_BLOCK
    else:
        advance = run + 1
    return length << _CODE_LENGTH | advance << _ADVANCE | (length + size)


@_compiled
def _join(first: Array, following: Array, table: Array) -> None:
    """Fill a table with the entries of another, and the symbol after each where its code lies within the index, too."""
    for i in range(_ENTRIES):
        entry = np.int64(first[i])
        used = entry & _LENGTH
        joined = entry & ((1 << _CODE_LENGTH) - 1)
        second = np.int64(following[(i << used) & (_ENTRIES - 1)])
        code = second >> _CODE_LENGTH
        ends = (entry >> _ADVANCE) & _END_OF_BLOCK
        fits = (ends == 0) & (code != 0) & (used + code <= _BITS)
        table[i] = joined + (second & ((1 << _CODE_LENGTH) - 1)) if fits else joined


@_compiled
def _unstuffed(data: Array, at: Number, scan: Array) -> tuple[Number, Number]:
    """Copy coded bytes up to the next marker, without the zeros stuffed after 0xFF; return how many, and its place."""
    size = np.uint64(0)
    at, end = np.uint64(at), np.uint64(data.size)
    one, block = np.uint64(1), np.uint64(64)
    while True:
        while at + block < end:
            found = np.uint8(0)
            for j in range(np.uint64(64)):
                byte = data[at + j]
                scan[size + j] = byte
                found |= np.uint8(byte == 0xFF)
            if found:
                break
            at += block
            size += block
        stop = min(at + block, end)
        while at < stop:
            byte = data[at]
            scan[size] = byte
            at += one
            size += one
            if byte == 0xFF:
                if at == end or data[at] != 0:
                    size, at = size - one, at - one
                    _pad(scan, size)
                    return np.int64(size), np.int64(at)
                at += one
        if at >= end:
            _pad(scan, size)
            return np.int64(size), np.int64(at)


@_compiled
def _pad(scan: Array, size: Number) -> None:
    for j in range(np.uint64(_PADDING)):
        scan[size + j] = 0


@_compiled
def _word(scan: Array, at: Number) -> Number:
    """Return eight bytes as a big-endian number; LLVM makes one load of it."""
    word = np.uint64(0)
    for j in range(8):
        word = word << np.uint64(8) | np.uint64(scan[at + np.uint64(j)])
    return word


@_compiled
def _segment(
    scan: Array, size: Number, units: Number, plan: Array, frame: Array, count: Array, symbol: Array, table: Array
) -> bool:
    """Walk the blocks of a segment without restarts; false unless exactly all of its bytes are used.

    `bits` holds the next `held` bits at its top; `at` is the next byte to load. Loading ORs bytes that partly are there
    already, so that no branch depends on how many are missing.
    """
    bits, held, at = np.uint64(0), np.uint64(0), np.uint64(0)
    three, seven, full, eight = np.uint64(3), np.uint64(7), np.uint64(56), np.uint64(8)
    most, top = np.uint64(63), np.uint64(64 - _BITS)
    length_mask, advance_shift, last = np.uint64(_LENGTH), np.uint64(_ADVANCE), np.uint64(_BLOCK)
    entries, step = np.uint64(_ENTRIES), np.uint64(3 * _ENTRIES)
    end = np.uint64(size) + eight
    for _ in range(units):
        for b in range(plan.size):
            dc = np.uint64(plan[b]) * entries
            bits |= _word(scan, at) >> held
            at += (most - held) >> three
            held |= full
            entry = np.uint64(table[dc + (bits >> top)])
            k = entry >> advance_shift
            length = entry & length_mask
            bits <<= length
            held -= length
            while k < last:
                entry = np.uint64(table[dc + step + (bits >> top)])
                bits |= _word(scan, at) >> held
                at += (most - held) >> three
                held |= full
                k += entry >> advance_shift
                length = entry & length_mask
                bits <<= length
                held -= length
            advance = entry >> advance_shift
            regular = (k == last) if advance < last else (length != 0 and k < last + last)
            if not regular:
                c = plan[b]
                place = _finish_block(
                    scan, at * eight - held - length, k - advance,
                    count[0, frame[c, 3]], symbol[0, frame[c, 3]], count[1, frame[c, 4]], symbol[1, frame[c, 4]],
                )  # fmt: skip
                if place < 0:
                    return False
                at = np.uint64(place) >> three
                bits = _word(scan, at) << (np.uint64(place) & seven)
                held = full - (np.uint64(place) & seven)
                at += seven
            if at > end:
                return False
    return (at * eight - held + seven) >> three == np.uint64(size)


@_compiled
def _finish_block(
    scan: Array, place: Number, k: Number, dc_count: Array, dc_symbol: Array, ac_count: Array, ac_symbol: Array
) -> Number:
    """Walk the rest of a block symbol by symbol; return the place in bits after it, -1 for an invalid one."""
    place, k = np.int64(place), np.int64(k)
    while k < _BLOCK:
        word = np.int64(_word(scan, np.uint64(place >> 3)) << np.uint64(place & 7) >> np.uint64(48))
        length, s = _code(word, ac_count, ac_symbol) if k else _code(word, dc_count, dc_symbol)
        if length == 0:
            return -1
        entry = _entry(s, length, k == 0)
        place += entry & _LENGTH
        advance = (entry >> _ADVANCE) & 127
        if advance == _END_OF_BLOCK:
            return place
        k += advance
    return place if k == _BLOCK else -1


@_compiled
def _code(word: Number, count: Array, symbol: Array) -> tuple[Number, Number]:
    """Return the length of the code that 16 bits begin with, and its symbol; length 0 if there is none."""
    first, s = 0, 0
    for length in range(1, 17):
        code = word >> (16 - length)
        if code - first < count[length]:
            return length, np.int64(symbol[s + code - first])
        s += count[length]
        first = 2 * (first + count[length])
    return 0, 0
