"""A JPEG is decoded with its own tables or not at all; the walk over its segments agrees with a decoder without any."""

import ctypes
import io
import mmap
import pathlib
import random
import re
import signal
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from support.forks import finished

from fasttrain.dataprep.encode import Encoding, encode_image
from fasttrain.formats import jpeg
from fasttrain.formats.image import ImageError, jpeg_header, read_rgb
from fasttrain.formats.tables import MOST_SCANS, first_scan, objection

DQT, DHT, SOF, SOS = (b"\xff" + bytes([second]) for second in (0xDB, 0xC4, 0xC0, 0xDA))
MARKERS = rb"\xff[\xdb\xc4\xc0\xda]\0"  # of these, with the first byte of a length
SIZE = (40, 48)


def picture(seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (10, 12, 3), np.uint8)
    return Image.fromarray(noise).resize(SIZE[::-1])


def as_jpeg(image: Image.Image, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", **options)
    return stream.getvalue()


def undefined(data: bytes) -> str:
    source = np.frombuffer(data, np.uint8)
    return objection(source.ctypes.data, source.size).removeprefix("it uses a ").partition(" table")[0]


def segments(data: bytes, marker: bytes) -> list[tuple[int, int]]:
    """Where the segments of a marker begin and end, also between scans."""
    places, at = [], 2
    while at < len(data) - 2:
        if data[at] != 0xFF or data[at + 1] in (0, *range(0xD0, 0xD9), 0xFF):
            at += 1
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at : at + 2] == marker:
            places.append((at, end))
        at = end
    return places


def without(data: bytes, *places: tuple[int, int]) -> bytes:
    for start, end in sorted(places, reverse=True):
        data = data[:start] + data[end:]
    return data


def merged(data: bytes) -> bytes:
    """The same tables, in one segment for each kind."""
    for marker in (DQT, DHT):
        places = segments(data, marker)
        content = b"".join(data[start + 4 : end] for start, end in places)
        whole = marker + (len(content) + 2).to_bytes(2, "big") + content
        data = data[: places[0][0]] + whole + without(data, *places)[places[0][0] :]
    return data


def scan_by_scan(image: Image.Image) -> bytes:
    """A sequential JPEG with a scan for each component: spliced of three gray ones."""
    parts = [as_jpeg(band) for band in image.convert("YCbCr").split()]
    first, frame = parts[0], parts[0].index(SOF)
    components = b"".join(bytes([number, 0x11, 0]) for number in (1, 2, 3))
    head = first[:frame] + SOF + b"\0\x11" + first[frame + 4 : frame + 9] + b"\3" + components
    scans = [part[part.index(SOS) : -2] for part in parts]
    scans = [scan[:5] + bytes([number]) + scan[6:] for number, scan in enumerate(scans, 1)]
    return head + first[frame + 13 : first.index(SOS)] + b"".join(scans) + b"\xff\xd9"


def with_thumbnail(image: Image.Image) -> bytes:
    """Its APP1 holds a whole JPEG, markers and all."""
    inside = as_jpeg(image.resize((8, 8)))
    data = as_jpeg(image)
    return data[:2] + b"\xff\xe1" + (len(inside) + 2).to_bytes(2, "big") + inside + data[2:]


SOUND: dict[str, Callable[[Image.Image], bytes]] = {
    "baseline": as_jpeg,
    "gray": lambda image: as_jpeg(image.convert("L")),
    "full colours": lambda image: as_jpeg(image, subsampling=0),
    "own Huffman tables": lambda image: as_jpeg(image, optimize=True),
    "progressive": lambda image: as_jpeg(image, progressive=True),
    "progressive gray": lambda image: as_jpeg(image.convert("L"), progressive=True),
    "restarts": lambda image: as_jpeg(image, restart_marker_blocks=1),
    "progressive with restarts": lambda image: as_jpeg(image, progressive=True, restart_marker_blocks=2),
    "16-bit quantisation": lambda image: as_jpeg(image, qtables=[[300] * 64, [400] * 64]),
    "tables in one segment": lambda image: merged(as_jpeg(image)),
    "a scan a component": scan_by_scan,
    "a thumbnail": with_thumbnail,
    "fill bytes": lambda image: re.sub(MARKERS, lambda found: b"\xff\xff" + found[0], as_jpeg(image)),
    "bytes behind its end": lambda image: as_jpeg(image) + b"\xff\xda\0\x0c" + bytes(99),
}  # fmt: skip


@pytest.mark.parametrize("kind", SOUND)
def test_a_sound_stream_defines_all_it_uses(kind: str) -> None:
    for seed in range(5):
        data = SOUND[kind](picture(seed))
        assert jpeg.decode(data).shape == (*SIZE, 3)
        assert undefined(data) == ""


IMPOSSIBLE = DHT + b"\0\xa2" + b"".join(bytes([place, 3]) + bytes(18) for place in (0, 1, 2, 3, 16, 17, 18, 19))


def decodes_alone(data: bytes) -> bool:
    """What libturbojpeg says that has seen no image, and whose standard tables are replaced by impossible ones."""
    library, fields = jpeg._library(), jpeg._decompressor().fields
    handle, pixels = library.tjInitDecompress(), np.empty((*SIZE, 3), np.uint8)
    try:
        for stream in (b"\xff\xd8" + IMPOSSIBLE + b"\xff\xd9", data):
            source = np.frombuffer(stream, np.uint8)
            assert library.tjDecompressHeader3(handle, source.ctypes.data, source.size, *fields) == 0
        address = source.ctypes.data, source.size, pixels.ctypes.data
        if library.tjDecompress2(handle, *address, SIZE[1], 0, SIZE[0], 0, 0) == 0:
            return True
        message = library.tjGetErrorStr2(handle)
        assert b"Quantization table" in message or b"Bogus Huffman" in message or b"Corrupt" in message
        return b"Corrupt" in message  # by tables of its own: two scans with one between them removed
    finally:
        library.tjDestroy(handle)


@pytest.mark.parametrize("kind", SOUND)
def test_without_a_table_it_is_refused_where_a_decoder_without_tables_does(kind: str) -> None:
    data = SOUND[kind](picture())
    places = [*segments(data, DQT), *segments(data, DHT)]
    outcomes = [undefined(without(data, place)) == "" for place in places]
    assert outcomes == [decodes_alone(without(data, place)) for place in places]
    assert not all(outcomes)
    assert undefined(without(data, *segments(data, DQT))) == "quantisation"
    assert undefined(without(data, *segments(data, DHT))) == "Huffman"
    assert undefined(without(data, *places)) == "quantisation"


@pytest.mark.parametrize("marker", [DQT, DHT])
@pytest.mark.parametrize("kind", ["baseline", "gray", "progressive", "a scan a component"])
def test_a_stranger_s_tables_are_never_used(kind: str, marker: bytes) -> None:
    """Each way of decoding gives one answer, whatever this thread has decoded before."""
    sound = SOUND[kind](picture())
    data = without(sound, *segments(sound, marker))
    source, pixels = np.frombuffer(data, np.uint8), np.empty((*SIZE, 3), np.uint8)
    header = jpeg_header(sound)
    assert header is not None
    ways: list[Callable[[], object]] = [
        lambda: jpeg.decode(data),
        lambda: jpeg.decode(data, shrink=8),
        lambda: jpeg.decode_planes(data, header),
        lambda: jpeg.decode_into(source.ctypes.data, source.size, *SIZE, pixels.ctypes.data),
        lambda: read_rgb(data),
        lambda: encode_image(data, Encoding()),
        lambda: encode_image(data, Encoding(max_side=20), measure=False),
    ]
    for way in ways:
        for before in (sound, as_jpeg(picture(1), quality=20), None):
            if before:
                jpeg.decode(before)
            with pytest.raises((jpeg.JpegError, ImageError), match=r"uses a \w+ table that it does not define"):
                way()


@pytest.mark.parametrize("mode", ["CMYK", "odd bytes"])
def test_what_is_left_to_pillow_is_held_to_the_same(mode: str) -> None:
    """Its decoder would take the tables that the standard gives as an example."""
    data = as_jpeg(picture().convert("CMYK") if mode == "CMYK" else picture())
    if mode == "odd bytes":
        data = data[: data.index(SOS)] + bytes(3) + data[data.index(SOS) :]
    assert read_rgb(data).shape == (*SIZE, 3)
    for marker in (DQT, DHT):
        at = data.index(SOS)
        places = segments(data[:at], marker)
        with pytest.raises(ImageError, match="does not define"):
            read_rgb(without(data, *places))


def test_the_walk_ends_in_any_bytes() -> None:
    generator = np.random.default_rng(0)
    data = np.frombuffer(as_jpeg(picture(), progressive=True), np.uint8)
    for length in range(len(data)):
        assert undefined(data[:length].tobytes() or b"x") in ("", "quantisation", "Huffman")
    for _ in range(3000):
        changed = data.copy()
        changed[generator.integers(2, len(data), 4)] = generator.integers(0, 256, 4)
        assert undefined(changed.tobytes()) in ("", "quantisation", "Huffman")


def many_scans(count: int) -> bytes:
    """A gray progressive JPEG: DC, then the same scan of some AC again and again, which no decoder warns of."""
    data = as_jpeg(picture().convert("L"), progressive=True)
    (_, dc_end), (ac, ac_end) = segments(data, SOS)[:2]
    (tables,) = (place for place in segments(data, DHT) if dc_end < place[0] < ac)
    head = data[: dc_end - 1] + b"\0" + data[dc_end : tables[0]]
    pixels = data[ac_end : next(start for start, _ in segments(data, DHT) if start > ac)]
    scan = data[ac : ac_end - 1] + b"\0" + pixels  # all bits at once, as in the head's: none are left to refine
    return head + data[slice(*tables)] + scan * count + b"\xff\xd9"


def test_a_stream_of_very_many_scans_is_refused_before_a_decoder_passes_over_the_image_for_each() -> None:
    assert read_rgb(many_scans(MOST_SCANS - 1)).shape == (*SIZE, 3)
    data = many_scans(MOST_SCANS)
    source, pixels = np.frombuffer(data, np.uint8), np.empty((*SIZE, 3), np.uint8)
    header = jpeg_header(data)
    assert header is not None
    ways: list[Callable[[], object]] = [
        lambda: jpeg.decode(data),
        lambda: jpeg.decode_planes(data, header),
        lambda: jpeg.decode_into(source.ctypes.data, source.size, *SIZE, pixels.ctypes.data),
        lambda: read_rgb(data),
    ]
    for way in ways:
        with pytest.raises((jpeg.JpegError, ImageError), match=f"more than {MOST_SCANS} scans"):
            way()


def damaged_streams(count: int) -> list[bytes]:
    """Sound streams cut anywhere, with some bytes replaced, mostly by those of markers."""
    generator, kinds = random.Random(0), list(SOUND.values())
    sound = [kind(picture(seed)) for seed, kind in enumerate(kinds)]
    streams = []
    for _ in range(count):
        stream = bytearray(generator.choice(sound))
        for _ in range(generator.randrange(6)):
            stream[generator.randrange(len(stream))] = generator.choice((0, 0xC0, 0xC2, 0xC4, 0xDA, 0xDB, 0xFF))
        streams.append(bytes(stream[: generator.randrange(1, len(stream) + 1)]))
    return streams


def walk_before_a_guard(streams: list[bytes], beyond: int = 0) -> None:
    """Walk over streams, each of which ends, but for some bytes, where memory ends that may be read."""
    room = -(-max(map(len, streams)) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    guard = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + room
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    for stream in streams:
        ctypes.memmove(guard - len(stream), stream, len(stream))
        for every_scan in (0, 1):
            first_scan(guard - len(stream), len(stream) + beyond, every_scan)


@pytest.mark.parametrize("beyond", [0, 1])
def test_no_byte_beyond_a_stream_is_read(tmp_path: pathlib.Path, beyond: int) -> None:
    done = finished(tmp_path, walk_before_a_guard, damaged_streams(5000), beyond)  # a byte too many ends a process
    assert done.returncode == (-signal.SIGSEGV if beyond else 0), done.stderr
