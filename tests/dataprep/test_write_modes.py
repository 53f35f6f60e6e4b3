"""--write raw and smart: pixels in .beton shards, read by the project's loader and by stock FFCV alike."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasttrain.dataprep import convert
from fasttrain.dataprep.encode import SMART_FACTOR, Encoding, encode_image
from fasttrain.dataprep.plan import MEASURED_AT_LEAST
from fasttrain.formats.beton import MODE_JPG, MODE_RAW, BetonReader
from fasttrain.formats.image import ImageError
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
        jpeg = encode_image(pixels_HW3, Encoding(write="jpeg"))
        smart = encode_image(pixels_HW3, Encoding(write="smart"))
        assert not jpeg.raw
        assert smart.raw == (pixels_HW3.nbytes <= SMART_FACTOR * len(jpeg.stream))
        assert smart.pixels == jpeg.pixels


def test_gray_and_turned_images_are_stored_as_rgb() -> None:
    gray = encode_image(np.repeat(IMAGES[0][:, :, :1], 3, 2), Encoding(write="raw"))
    assert gray.stream == np.repeat(IMAGES[0][:, :, :1], 3, 2).tobytes()


def as_jpeg(pixels_HW3: np.ndarray, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels_HW3).save(stream, "JPEG", **options)
    return stream.getvalue()


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
