"""Pixels equal Pillow's, and nothing damaged or of another size passes."""

import io
import threading

import numpy as np
import pytest
from PIL import Image

from fasttrain.formats import jpeg


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height))


def as_jpeg(image: Image.Image, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", **options)
    return stream.getvalue()


def decode_into(data: bytes, height: int, width: int) -> np.ndarray:
    source = np.frombuffer(data, np.uint8)
    out = np.zeros(height * width * 3 + 64, np.uint8)
    jpeg.decode_into(source.ctypes.data, source.size, height, width, out.ctypes.data)
    assert not out[height * width * 3 :].any()
    return out[: height * width * 3].reshape(height, width, 3)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}])
@pytest.mark.parametrize("size", [(1, 1), (63, 257), (240, 320)])
def test_decode_into_equals_decode(size: tuple[int, int], options: dict) -> None:
    data = as_jpeg(picture(*size), **options)
    header = jpeg.read_header(data)
    assert (header.height, header.width) == size
    np.testing.assert_array_equal(decode_into(data, *size), jpeg.decode(data))
    np.testing.assert_array_equal(jpeg.decode(np.frombuffer(data, np.uint8), header), jpeg.decode(data))
    np.testing.assert_array_equal(jpeg.decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_grayscale_becomes_rgb() -> None:
    data = as_jpeg(picture(20, 30).convert("L"))
    assert jpeg.read_header(data).colorspace == jpeg.COLORSPACE_GRAY
    pixels_HW3 = jpeg.decode(data)
    assert pixels_HW3.shape == (20, 30, 3)
    assert (pixels_HW3 == pixels_HW3[:, :, :1]).all()


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_are_nearly_those_of_ffcv(mode: str) -> None:
    """Its decoder has a fast inverse DCT, which rounds more."""
    libffcv = pytest.importorskip("ffcv.libffcv")
    data = as_jpeg(picture(120, 201).convert(mode), quality=90)
    expected = np.zeros((120, 201, 3), np.uint8)
    source = np.frombuffer(data, np.uint8)
    assert libffcv.imdecode(source, expected, 120, 201, 120, 201) == 0
    assert abs(decode_into(data, 120, 201).astype(int) - expected).mean() < 2


def test_what_was_saved_at_the_highest_quality_is_hardly_changed() -> None:
    """A fast inverse DCT would be off by 10 grey levels and more here."""
    pixels_HW3 = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = as_jpeg(Image.fromarray(pixels_HW3), quality=100, subsampling=0)
    assert abs(jpeg.decode(data).astype(int) - pixels_HW3).mean() < 1


@pytest.mark.parametrize("shrink", [2, 4, 8])
def test_shrink(shrink: int) -> None:
    data = as_jpeg(picture(101, 64))
    assert jpeg.decode(data, shrink=shrink).shape == (-(-101 // shrink), 64 // shrink, 3)


@pytest.mark.parametrize("size", [(40, 61), (41, 60), (20, 30), (80, 120), (400, 600)])
def test_another_size_is_an_error(size: tuple[int, int]) -> None:
    with pytest.raises(jpeg.JpegError, match="40 x 60 pixels, not"):
        decode_into(as_jpeg(picture(40, 60)), *size)


def test_truncated_is_an_error() -> None:
    data = as_jpeg(picture(200, 300))
    with pytest.raises(jpeg.JpegError, match=r"(?i)premature end"):
        decode_into(data[: len(data) // 2], 200, 300)
    with pytest.raises(jpeg.JpegError, match=r"(?i)premature end"):
        jpeg.decode(data[: len(data) // 2] + b"\xff\xd9")


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"not an image at all", b"\xff\xd8\xff" + bytes(100)])
def test_no_jpeg_is_an_error(data: bytes) -> None:
    with pytest.raises(jpeg.JpegError):
        jpeg.read_header(data)
    with pytest.raises(jpeg.JpegError):
        jpeg.decode(data)
    decode_into(as_jpeg(picture(4, 4)), 4, 4)
    with pytest.raises(jpeg.JpegError):
        decode_into(data or b"x", 4, 4)  # the header of the image before must not count


def test_a_failure_does_not_spoil_the_next_image() -> None:
    data = as_jpeg(picture(50, 50))
    expected = jpeg.decode(data)
    with pytest.raises(jpeg.JpegError):
        jpeg.decode(data[:-200])
    np.testing.assert_array_equal(jpeg.decode(data), expected)


def test_a_damaged_table_does_not_spoil_the_next_image() -> None:
    data = as_jpeg(picture(50, 50))
    for table in (at for at in range(len(data)) if data[at : at + 2] == b"\xff\xc4"):
        for length in range(16):
            changed = bytearray(data)
            changed[table + 5 + length] ^= 8
            with pytest.raises(jpeg.JpegError):
                jpeg.decode(bytes(changed))
            jpeg.decode(data)


def test_threads_do_not_disturb_each_other() -> None:
    data = [as_jpeg(picture(60 + i, 80 + i, i)) for i in range(8)]
    expected = [jpeg.decode(d) for d in data]
    wrong = []

    def work(i: int) -> None:
        for _ in range(20):
            if not np.array_equal(decode_into(data[i], 60 + i, 80 + i), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("subsampling", [0, 1, 2, "L"])
@pytest.mark.parametrize("size", [(64, 96), (63, 95), (1, 1), (17, 8)])
def test_planes_decode_and_encode(subsampling: int | str, size: tuple[int, int]) -> None:
    y, x = np.mgrid[: size[0], : size[1]]
    image = Image.fromarray(np.stack([x * 2, y * 2, 128 + x * 0], 2).astype(np.uint8))
    stream = io.BytesIO()
    if subsampling == "L":
        image.convert("L").save(stream, "JPEG", quality=95)
    else:
        image.save(stream, "JPEG", quality=95, subsampling=subsampling)
    data = stream.getvalue()
    planes = jpeg.decode_planes(data, jpeg.read_header(data))
    assert planes[0].shape == size
    assert len(planes) == (1 if subsampling == "L" else 3)
    if subsampling in (2, "L"):
        again = jpeg.encode_planes(planes, 95)
        assert abs(jpeg.decode(again).astype(int) - jpeg.decode(data)).max() < 8
    with pytest.raises(jpeg.JpegError):
        jpeg.decode_planes(data[: len(data) // 2], jpeg.read_header(data))


def test_a_stream_without_pixels_leaves_the_next_one_alone() -> None:
    """libturbojpeg went on with the damaged header where the next stream began, and found "no image" in that."""
    data = as_jpeg(picture(20, 30))
    at = data.index(b"\xff\xda")
    for call in (jpeg.read_header, lambda stream: decode_into(stream, 20, 30)):
        with pytest.raises(jpeg.JpegError, match="SOS"):
            call(data[:at] + b"\xff\xd9" + data[at + 2 :])
        assert jpeg.read_header(data)[:2] == (20, 30)
        with pytest.raises(jpeg.JpegError, match="SOS"):
            call(data[:at] + b"\xff\xd9" + data[at + 2 :])
        np.testing.assert_array_equal(decode_into(data, 20, 30), jpeg.decode(data))
