"""Images: every kind of file becomes the right RGB, and every unusable one a one-line reason."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from fasttrain.dataprep.encode import EncodedImage, Encoding, Write, encode_image, encode_samples
from fasttrain.dataprep.sources.folder import FolderReader
from fasttrain.formats import jpeg
from fasttrain.formats.image import MAX_PIXELS, ImageError, read_rgb
from fasttrain.formats.listing import Sample

COLOURS = np.array([[[200, 30, 40], [20, 180, 60]], [[30, 60, 190], [240, 240, 230]]], np.uint8)


NOISE = np.random.default_rng(1).integers(0, 256, (200, 200, 3)).astype(np.uint8)


def blocks(height: int = 48, width: int = 64) -> np.ndarray:
    """Four flat quarters: colours survive any codec, and show how the image was turned."""
    return COLOURS.repeat(height // 2, 0).repeat(width // 2, 1)


def as_file(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(stream, kind, **options)
    return stream.getvalue()


def encode(content: bytes | np.ndarray, max_side: int = 0, quality: int = 90, write: Write = "jpeg") -> EncodedImage:
    return encode_image(content, Encoding(max_side, quality, write))


def corners(pixels_HW3: np.ndarray) -> np.ndarray:
    height, width, _ = pixels_HW3.shape
    return pixels_HW3[height // 4 :: height // 2, width // 4 :: width // 2].astype(int)


def with_orientation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_formats(kind: str) -> None:
    pixels_HW3 = read_rgb(as_file(blocks(), kind))
    assert pixels_HW3.shape == (48, 64, 3)
    assert pixels_HW3.dtype == np.uint8
    assert pixels_HW3.flags.writeable
    assert abs(corners(pixels_HW3) - COLOURS).max() < 12


@pytest.mark.parametrize("mode", ["P", "RGBA", "1", "L", "LA"])
def test_modes(mode: str) -> None:
    image = Image.fromarray(blocks()).convert(mode)
    np.testing.assert_array_equal(read_rgb(as_file(image, "PNG")), np.asarray(image.convert("RGB")))


def test_16_bit_gray_is_scaled() -> None:
    gray_HW = np.array([[0, 256, 32768, 65535]], np.uint16)
    assert read_rgb(as_file(gray_HW, "PNG"))[0, :, 0].tolist() == [0, 1, 128, 255]


def tiff(samples: np.ndarray, kind: int, bits: int, form: int = 1) -> bytes:
    """A TIFF of one strip. kind: 0, 1 = gray, 0 being white or black; 2 = RGB. form: 1 unsigned, 2 signed, 3 float."""
    height, width = samples.shape[:2]
    count, data, first = samples[0, 0].size, samples.tobytes(), 8
    behind = first + len(data)
    entries = [
        (256, 3, 1, width), (257, 3, 1, height), (258, 3, count, bits if count == 1 else behind), (259, 3, 1, 1),
        (262, 3, 1, kind), (273, 4, 1, first), (277, 3, 1, count), (278, 3, 1, height), (279, 4, 1, len(data)),
        (339, 3, count, form if count == 1 else behind + 2 * count),
    ]  # fmt: skip
    table = behind + 4 * count
    lists = struct.pack(f"<{2 * count}H", *[bits] * count, *[form] * count)
    fields = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return struct.pack("<2sHI", b"II", 42, table) + data + lists + struct.pack("<H", len(entries)) + fields + bytes(4)


GRAYS = np.array([[0, 256, 32768, 65535]], np.uint16)


@pytest.mark.parametrize(("kind", "expected"), [(1, [0, 1, 128, 255]), (0, [255, 254, 127, 0])])
def test_tiffs_of_16_bits_are_scaled(kind: int, expected: list[int]) -> None:
    for channel in range(3):
        assert read_rgb(tiff(GRAYS, kind, 16))[0, :, channel].tolist() == expected
        rgb = np.repeat(GRAYS[:, :, None], 3, 2)
        assert read_rgb(tiff(rgb, 2, 16))[0, :, channel].tolist() == [0, 1, 128, 255]
    assert read_rgb(tiff(GRAYS.astype(np.uint8), kind, 8))[0, 0].tolist() == [expected[0]] * 3


def test_tiffs_of_12_bits_are_scaled() -> None:
    packed = np.array([[[0x00], [0x08], [0x00]]], np.uint8)  # 0x000, 0x800
    data = bytearray(tiff(packed[:, :2, 0], 1, 12))
    data[8:10] = bytes([0x00, 0x08])  # two samples of 12 bits take three bytes: the last lies behind the strip
    place = data.index(struct.pack("<HHII", 279, 4, 1, 2))
    data[place + 8 : place + 12] = struct.pack("<I", 3)
    assert read_rgb(bytes(data))[0, :, 0].tolist() == [0, 128]


@pytest.mark.parametrize(
    ("samples", "kind", "bits", "form"),
    [
        (GRAYS.astype(np.float32), 1, 32, 3),
        (GRAYS.astype(np.uint32), 1, 32, 1),
        (GRAYS.astype(np.int16), 1, 16, 2),
        (np.zeros((1, 4, 3), np.float32), 2, 32, 3),
    ],
)
def test_pixels_of_no_known_scale_are_refused(samples: np.ndarray, kind: int, bits: int, form: int) -> None:
    with pytest.raises(ImageError, match=r"how bright they are is not known|a TIFF of a kind that is not read"):
        read_rgb(tiff(samples, kind, bits, form))


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_deflate", "jpeg", "packbits"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "CMYK"])
def test_tiffs_of_every_mode(mode: str, compression: str | None) -> None:
    if compression == "jpeg" and mode in ("P", "1", "RGBA", "CMYK"):
        return
    image = Image.fromarray(blocks()).convert(mode)
    found = corners(read_rgb(as_file(image, "TIFF", **({"compression": compression} if compression else {}))))
    assert abs(found - corners(np.asarray(image.convert("RGB")))).max() < 12


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "WEBP"])
def test_the_first_page_or_frame_counts(kind: str) -> None:
    pages = [Image.fromarray(blocks()), Image.fromarray(255 - blocks())]
    data = as_file(
        pages[0], kind, save_all=True, append_images=pages[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    np.testing.assert_array_equal(read_rgb(data), blocks())


def test_a_transparent_gif_goes_on_white() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    assert (read_rgb(as_file(image, "GIF", transparency=1)) == 255).all()


def test_transparency_goes_on_white() -> None:
    layer = np.dstack([blocks(), np.full((48, 64), 255, np.uint8)])
    layer[:24, :, 3] = 0
    pixels_HW3 = read_rgb(as_file(layer, "PNG"))
    assert (pixels_HW3[:24] == 255).all()
    np.testing.assert_array_equal(pixels_HW3[24:], blocks()[24:])


def test_palette_with_transparent_colour_goes_on_white() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    assert (read_rgb(as_file(image, "PNG", transparency=1)) == 255).all()


def test_cmyk_jpeg() -> None:
    data = as_file(Image.fromarray(blocks()).convert("CMYK"), "JPEG")
    assert abs(corners(read_rgb(data)) - COLOURS).max() < 12
    encoded = encode(data)
    assert not encoded.passed_through
    assert abs(corners(jpeg.decode(encoded.stream)) - COLOURS).max() < 12


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind: str, orientation: int) -> None:
    data = as_file(blocks(), kind, exif=with_orientation(orientation))
    expected = {
        1: COLOURS, 2: COLOURS[:, ::-1], 3: COLOURS[::-1, ::-1], 4: COLOURS[::-1], 5: COLOURS.transpose(1, 0, 2),
        6: np.rot90(COLOURS, -1), 7: np.rot90(COLOURS, 2).transpose(1, 0, 2), 8: np.rot90(COLOURS),
    }[orientation]  # fmt: skip
    pixels_HW3 = read_rgb(data)
    assert pixels_HW3.shape == ((48, 64, 3) if orientation < 5 else (64, 48, 3))
    assert abs(corners(pixels_HW3) - expected).max() < 12
    encoded = encode(data, 0, 95)
    assert encoded.passed_through == (kind == "JPEG" and orientation == 1)
    assert (encoded.height, encoded.width) == pixels_HW3.shape[:2]
    assert abs(corners(jpeg.decode(encoded.stream)) - expected).max() < 12


@pytest.mark.parametrize("exif", [None, 1, 3])
def test_a_jpeg_s_orientation_is_that_of_xmp_where_exif_has_none(exif: int | None) -> None:
    xmp = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    data = as_file(blocks(), "JPEG", xmp=xmp, **({"exif": with_orientation(exif)} if exif else {}))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(read_rgb(data), expected)
    assert expected.size == ((64, 48) if exif else (48, 64))
    assert (encode(data).width, encode(data).passed_through) == (expected.width, exif == 1)


def test_broken_exif_is_ignored() -> None:
    data = as_file(blocks(), "JPEG")
    broken = data[:2] + b"\xff\xe1\x00\x10Exif\0\0" + bytes(8) + data[2:]
    np.testing.assert_array_equal(read_rgb(broken), read_rgb(data))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_within_the_limit_is_passed_through(mode: str) -> None:
    data = as_file(Image.fromarray(blocks()).convert(mode), "JPEG", quality=30)
    for max_side in (0, 64, 65):
        encoded = encode(data, max_side)
        assert encoded.stream is data
        assert encoded.passed_through
        assert (encoded.height, encoded.width) == (48, 64)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [(480, 640), (640, 480), (2000, 1000), (640, 2)])
def test_resize_to_the_longer_side(kind: str, size: tuple[int, int]) -> None:
    encoded = encode(as_file(blocks(*size), kind), 100)
    assert not encoded.passed_through
    assert max(encoded.height, encoded.width) == 100
    assert encoded.height == max(1, round(100 * size[0] / max(size)))
    header = jpeg.read_header(encoded.stream)
    assert (header.height, header.width) == (encoded.height, encoded.width)
    if min(size) > 2:
        assert abs(corners(jpeg.decode(encoded.stream)) - COLOURS).max() < 12


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("size", [(301, 203), (120, 777), (1001, 900)])
def test_resized_planes_look_like_resized_pixels(subsampling: int, size: tuple[int, int]) -> None:
    y, x = np.mgrid[: size[0], : size[1]]
    waves = (np.sin(x / 40), np.cos(y / 50), np.sin((x + y) / 60))
    smooth = np.stack([128 + 100 * wave for wave in waves], 2).astype(np.uint8)
    data = as_file(smooth, "JPEG", quality=95, subsampling=subsampling)
    by_planes = jpeg.decode(encode(data, 100, 95).stream)
    by_pixels = jpeg.decode(encode(jpeg.decode(data), 100, 95).stream)
    assert by_planes.shape == by_pixels.shape
    assert abs(by_planes.astype(int) - by_pixels).mean() < 3


@pytest.mark.parametrize("size", [(120, 7), (7, 120), (333, 3), (121, 41)])
def test_every_way_of_shrinking_gives_the_same_size(size: tuple[int, int]) -> None:
    image = Image.fromarray(np.resize(NOISE, (*size, 3)))
    files = [as_file(image, "PNG"), as_file(image, "JPEG"), as_file(image, "JPEG", keep_rgb=True)]
    files += [as_file(image.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=with_orientation(6))]
    encoded = [encode(content, 24, 90, write) for content in files for write in ("jpeg", "raw", "auto")]
    expected = tuple(max(1, round(24 * side / max(size))) for side in size)
    assert {(image.height, image.width) for image in encoded} == {expected}


def adobe(data: bytes, transform: int) -> bytes:
    """The same stream with Adobe's segment, which says how colours are stored."""
    return data[:2] + b"\xff\xee\0\x0eAdobe\0\x64" + bytes(4) + bytes([transform]) + data[2:]


def test_jpegs_of_rgb_keep_their_colours_where_they_shrink() -> None:
    y, x = np.mgrid[:120, :160]
    image = Image.fromarray(np.stack([x * 3 // 2, y * 2, (x + y) // 2], 2).astype(np.uint8))
    by_names = as_file(image, "JPEG", quality=90, keep_rgb=True)
    numbered = by_names
    for name, number in zip(b"RGB", (1, 2, 3), strict=True):
        numbered = numbered.replace(bytes([name, 0x11]), bytes([number, 0x11]))
    scan = numbered.index(b"\xff\xda") + 5
    numbered = numbered[:scan] + numbered[scan:].replace(b"R\0G\0B\0", b"\1\0\2\0\3\0", 1)
    for data in (by_names, adobe(numbered, 0)):
        assert jpeg.read_header(data).colorspace == jpeg.COLORSPACE_RGB
        whole = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert abs(read_rgb(data).astype(int) - whole).mean() < 2
        for max_side in (24, 64):
            encoded = encode(data, max_side)
            expected = Image.fromarray(whole).resize((encoded.width, encoded.height), Image.Resampling.HAMMING)
            assert abs(jpeg.decode(encoded.stream).astype(int) - np.asarray(expected)).mean() < 2


@pytest.mark.parametrize("transform", [0, 2])
def test_inverted_cmyk_is_read_as_pillow_reads_it(transform: int) -> None:
    image = Image.fromarray(blocks())
    data = as_file(image.convert("CMYK"), "JPEG")
    assert b"Adobe" in data
    at = data.index(b"Adobe") + 11
    data = data[:at] + bytes([transform]) + data[at + 1 :]
    expected = Image.open(io.BytesIO(data)).convert("RGB").resize((32, 24), Image.Resampling.HAMMING)
    shrunk = jpeg.decode(encode(data, 32).stream)
    assert abs(corners(shrunk) - corners(np.asarray(expected))).max() < 12


def test_resize_is_antialiased() -> None:
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    for data in (as_file(stripes, "PNG"), as_file(stripes, "JPEG", quality=95)):
        pixels_HW3 = jpeg.decode(encode(data, 64, 95).stream)
        assert abs(pixels_HW3[4:-4, 4:-4].astype(int) - 127).max() < 5


def test_pixel_sums() -> None:
    pixels_HW3 = np.random.default_rng(0).integers(0, 256, (50, 30, 3)).astype(np.uint8)
    sums = encode(as_file(pixels_HW3, "PNG")).pixels
    sample = pixels_HW3[::8, ::8].astype(int)
    assert sums.num_pixels == 7 * 4
    assert sums.total_3 == tuple(sample.sum((0, 1)))
    assert sums.square_3 == tuple((sample**2).sum((0, 1)))


def test_a_harmless_warning_keeps_the_image() -> None:
    data = as_file(blocks(), "JPEG")
    scan = data.index(b"\xff\xda")
    odd = data[:scan] + b"\x00\x00\x00" + data[scan:]
    with pytest.raises(jpeg.JpegError, match="extraneous"):
        jpeg.decode(odd)
    assert abs(corners(read_rgb(odd)) - COLOURS).max() < 12
    encoded = encode(odd)
    assert not encoded.passed_through
    assert len(jpeg.decode(encoded.stream)) == 48


def before_scan(data: bytes, added: bytes) -> bytes:
    scan = data.index(b"\xff\xda")
    return data[:scan] + added + data[scan:]


def with_spectrum(data: bytes) -> bytes:
    """Of a sequential scan, whose limits are always those of the whole spectrum."""
    end = data.index(b"\xff\xda") + 2 + 12
    return data[: end - 2] + b"\0" + data[end - 1 :]


ODD: dict[str, Callable[[bytes], bytes]] = {
    "bytes before the scan": lambda data: before_scan(data, bytes(3)),
    "JFIF revision": lambda data: data.replace(b"JFIF\0\1", b"JFIF\0\7"),
    "Adobe transform": lambda data: adobe(data, 9).replace(b"JFIF", b"none"),
    "limits of a scan": with_spectrum,
    "padding": lambda data: data[:-2] + bytes(40) + data[-2:],
    "padding of stuffed bytes": lambda data: data[:-2] + b"\xff\0" * 20 + data[-2:],
    "padding and another picture": lambda data: data[:-2] + bytes(40) + data[-2:] + data,
}
PHOTOGRAPH = as_file(Image.effect_noise((160, 120), 60).resize((320, 240)).convert("RGB"), "JPEG")


@pytest.mark.parametrize("odd", ODD)
def test_odd_is_not_damaged(odd: str) -> None:
    data = ODD[odd](PHOTOGRAPH)
    with pytest.raises(jpeg.JpegError, match=r"extraneous|revision|Adobe|SOS"):
        jpeg.decode(data)
    np.testing.assert_array_equal(read_rgb(data), read_rgb(PHOTOGRAPH))
    assert not encode(data).passed_through
    assert encode(data, 60).width == 60


@pytest.mark.parametrize("odd", ODD)
def test_damage_is_seen_behind_what_is_odd(odd: str) -> None:
    """libjpeg tells of its first complaint alone."""
    pixels = PHOTOGRAPH.index(b"\xff\xda") + 14
    data = ODD[odd](PHOTOGRAPH[: pixels + 2000] + PHOTOGRAPH[pixels + 2400 :])
    for attempt in (lambda: read_rgb(data), lambda: encode(data), lambda: encode(data, 60)):
        with pytest.raises(ImageError, match=r"truncated|damaged"):
            attempt()


def flipped(data: bytes, count: int) -> list[bytes]:
    """Streams, each with one flipped bit in its pixels, which makes no marker."""
    generator, streams = np.random.default_rng(0), list[bytes]()
    while len(streams) < count:
        at, changed = int(generator.integers(data.index(b"\xff\xda") + 20, len(data) - 2)), bytearray(data)
        changed[at] ^= 1 << int(generator.integers(8))
        if 0xFF not in (data[at], data[at - 1], changed[at]):
            streams.append(bytes(changed))
    return streams


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_no_pixels_are_read_that_libjpeg_lost_its_place_in(options: dict) -> None:
    warnings = []
    for data in flipped(as_file(NOISE, "JPEG", quality=50, **options), 100):
        try:
            jpeg.decode(data)
        except jpeg.JpegError as error:
            warnings.append(str(error))
            for attempt in (read_rgb, encode):
                with pytest.raises(ImageError, match=r"truncated|damaged"):
                    attempt(data)
    assert any("extraneous bytes before" in warning for warning in warnings)


def test_damaged_cmyk_is_refused_as_other_jpegs_are() -> None:
    data = as_file(Image.fromarray(NOISE).convert("CMYK"), "JPEG", quality=50)
    refused = []
    for changed in flipped(data, 60):
        try:
            read_rgb(changed)
        except ImageError as error:
            refused.append(str(error))
    assert len(refused) > 6
    assert all("truncated" in reason or "damaged: Corrupt JPEG data" in reason for reason in refused)


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg_claiming(width: int, height: int) -> bytes:
    data = as_file(blocks(), "JPEG")
    size = data.index(b"\xff\xc0") + 5
    return data[:size] + struct.pack(">HH", height, width) + data[size + 4 :]


def with_frame(second: int, bits: int = 8) -> bytes:
    data = as_file(blocks(), "JPEG")
    frame = data.index(b"\xff\xc0")
    return data[: frame + 1] + bytes([second]) + data[frame + 2 : frame + 4] + bytes([bits]) + data[frame + 5 :]


UNUSABLE = {
    "12 bits": (with_frame(0xC1, 12), "a JPEG of 12 bits a sample, which is not read"),
    "lossless jpeg": (with_frame(0xC3), "a lossless JPEG, which is not read"),
    "arithmetic lossless jpeg": (with_frame(0xCB), "a lossless JPEG, which is not read"),
    "cut tiff": (as_file(NOISE, "TIFF")[:9000], "."),
    "cut compressed tiff": (as_file(NOISE, "TIFF", compression="tiff_deflate")[:9000], "."),
    "cut gif": (as_file(NOISE, "GIF")[:9000], "truncated"),
    "tiff bomb": (as_file(Image.new("1", (60000, 60000)), "TIFF", compression="group4"), f"more than {MAX_PIXELS}"),
    "empty": (b"", "empty file"),
    "text": (b"hello, this is text", "not an image"),
    "ppm": (as_file(blocks(), "PPM"), "not an image"),
    "start of a jpeg": (b"\xff\xd8\xff\xe0", "not an image|truncated"),
    "cut jpeg": (as_file(NOISE, "JPEG")[:9000], "truncated"),
    "cut jpeg with an end": (as_file(NOISE, "JPEG")[:9000] + b"\xff\xd9", "truncated"),
    "cut turned jpeg": (as_file(NOISE, "JPEG", exif=with_orientation(6))[:9000] + b"\xff\xd9", "truncated"),
    "cut cmyk jpeg": (as_file(Image.fromarray(NOISE).convert("CMYK"), "JPEG")[:9000], "truncated"),
    "cut cmyk jpeg with an end": (
        as_file(Image.fromarray(NOISE).convert("CMYK"), "JPEG")[:9000] + b"\xff\xd9",
        "truncated",
    ),
    "cut png": (as_file(NOISE, "PNG")[:9000], "truncated"),
    "cut webp": (as_file(NOISE, "WEBP")[:5000], "."),
    "cut bmp": (as_file(NOISE, "BMP")[:9000], "truncated"),
    "png bomb": (png_claiming(60000, 60000), f"more than {MAX_PIXELS} pixels"),
    "png without its pixels": (png_claiming(1000, 1000), "."),
    "jpeg bomb": (jpeg_claiming(60000, 60000), f"more than {MAX_PIXELS} pixels"),
}


@pytest.mark.parametrize("name", UNUSABLE)
@pytest.mark.filterwarnings("error")
def test_unusable_files_give_a_reason(name: str) -> None:
    data, reason = UNUSABLE[name]
    for attempt in (lambda: read_rgb(data), lambda: encode(data, 0), lambda: encode(data, 32)):
        with pytest.raises(ImageError, match=reason) as error:
            attempt()
        assert "\n" not in str(error.value)


def test_a_side_too_long() -> None:
    data = as_file(np.zeros((1, 65536, 3), np.uint8), "PNG")
    with pytest.raises(ImageError, match="a side is longer than"):
        encode(data)
    assert encode(data, 400).width == 400


def test_encode_samples_goes_on_after_a_failure(tmp_path: Path) -> None:
    (tmp_path / "good.jpg").write_bytes(as_file(blocks(), "JPEG"))
    (tmp_path / "bad.jpg").write_bytes(b"")
    task = [(Sample(name, 0), True) for name in ("bad.jpg", "missing.jpg", "good.jpg")]
    results = list(encode_samples(FolderReader(str(tmp_path)), task, Encoding()))
    assert results[:2] == ["empty file", "No such file or directory"]
    assert results[2].passed_through  # type: ignore[union-attr]
