"""--write: what is stored as pixels, read by the project's loader and by stock FFCV alike."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasttrain.dataprep import convert
from fasttrain.dataprep.encode import SMALL_SIDE, SMART_FACTOR, Encoding, encode_image
from fasttrain.dataprep.plan import MEASURED_AT_LEAST
from fasttrain.formats import jpeg
from fasttrain.formats.beton import MODE_JPG, MODE_RAW, BetonReader
from fasttrain.formats.image import ImageError, read_rgb
from fasttrain.formats.manifest import Manifest
from fasttrain.input import open_dataset

RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (16, 24, 3)).astype(np.uint8) for _ in range(6)]


def make_source(root: Path) -> Path:
    root.mkdir()
    for i, pixels_HW3 in enumerate(IMAGES):
        Image.fromarray(pixels_HW3).save(root / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    assert convert.main([str(make_source(folder / "source")), str(folder / "out"), "--write", "raw"]) == 0
    return folder / "out"


def test_our_loader_reads_raw_shards(raw: Path) -> None:
    store = open_dataset(raw, "train")
    seen = []
    for i in range(store.num_samples):
        sample = store.read(i)
        pixels_HW3 = np.empty((sample.height, sample.width, 3), np.uint8)
        store.write(sample, pixels_HW3.ctypes.data)
        seen.append(pixels_HW3.tobytes())
    assert sorted(seen) == sorted(image.tobytes() for image in IMAGES)


def test_stock_ffcv_reads_raw_shards(raw: Path) -> None:
    loader = pytest.importorskip("ffcv.loader")
    decoders = pytest.importorskip("ffcv.fields.decoders")
    pipelines = {"image": [decoders.SimpleRGBImageDecoder()], "label": [decoders.IntDecoder()]}
    path = str(raw / "train-00000.beton")
    batches = loader.Loader(path, 2, num_workers=1, order=loader.OrderOption.SEQUENTIAL, pipelines=pipelines)
    seen = [np.asarray(image).tobytes() for images_B, _ in batches for image in images_B]
    assert sorted(seen) == sorted(image.tobytes() for image in IMAGES)


def test_max_side_applies_to_raw(raw: Path, tmp_path: Path) -> None:
    source = raw.parent / "source"
    assert convert.main([str(source), str(tmp_path / "out"), "--write", "raw", "--max-side", "12"]) == 0
    reader = BetonReader(tmp_path / "out" / "train-00000.beton")
    assert set(reader.mode_N) == {MODE_RAW}
    assert (set(reader.height_N), set(reader.width_N)) == ({8}, {12})


def as_file(pixels_HW3: np.ndarray, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels_HW3).save(stream, kind, **options)
    return stream.getvalue()


LOSSLESS: dict[str, dict] = {"PNG": {}, "BMP": {}, "TIFF": {}, "WEBP": {"lossless": True}}


@pytest.mark.parametrize("kind", LOSSLESS)
def test_small_lossless_images_keep_their_pixels(kind: str) -> None:
    pixels_HW3 = RNG.integers(0, 256, (SMALL_SIDE, SMALL_SIDE - 7, 3), np.uint8)
    for content in (as_file(pixels_HW3, kind, **LOSSLESS[kind]), pixels_HW3):
        encoded = encode_image(content, Encoding())
        assert encoded.raw
        assert encoded.stream == pixels_HW3.tobytes()
        assert encode_image(content, Encoding(write="jpeg")).stream.startswith(b"\xff\xd8")
        as_png = encode_image(content, Encoding(png=True))
        assert not as_png.raw
        np.testing.assert_array_equal(read_rgb(as_png.stream), pixels_HW3)
        assert as_png.pixels == encoded.pixels


@pytest.mark.parametrize("kind", LOSSLESS)
def test_what_counts_is_the_side_that_is_stored(kind: str) -> None:
    data = as_file(RNG.integers(0, 256, (30, SMALL_SIDE + 1, 3), np.uint8), kind, **LOSSLESS[kind])
    assert not encode_image(data, Encoding()).raw
    assert encode_image(data, Encoding(max_side=SMALL_SIDE)).raw


def test_lossy_images_stay_jpegs_however_small() -> None:
    data = as_jpeg(IMAGES[0], quality=90)
    assert encode_image(data, Encoding()).stream is data
    turned = Image.Exif()
    turned[0x0112] = 6
    for lossy in (
        as_jpeg(IMAGES[0], exif=turned), as_jpeg(np.tile(IMAGES[0], (4, 4, 1))), as_file(IMAGES[0], "WEBP"),
        as_file(np.dstack([IMAGES[0], IMAGES[0][:, :, 0]]), "WEBP"),
    ):  # fmt: skip
        assert not encode_image(lossy, Encoding(max_side=40)).raw


def test_a_transparent_lossless_webp_is_lossless() -> None:
    layer = np.dstack([IMAGES[0], np.full((16, 24), 255, np.uint8)])
    layer[0, 0, 3] = 0
    data = as_file(layer, "WEBP", lossless=True, exif=Image.Exif())
    assert data[12:16] == b"VP8X"
    assert encode_image(data, Encoding()).raw


@pytest.mark.parametrize("kind", LOSSLESS)
def test_above_quality_95_lossless_images_keep_their_colours_at_full_size(kind: str) -> None:
    y, x = np.mgrid[:128, :128]
    checks = np.where(((x + y) % 2)[:, :, None], [200, 40, 60], [40, 60, 200]).astype(np.uint8)
    data = as_file(checks, kind, **LOSSLESS[kind])
    halved, full = (jpeg.read_header(encode_image(data, Encoding(quality=q)).stream).subsampling for q in (95, 96))
    assert (jpeg.SAMPLE_SIZE[halved], jpeg.SAMPLE_SIZE[full]) == ((2, 2), (1, 1))
    best = Image.open(io.BytesIO(encode_image(data, Encoding(quality=100)).stream))
    assert abs(np.asarray(best).astype(int) - checks).mean() < 1
    photograph = encode_image(as_jpeg(checks), Encoding(quality=100, max_side=100))
    assert jpeg.SAMPLE_SIZE[jpeg.read_header(photograph.stream).subsampling] == (2, 2)


def test_smart_takes_pixels_where_they_are_small(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    Image.fromarray(IMAGES[0]).save(tmp_path / "source" / "noise.jpg", quality=95)
    Image.new("RGB", (300, 200), "red").save(tmp_path / "source" / "flat.jpg")
    Image.new("RGB", (300, 200), "red").save(tmp_path / "source" / "flat.png")
    assert convert.main([str(tmp_path / "source"), str(tmp_path / "out"), "--write", "smart"]) == 0
    reader = BetonReader(tmp_path / "out" / "train-00000.beton")
    modes = {int(width): int(mode) for width, mode in zip(reader.width_N, reader.mode_N, strict=True)}
    assert modes == {24: MODE_RAW, 300: MODE_JPG}


def test_smart_threshold() -> None:
    for pixels_HW3 in (*IMAGES, np.zeros((64, 64, 3), np.uint8)):
        plain = encode_image(pixels_HW3, Encoding(write="jpeg"))
        smart = encode_image(pixels_HW3, Encoding(write="smart"))
        assert not plain.raw
        assert smart.raw == (pixels_HW3.nbytes <= SMART_FACTOR * len(plain.stream))
        assert smart.pixels == plain.pixels


def test_gray_and_turned_images_are_stored_as_rgb() -> None:
    gray = encode_image(np.repeat(IMAGES[0][:, :, :1], 3, 2), Encoding(write="raw"))
    assert gray.stream == np.repeat(IMAGES[0][:, :, :1], 3, 2).tobytes()


def as_jpeg(pixels_HW3: np.ndarray, **options: object) -> bytes:
    return as_file(pixels_HW3, "JPEG", **options)


@pytest.mark.parametrize("progressive", [False, True])
def test_unmeasured_images_are_still_checked(progressive: bool) -> None:
    data = as_jpeg(np.tile(IMAGES[0], (8, 8, 1)), progressive=progressive)
    encoded = encode_image(data, Encoding(), measure=False)
    assert encoded.stream is data
    assert encoded.pixels is None
    with pytest.raises(ImageError, match="truncated"):
        encode_image(data[: len(data) - 200], Encoding(), measure=False)


@pytest.mark.parametrize("progressive", [False, True])
def test_without_a_check_only_headers_are_read(progressive: bool) -> None:
    pixels_HW3 = np.tile(IMAGES[0], (8, 8, 1))
    data = as_jpeg(pixels_HW3, quality=95, progressive=progressive)
    damaged = data[: len(data) - 200]
    encoded = encode_image(damaged, Encoding(check="none"), measure=False)
    assert encoded.stream is damaged
    assert (encoded.height, encoded.width) == pixels_HW3.shape[:2]
    unchecked = Encoding(check="none")
    with pytest.raises(ImageError, match="truncated"):
        encode_image(damaged, unchecked)
    for decoded in ({"max_side": 50}, {"write": "raw"}, {"write": "smart"}):
        with pytest.raises(ImageError, match="truncated"):
            encode_image(damaged, unchecked._replace(**decoded), measure=False)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = as_jpeg(pixels_HW3, exif=exif)
    assert not encode_image(turned, Encoding(check="none"), measure=False).passed_through


def test_the_check_is_a_setting_of_the_conversion(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "source").mkdir()
    count = 2 * MEASURED_AT_LEAST  # every second one is measured, and so decoded in any case
    for i in range(count):
        data = as_jpeg(IMAGES[i % 6], comment=f"{i}")
        (tmp_path / "source" / f"{i:03d}.jpg").write_bytes(data[: len(data) - 200])
    arguments = [str(tmp_path / "source"), str(tmp_path / "out"), "--check"]
    assert convert.main([*arguments, "none"]) == 3
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.settings["check"] == "none"
    assert manifest.num_samples("train") == len(manifest.skipped) == count // 2
    assert convert.main([*arguments, "decode"]) == 2
    assert "other settings: check" in capfd.readouterr().err
    assert convert.main([arguments[0], str(tmp_path / "checked")]) == 2
    assert "no image of the train split can be read" in capfd.readouterr().err
