"""huffman: whole streams are found sound, and none that libjpeg-turbo warns of, however it is damaged."""

import io
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from fasttrain.dataprep.huffman import Form, are_sound, form
from fasttrain.formats import jpeg

SIZES = [(1, 1), (8, 8), (17, 33), (63, 257), (240, 320)]
OPTIONS: list[dict] = [
    {},
    {"subsampling": 0},
    {"subsampling": 1},
    {"quality": 100, "subsampling": 0},
    {"quality": 10},
    {"optimize": True},
    {"restart_marker_blocks": 3},
    {"restart_marker_rows": 1, "subsampling": 0},
]


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth and rough parts, so that long and short codes, full and empty blocks all appear."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)).resize(
        (width, height)
    )
    pixels = np.asarray(smooth).astype(int)
    pixels[: height // 2] += rng.integers(-60, 60, (height // 2, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def as_jpeg(image: Image.Image, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", **options)
    return stream.getvalue()


def is_sound(data: bytes) -> bool:
    return are_sound([data])[0]


def decodes(data: bytes) -> bool:
    """Whether libjpeg-turbo decodes it without a warning."""
    try:
        jpeg.decode(data)
    except jpeg.JpegError:
        return False
    return True


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", SIZES)
def test_intact_streams_are_sound(size: tuple[int, int], mode: str, options: dict) -> None:
    data = as_jpeg(picture(*size).convert(mode), **options)
    assert is_sound(data)
    assert is_sound(data + b"anything after the end")


def test_other_forms_are_left_open() -> None:
    image = picture(40, 50)
    for data in (as_jpeg(image, progressive=True), as_jpeg(image.convert("CMYK")), as_jpeg(image)[:2], b"", b"no JPEG"):
        assert not is_sound(data)


def test_what_is_missing_or_too_much_is_seen() -> None:
    data = as_jpeg(picture(63, 257))
    for damaged in (data[:-2], data[:-1], data[:-3] + data[-2:], data[:-2] + b"\0\xff\xd9", data[: len(data) // 2]):
        assert not is_sound(damaged)
    assert not any(is_sound(data[:length]) for length in range(len(data)))
    restarts = as_jpeg(picture(63, 257), restart_marker_blocks=3)
    second = restarts.index(b"\xff\xd1")
    assert not is_sound(restarts[: second + 1] + b"\xd2" + restarts[second + 2 :])


def damaged(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """The stream with a byte or bit changed, bytes taken out, put in, doubled or swapped, more often in the headers."""
    rng = np.random.default_rng(seed)
    for kind in rng.integers(0, 6, count).tolist():
        reach = len(data) if rng.random() < 0.7 else data.index(b"\xff\xda") + 14
        at, length = int(rng.integers(0, reach)), int(rng.integers(1, 12))
        part = data[at : at + length]
        middle = {
            0: bytes([data[at] ^ 1 << int(rng.integers(8))]) + part[1:],
            1: rng.bytes(1) + part[1:],
            2: b"",
            3: rng.bytes(length) + part,
            4: part + part,
            5: part[::-1],
        }[kind]
        yield data[:at] + middle + data[at + length :]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_nothing_libjpeg_warns_of_is_sound(mode: str, options: dict) -> None:
    data = as_jpeg(picture(24, 40).convert(mode), **options)
    changed = [stream for stream in damaged(data, 3000, 0) if stream != data]
    sound = [stream for stream, yes in zip(changed, are_sound(changed), strict=True) if yes]
    assert not [stream for stream in sound if not decodes(stream)]
    # Damage that leaves a stream a JPEG: nearly all that libjpeg accepts must be found sound, or the check is idle.
    accepted = sum(map(decodes, changed))
    assert accepted > 100
    assert len(sound) > 0.5 * accepted


def test_streams_larger_than_any_before() -> None:
    for side in (16, 400, 1200, 30):
        data = as_jpeg(picture(side, side), quality=95)
        assert is_sound(data)
        assert not is_sound(data[: len(data) // 2] + data[-2:])


def test_streams_walked_side_by_side_do_not_touch_each_other() -> None:
    """Streams of all lengths and forms in one call, damaged ones among them, get the answers that each gets alone."""
    whole = [as_jpeg(picture(*size, seed=3), **options) for options in OPTIONS for size in SIZES]
    whole += [as_jpeg(picture(*size).convert("L")) for size in SIZES] + [
        as_jpeg(picture(40, 50), progressive=True),
        b"",
    ]
    broken = [stream for data in whole[::3] if data for stream in damaged(data, 5, 1)]
    streams = [*whole, *broken]
    order = np.random.default_rng(0).permutation(len(streams))
    alone = [is_sound(stream) for stream in streams]
    assert 20 < sum(alone) < len(streams) - 20
    assert are_sound([streams[i] for i in order]) == [alone[i] for i in order]
    assert are_sound([]) == []


def test_damage_behind_many_whole_blocks_is_seen() -> None:
    """The last code changed, so that nothing but its block's end tells: alone, and beside a whole stream."""
    data = as_jpeg(picture(240, 320), optimize=True)
    cut = data[:-3] + bytes([data[-3] ^ 0x80]) + data[-2:]
    assert not decodes(cut) or not is_sound(cut)
    assert are_sound([data, data[:-40] + data[-2:], data]) == [True, False, True]


def test_form_is_what_libjpeg_reads() -> None:
    for options in OPTIONS:
        for size in SIZES:
            data = as_jpeg(picture(*size), **options)
            header = jpeg.read_header(data)
            assert form(data) == Form(header.height, header.width, False) == Form(*size, False)
    turned = Image.Exif()
    turned[0x0112] = 6
    assert form(as_jpeg(picture(40, 50), exif=turned)) == Form(40, 50, True)
    assert form(as_jpeg(picture(40, 50), progressive=True)) is None
    assert form(b"no JPEG") is None
