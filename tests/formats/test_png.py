"""PNGs: damage to pixels is seen, damage beside them costs nothing."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from fasttrain.dataprep.encode import Encoding, encode_image
from fasttrain.formats import png
from fasttrain.formats.image import ImageError, exif_orientation, read_rgb

PIXELS = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)


def chunk(kind: bytes, content: bytes, checksum: int | None = None) -> bytes:
    right = zlib.crc32(kind + content)
    return (
        struct.pack(">I4s", len(content), kind) + content + struct.pack(">I", right if checksum is None else checksum)
    )


def as_png(image: Image.Image | np.ndarray = PIXELS, **options: object) -> bytes:
    stream = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(stream, "PNG", **options)
    return stream.getvalue()


def with_chunk(added: bytes, before: bytes = b"IDAT") -> bytes:
    data = as_png()
    at = data.index(before) - 4
    return data[:at] + added + data[at:]


def palette() -> bytes:
    image = Image.fromarray(PIXELS).quantize(8)
    return as_png(image, transparency=1)


def changed(data: bytes, kind: bytes, offset: int = 4) -> bytes:
    """One bit flipped in a chunk: of its content, by default."""
    at = data.index(kind) + offset
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("kind", [b"IHDR", b"PLTE", b"tRNS", b"IDAT"])
def test_a_changed_byte_of_a_chunk_that_makes_pixels_is_damage(kind: bytes) -> None:
    data = palette()
    read_rgb(data)
    for attempt in (read_rgb, lambda data: encode_image(data, Encoding())):
        with pytest.raises(ImageError, match=f"damaged: the checksum of its {kind.decode()} is wrong"):
            attempt(changed(data, kind))
    end = data.index(b"IEND") + 4
    with pytest.raises(ImageError, match="the checksum of its IEND"):
        read_rgb(data[:end] + bytes(4) + data[end + 4 :])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_every_changed_byte_of_a_small_file_is_seen_or_harmless() -> None:
    data = as_png(PIXELS[:4, :4], exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0")
    expected = read_rgb(data)
    for place in range(len(data)):
        broken = data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]
        try:
            found = read_rgb(broken)
        except ImageError:
            continue
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("missing", [0, 1, 8, 12, 40])
def test_a_file_without_its_end_is_truncated(missing: int) -> None:
    data = as_png()
    assert read_rgb(data + bytes(missing)).shape == PIXELS.shape
    if missing:
        with pytest.raises(ImageError, match="truncated"):
            read_rgb(data[:-missing])


BESIDE: dict[str, Callable[[], bytes]] = {
    "long text": lambda: with_chunk(chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(3 << 20)))),
    "long plain text": lambda: with_chunk(chunk(b"tEXt", b"Comment\0" + b"x" * (3 << 20))),
    "text of no compression": lambda: with_chunk(chunk(b"zTXt", b"Comment\0\0" + b"nonsense")),
    "text with a wrong checksum": lambda: with_chunk(chunk(b"tEXt", b"Comment\0hello", 1)),
    "a profile with a wrong checksum": lambda: with_chunk(chunk(b"iCCP", b"icc\0\0" + zlib.compress(b"icc"), 1)),
    "a broken profile": lambda: with_chunk(chunk(b"iCCP", b"icc\0\0nonsense")),
    "a short gamma": lambda: with_chunk(chunk(b"gAMA", b"\0")),
    "EXIF with a wrong checksum": lambda: with_chunk(chunk(b"eXIf", b"MM\0*", 1), b"IEND"),
    "a frame count of nothing": lambda: with_chunk(chunk(b"acTL", b"\0")),
}


@pytest.mark.parametrize("what", BESIDE)
def test_what_lies_beside_the_pixels_does_not_cost_them(what: str) -> None:
    data = BESIDE[what]()
    np.testing.assert_array_equal(read_rgb(data), PIXELS)
    encoded = encode_image(data, Encoding(write="raw"))
    assert encoded.stream == PIXELS.tobytes()


def orientation_chunk(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def raw_profile(orientation: int) -> bytes:
    """As ImageMagick writes EXIF."""
    content = orientation_chunk(orientation)
    return b"Raw profile type exif\0\0" + zlib.compress(
        b"\nexif\n%8d\n" % len(content) + content.hex().encode() + b"\n"
    )


def xmp(orientation: int) -> bytes:
    return b'XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta><rdf tiff:Orientation="%d"/></x:xmpmeta>' % orientation


@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
@pytest.mark.parametrize(
    "added",
    [chunk(b"eXIf", orientation_chunk(6)[6:]), chunk(b"zTXt", raw_profile(6)), chunk(b"iTXt", xmp(6))],
    ids=["EXIF", "ImageMagick", "XMP"],
)  # fmt: skip
def test_an_orientation_is_found_wherever_writers_put_it(added: bytes, before: bytes) -> None:
    long_text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(3 << 20)))
    for data in (with_chunk(added, before), with_chunk(long_text + added, before)):
        assert exif_orientation(data) == 6
        np.testing.assert_array_equal(read_rgb(data), np.rot90(PIXELS, -1))


def test_a_file_without_an_orientation_is_not_opened_to_look_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    data = as_png()
    monkeypatch.setattr(Image, "open", None)
    assert exif_orientation(data) == 1


def test_the_animation_s_still_image_is_read() -> None:
    frames = [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)]
    data = as_png(frames[0], save_all=True, append_images=frames[1:])
    assert b"acTL" in data
    np.testing.assert_array_equal(read_rgb(data), PIXELS)


def test_only_what_makes_pixels_is_kept() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "hello")
    assert png.pixels_alone(as_png(pnginfo=text)) == as_png()
    for data in (png.SIGNATURE, png.SIGNATURE + bytes(11), png.SIGNATURE + chunk(b"IHDR", bytes(13))):
        with pytest.raises(png.PngError, match="truncated"):
            png.pixels_alone(data)
    with pytest.raises(png.PngError, match="no pixels"):
        png.pixels_alone(png.SIGNATURE + chunk(b"IEND", b""))
    with pytest.raises(png.PngError, match="without a name"):
        png.pixels_alone(png.SIGNATURE + chunk(b"1234", b"") + chunk(b"IEND", b""))


@pytest.mark.parametrize("kind", [b"IDAT", b"abCd"])
def test_a_file_of_very_many_chunks_is_refused(kind: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes a hundred times its bytes in memory, beside those that hold the pixels."""
    monkeypatch.setattr(png, "_MOST_CHUNKS", 103)  # IHDR, IDAT, IEND and 100 more
    added = chunk(kind, b"")
    assert read_rgb(with_chunk(added * 100, b"IEND")).shape == PIXELS.shape
    for attempt in (read_rgb, lambda data: encode_image(data, Encoding())):
        with pytest.raises(ImageError, match="more than 103 chunks"):
            attempt(with_chunk(added * 101, b"IEND"))
