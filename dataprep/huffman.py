"""Is the entropy-coded data of a JPEG whole? Answered four times faster than by decoding: no coefficient is kept.

Every code is looked up and every bit accounted for: valid codes, 64 coefficients a block, restart markers in order, all
blocks, and the end marker right after the last. Only streams of the common form (baseline, Huffman, one scan) can be
found sound; of any other, and of a damaged one, libjpeg-turbo is asked. Form and rules: ITU-T T.81, annexes B and F.

A look-up waits for the length that the last one found, so two streams are walked at once, in turn. All of it is in one
file, since numba's cache of compiled code sees changes only in the file that a function stands in.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

if TYPE_CHECKING:
    from llvmlite.ir import Value
    from numba.core.base import BaseContext
    from numba.core.types import Type
    from numba.core.typing import Context
    from numba.core.typing.templates import Signature

Array = np.ndarray
Number = Any  # an int; numba has signed and unsigned ones, which must not be mixed
_compiled = numba.njit(nogil=True, cache=True, error_model="numpy")

# Bits that index a table: fewer take more look-ups, with more the tables of two streams leave the first-level cache.
BITS = 12
ENTRIES = 1 << BITS
# An entry, uint16: how many bits it takes, and from ADVANCE on by how many coefficients it advances; END_OF_BLOCK
# among these. UNKNOWN takes no bits: the code is longer than the index, or there is none.
LENGTH, ADVANCE, END_OF_BLOCK = 63, 6, 64
UNKNOWN = 127 << ADVANCE
BLOCK = 64

# A walk is an array of uint64. Where it is: its status; the bits to come (at the top), how many they are, the address
# of the byte after them; coefficients of this block; the block's number in its unit; blocks and segments (parts between
# restart markers) that are left, this one counted.
STATUS, COMING, HELD, AT, COEFFICIENTS, PLANNED, BLOCKS_LEFT, SEGMENTS_LEFT = range(8)
# What it walks over: addresses of the coded bytes, of the last of them that a block's end may have loaded, and of how
# many lie before the end of this segment (the next ones' numbers follow); blocks of a unit, of a segment but the last,
# and of the last.
SCAN, LIMIT, END, UNIT, FULL, LAST = range(8, 14)
# For each block of a unit, the addresses of its DC table, with the AC table behind it; and of how many codes each
# length has, and of the symbols, for DC and for AC.
PLAN, PLAN_STEP = 14, 5
TABLES, DC_COUNT, DC_SYMBOL, AC_COUNT, AC_SYMBOL = range(PLAN_STEP)
MAX_UNIT = 6  # blocks, with the samplings that libturbojpeg has names for
NUMBERS = PLAN + PLAN_STEP * MAX_UNIT
WALKING, SOUND, BROKEN = range(3)
# Bytes that may be read beyond a stream: in a block of a damaged one, 64 codes of 16 bits with 15 more each at most.
OVERRUN = 512

# While tables are made, an entry also has the length of its first code, without the bits that follow the code.
_CODE_LENGTH = 13
# Larger differences than 8-bit samples can have, and sums of so many of them, could overflow in libjpeg.
_MAX_DC_BITS, _MAX_BLOCKS = 11, 1 << 20
_MAX_SIDE = 65500  # libjpeg's own limit
_SOI, _EOI, _SOS, _DHT, _DQT, _DRI, _COM, _RST0 = 0xD8, 0xD9, 0xDA, 0xC4, 0xDB, 0xDD, 0xFE, 0xD0
_SOF0, _SOF1, _APP0, _APP1, _APP14, _APP15 = 0xC0, 0xC1, 0xE0, 0xE1, 0xEE, 0xEF
_JFIF, _ADOBE, _EXIF = (np.frombuffer(name, np.uint8) for name in (b"JFIF\0", b"Adobe", b"Exif\0\0"))


class Form(NamedTuple):
    """What the headers of a stream of the common form say: its size in pixels, and whether there is EXIF."""

    height: int
    width: int
    has_exif: bool


class _Walk:
    """A stream being walked, in memory that the next one uses again.

    Attributes:
        number: uint64, see the places above.
        address: of these.
        table: uint16 (3, 2, ENTRIES), DC and AC tables of the components; equal pairs once.
        count, symbol: uint8, by class and number of a Huffman table: how many codes of each length, [0] if it is
            defined; and the symbols.
        scan: uint8, the coded bytes of all segments without stuffed zeros, then OVERRUN.
        end: uint64, how many of them lie before the end of each segment.
    """

    def __init__(self) -> None:
        self.number = np.zeros(NUMBERS, np.uint64)
        self.address = np.uint64(self.number.ctypes.data)
        self.table = np.zeros((3, 2, ENTRIES), np.uint16)
        self.count, self.symbol = np.zeros((2, 4, 17), np.uint8), np.zeros((2, 4, 256), np.uint8)
        self.scan = self.end = np.empty(0, np.uint8)

    def begin(self, stream: bytes) -> None:
        """Walk another stream from now on; it is BROKEN at once if it is not of the common form."""
        data = np.frombuffer(stream, np.uint8)
        if self.scan.size < data.size + OVERRUN:
            self.scan = np.empty(data.size + data.size // 4 + OVERRUN, np.uint8)
        self.number[STATUS] = BROKEN
        self.end = _begin(data, self.number, self.scan, self.table, self.count, self.symbol)

    @property
    def status(self) -> int:
        return int(self.number[STATUS])


class _Walks(threading.local):
    """A thread's memory for two walks, and what stands in for the second where there is but one stream."""

    def __init__(self) -> None:
        self.two = _Walk(), _Walk()
        self.idle = _Walk()
        # It reads zeros for ever: its tables say that no bits are taken.
        self.idle.number[PLAN], self.idle.number[AT] = self.idle.table.ctypes.data, self.idle.symbol.ctypes.data


_walks = _Walks()


def form(stream: bytes) -> Form | None:
    """Return what a stream of the common form says of itself; None for any other, which may be a JPEG all the same."""
    own = _walks.two[0]
    frame = np.zeros((3, 5), np.int64)
    found = _headers(np.frombuffer(stream, np.uint8), frame, own.count, own.symbol)
    components, height, width, _, _, has_exif = found
    return Form(height, width, has_exif) if components else None


def are_sound(streams: Sequence[bytes]) -> list[bool]:
    """Return for each stream whether libjpeg-turbo certainly decodes it without a warning; False leaves that open.

    Two are walked at once; where one ends, the next takes its place.
    """
    sound = [False] * len(streams)
    waiting, free = enumerate(streams), list(_walks.two)
    running: list[tuple[int, _Walk]] = []
    while True:
        while free and (following := next(waiting, None)):
            free[-1].begin(following[1])
            if free[-1].status == WALKING:
                running.append((following[0], free.pop()))
        if not running:
            return sound
        walk_both(running[0][1].address, (running[1][1] if len(running) > 1 else _walks.idle).address)
        for place, walk in [ended for ended in running if ended[1].status != WALKING]:
            sound[place] = walk.status == SOUND
            free.append(walk)
            running.remove((place, walk))


@_compiled
def _begin(data: Array, number: Array, scan: Array, table: Array, count: Array, symbol: Array) -> Array:
    """Read the headers, make the tables, gather the coded bytes, and stand before the first block; return _Walk.end.

    The status stays as it is unless the stream is of the common form and has all its markers.
    """
    end = np.zeros(1, np.uint64)
    # Per component: horizontal and vertical sampling, quantisation table, DC and AC table.
    frame = np.zeros((3, 5), np.int64)
    components, height, width, interval, at, _ = _headers(data, frame, count, symbol)
    if components == 0 or not _make_tables(components, frame, count, symbol, table):
        return end
    blocks = _make_plan(components, frame, count, symbol, table, number)
    across = 8 * (frame[:, 0].max() if components > 1 else 1)
    down = 8 * (frame[:, 1].max() if components > 1 else 1)
    units = ((width + across - 1) // across) * ((height + down - 1) // down)
    segments = (units + interval - 1) // interval if interval else 1
    if units * blocks >= _MAX_BLOCKS or segments > data.size:
        return end
    end = np.zeros(segments, np.uint64)
    size: Number = 0
    for i in range(segments):
        size, at = _unstuffed(data, at, scan, size)
        if at + 1 >= data.size or data[at + 1] != (_RST0 + (i & 7) if i + 1 < segments else _EOI):
            return end
        end[i] = size
        at += 2
    scan[size : size + OVERRUN] = 0
    number[SCAN] = scan.ctypes.data
    number[LIMIT] = number[SCAN] + np.uint64(size + 8)
    number[END] = end.ctypes.data
    number[UNIT], number[FULL] = blocks, blocks * (interval if segments > 1 else units)
    number[LAST] = blocks * (units - interval * (segments - 1))
    # As if a block before the first had just ended.
    number[STATUS], number[COEFFICIENTS], number[PLANNED] = WALKING, BLOCK, blocks - 1
    number[COMING], number[HELD], number[AT] = 0, 0, number[SCAN]
    number[BLOCKS_LEFT], number[SEGMENTS_LEFT] = number[FULL] + np.uint64(1), segments
    return end


@_compiled
def _headers(
    data: Array, frame: Array, count: Array, symbol: Array
) -> tuple[Number, Number, Number, Number, Number, bool]:
    """Read all segments before the scan.

    Returns:
        components, height, width, restart interval, where the scan starts, whether there is EXIF; no components for a
        stream that is not of the common form.
    """
    no = (0, 0, 0, 0, 0, False)
    components: Number = 0
    height: Number = 0
    width: Number = 0
    interval: Number = 0
    has_exif = False
    count[:] = 0
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
            if max(height, width) > _MAX_SIDE or not _has_name(components, frame):
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
            return components, height, width, interval, at, has_exif
        elif marker == _APP0:  # libjpeg warns of versions and colours that it does not know
            if _begins(body, _JFIF) and body.size > 5 and body[5] != 1:
                return no
        elif marker == _APP14:
            if _begins(body, _ADOBE) and body.size > 11 and body[11] > 1:
                return no
        elif marker == _APP1:
            has_exif |= _begins(body, _EXIF)
        elif not (_APP1 < marker <= _APP15 or marker == _COM):
            return no
    return no


@_compiled
def _has_name(components: Number, frame: Array) -> bool:
    """Whether the sampling is one that libturbojpeg names, in its usual form: it refuses some others."""
    if components == 1:
        return True
    across, down = frame[0, 0], frame[0, 1]
    named = (across <= 2 and down <= 2) or (across == 4 and down == 1) or (across == 1 and down == 4)
    return bool(named and (frame[1:, :2] == 1).all())


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
def _make_tables(components: Number, frame: Array, count: Array, symbol: Array, table: Array) -> bool:
    """Make the tables of each component that has no earlier one's; False if one is missing or can't be used."""
    dc, ac = np.empty(ENTRIES, np.uint32), np.empty(ENTRIES, np.uint32)
    for c in range(components):
        if _first_with_tables_of(c, frame) == c:
            if not (
                _singles(count[0, frame[c, 3]], symbol[0, frame[c, 3]], True, dc)
                and _singles(count[1, frame[c, 4]], symbol[1, frame[c, 4]], False, ac)
            ):
                return False
            _join(dc, ac, table[c, 0])
            _join(ac, ac, table[c, 1])
    return True


@_compiled
def _first_with_tables_of(component: Number, frame: Array) -> Number:
    for c in range(component):
        if frame[c, 3] == frame[component, 3] and frame[c, 4] == frame[component, 4]:
            return c
    return component


@_compiled
def _make_plan(components: Number, frame: Array, count: Array, symbol: Array, table: Array, number: Array) -> Number:
    """Fill in a unit's blocks; return how many they are."""
    blocks: Number = 0
    for c in range(components):
        tables, dc, ac = table[_first_with_tables_of(c, frame)], frame[c, 3], frame[c, 4]
        for _ in range(frame[c, 0] * frame[c, 1] if components > 1 else 1):
            plan = number[PLAN + PLAN_STEP * blocks :]
            plan[TABLES] = tables.ctypes.data
            plan[DC_COUNT], plan[DC_SYMBOL] = count[0, dc].ctypes.data, symbol[0, dc].ctypes.data
            plan[AC_COUNT], plan[AC_SYMBOL] = count[1, ac].ctypes.data, symbol[1, ac].ctypes.data
            blocks += 1
    return blocks


@_compiled
def _singles(count: Array, symbol: Array, dc: bool, entry: Array) -> bool:
    """Fill a table with one symbol for each index; False if the Huffman table is missing or can't be used."""
    if not count[0]:
        return False
    entry[:] = UNKNOWN
    code, s = 0, 0
    for length in range(1, 17):
        for _ in range(count[length]):
            if dc and symbol[s] > _MAX_DC_BITS:
                return False
            if length <= BITS:
                low = code << (BITS - length)
                entry[low : low + (1 << (BITS - length))] = _entry(symbol[s], length, dc)
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
        advance = END_OF_BLOCK
    else:
        advance = run + 1
    return length << _CODE_LENGTH | advance << ADVANCE | (length + size)


@_compiled
def _join(first: Array, following: Array, table: Array) -> None:
    """Fill a table with the entries of another, and the symbol after each where its code lies within the index, too."""
    for i in range(ENTRIES):
        entry = np.int64(first[i])
        used = entry & LENGTH
        joined = entry & ((1 << _CODE_LENGTH) - 1)
        second = np.int64(following[(i << used) & (ENTRIES - 1)])
        code = second >> _CODE_LENGTH
        ends = (entry >> ADVANCE) & END_OF_BLOCK
        fits = (ends == 0) & (code != 0) & (used + code <= BITS)
        table[i] = joined + (second & ((1 << _CODE_LENGTH) - 1)) if fits else joined


@_compiled
def _unstuffed(data: Array, at: Number, scan: Array, size: Number) -> tuple[Number, Number]:
    """Append coded bytes up to the next marker, without zeros stuffed after 0xFF; return the size, and its place."""
    size = np.uint64(size)
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
                    return np.int64(size), np.int64(at)
                at += one
        if at >= end:
            return np.int64(size), np.int64(at)


# ---- the walk. Memory is read by address: numba counts references to arrays, atomically, wherever they are handed on


_operation: Callable[[Callable], Callable] = intrinsic


def _load_of(bits: int, big_endian: bool = False) -> Callable:
    def load(_: Context, address: Type) -> tuple[Signature, Callable]:
        """The number of so many bits at an address, which may be any."""

        def generate(
            context: BaseContext, builder: ir.IRBuilder, signature: Signature, arguments: list[Value]
        ) -> Value:
            value = builder.load(builder.inttoptr(arguments[0], ir.IntType(bits).as_pointer()), align=1)
            return builder.bswap(value) if big_endian else builder.zext(value, ir.IntType(64))

        return types.uint64(address), generate

    return _operation(load)


_byte, _half, _number, _word = _load_of(8), _load_of(16), _load_of(64), _load_of(64, big_endian=True)


@_operation
def _store(_: Context, address: Type, number: Type) -> tuple[Signature, Callable]:
    """Put a number of 64 bits at an address."""

    def generate(context: BaseContext, builder: ir.IRBuilder, signature: Signature, arguments: list[Value]) -> Value:
        builder.store(arguments[1], builder.inttoptr(arguments[0], ir.IntType(64).as_pointer()), align=8)
        return context.get_dummy_value()

    return types.void(address, number), generate


def _place(name: int) -> np.uint64:
    return np.uint64(8 * name)


_STATUS, _COMING, _HELD, _AT, _COEFFICIENTS, _PLANNED = map(_place, (STATUS, COMING, HELD, AT, COEFFICIENTS, PLANNED))
_BLOCKS_LEFT, _SEGMENTS_LEFT, _SCAN, _LIMIT = map(_place, (BLOCKS_LEFT, SEGMENTS_LEFT, SCAN, LIMIT))
_END, _UNIT, _FULL, _LAST, _PLAN, _PLAN_STEP = map(_place, (END, UNIT, FULL, LAST, PLAN, PLAN_STEP))
_DC_COUNT, _DC_SYMBOL, _AC_COUNT, _AC_SYMBOL = map(_place, (DC_COUNT, DC_SYMBOL, AC_COUNT, AC_SYMBOL))
_0, _1, _3, _4, _7, _8, _15, _16, _48, _56, _63 = (np.uint64(x) for x in (0, 1, 3, 4, 7, 8, 15, 16, 48, 56, 63))
_TOP, _LENGTH, _ADVANCE, _BLOCK = np.uint64(64 - BITS), np.uint64(LENGTH), np.uint64(ADVANCE), np.uint64(BLOCK)
_END_OF_BLOCK, _AC_TABLE, _INVALID = np.uint64(END_OF_BLOCK), np.uint64(2 * ENTRIES), np.uint64(2**64 - 1)
_ENDED = np.uint64(1 << ADVANCE)  # an entry that ends a block in order


@_compiled
def walk_both(a: Number, b: Number) -> None:
    """Walk two streams, given by the addresses of their walks, until one of them ends or is found broken.

    Loading ORs bytes that partly are held already, so that no branch depends on how many are missing. Up to OVERRUN
    bytes beyond a stream are read.
    """
    coming_a, held_a, at_a, k_a = _number(a + _COMING), _number(a + _HELD), _number(a + _AT), _number(a + _COEFFICIENTS)
    coming_b, held_b, at_b, k_b = _number(b + _COMING), _number(b + _HELD), _number(b + _AT), _number(b + _COEFFICIENTS)
    entry_a, entry_b, ac_a, ac_b = _ENDED, _ENDED, _ac_table(a), _ac_table(b)
    while True:
        ended = False
        if k_a >= _BLOCK:
            coming_a, held_a, at_a, k_a = _next_block(a, coming_a, held_a, at_a, k_a, entry_a)
            ac_a = _ac_table(a)
            ended = _number(a + _STATUS) != WALKING
        if k_b >= _BLOCK:
            coming_b, held_b, at_b, k_b = _next_block(b, coming_b, held_b, at_b, k_b, entry_b)
            ac_b = _ac_table(b)
            ended |= _number(b + _STATUS) != WALKING
        if ended:
            break
        entry_a = _half(ac_a + (coming_a >> _TOP << _1))
        entry_b = _half(ac_b + (coming_b >> _TOP << _1))
        coming_a |= _word(at_a) >> held_a
        coming_b |= _word(at_b) >> held_b
        at_a += (_63 - held_a) >> _3
        at_b += (_63 - held_b) >> _3
        held_a = (held_a | _56) - (entry_a & _LENGTH)
        held_b = (held_b | _56) - (entry_b & _LENGTH)
        coming_a <<= entry_a & _LENGTH
        coming_b <<= entry_b & _LENGTH
        k_a += entry_a >> _ADVANCE
        k_b += entry_b >> _ADVANCE
    _pause(a, coming_a, held_a, at_a, k_a)
    _pause(b, coming_b, held_b, at_b, k_b)


@_compiled
def _pause(walk: Number, coming: Number, held: Number, at: Number, k: Number) -> None:
    _store(walk + _COMING, coming)
    _store(walk + _HELD, held)
    _store(walk + _AT, at)
    _store(walk + _COEFFICIENTS, k)


@_compiled
def _ac_table(walk: Number) -> Number:
    return _number(_plan(walk)) + _AC_TABLE


@_compiled
def _plan(walk: Number) -> Number:
    return walk + _PLAN + _number(walk + _PLANNED) * _PLAN_STEP


@_compiled
def _next_block(
    walk: Number, coming: Number, held: Number, at: Number, k: Number, entry: Number
) -> tuple[Number, Number, Number, Number]:
    """Check the block that an entry ended, and enter the next one, or the first that its DC entry does not end at once.

    Takes and returns what walk_both holds of a stream; sets the status of a walk that has ended.
    """
    scan = _number(walk + _SCAN)
    while True:
        advance, length = entry >> _ADVANCE, entry & _LENGTH
        if not (k == _BLOCK if advance < _END_OF_BLOCK else (length != _0 and k < _BLOCK + _END_OF_BLOCK)):
            bit = _finish_block(scan, (at - scan) * _8 - held - length, k - advance, _plan(walk))
            if bit == _INVALID:
                return _ended(walk, BROKEN)
            at = scan + (bit >> _3)
            coming, held, at = _word(at) << (bit & _7), _56 - (bit & _7), at + _7
        if at > _number(walk + _LIMIT):
            return _ended(walk, BROKEN)
        left, planned = _number(walk + _BLOCKS_LEFT) - _1, _number(walk + _PLANNED) + _1
        if planned == _number(walk + _UNIT):
            planned = _0
        if left == _0:
            end, segments = _number(walk + _END), _number(walk + _SEGMENTS_LEFT) - _1
            if ((at - scan) * _8 - held + _7) >> _3 != _number(end):
                return _ended(walk, BROKEN)
            if segments == _0:
                return _ended(walk, SOUND)
            coming, held, at = _0, _0, scan + _number(end)
            left = _number(walk + (_LAST if segments == _1 else _FULL))
            _store(walk + _END, end + _8)
            _store(walk + _SEGMENTS_LEFT, segments)
        _store(walk + _BLOCKS_LEFT, left)
        _store(walk + _PLANNED, planned)
        coming |= _word(at) >> held
        at += (_63 - held) >> _3
        entry = _half(_number(_plan(walk)) + (coming >> _TOP << _1))
        k = entry >> _ADVANCE
        coming <<= entry & _LENGTH
        held = (held | _56) - (entry & _LENGTH)
        if k < _BLOCK:
            return coming, held, at, k


@_compiled
def _ended(walk: Number, status: int) -> tuple[Number, Number, Number, Number]:
    _store(walk + _STATUS, np.uint64(status))
    return _0, _0, _number(walk + _SCAN), _0


@_compiled
def _finish_block(scan: Number, bit: Number, k: Number, plan: Number) -> Number:
    """Walk the rest of a block symbol by symbol; return the place in bits after it, _INVALID for an invalid one."""
    while k < _BLOCK:
        word = _word(scan + (bit >> _3)) << (bit & _7) >> _48
        if k:
            length, symbol = _code(word, _number(plan + _AC_COUNT), _number(plan + _AC_SYMBOL))
        else:
            length, symbol = _code(word, _number(plan + _DC_COUNT), _number(plan + _DC_SYMBOL))
        if length == _0:
            return _INVALID
        bit += length + (symbol & _15)
        run = symbol >> _4
        if k == _0:
            k = _1
        elif symbol & _15 == _0 and run != _15:
            return bit
        else:
            k += run + _1
    return bit if k == _BLOCK else _INVALID


@_compiled
def _code(word: Number, counts: Number, symbols: Number) -> tuple[Number, Number]:
    """Return the length of the code that 16 bits begin with, and its symbol; length 0 if there is none."""
    first = _0
    for i in range(16):
        length = np.uint64(i) + _1
        code, count = word >> (_16 - length), _byte(counts + length)
        if code - first < count:  # as unsigned numbers: a code before the first is a large one
            return length, _byte(symbols + code - first)
        symbols += count
        first = (first + count) << _1
    return _0, _0
