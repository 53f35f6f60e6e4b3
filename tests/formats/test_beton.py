"""fasttrain.dataprep.beton: stock FFCV reads what is written here, and no damaged file is accepted."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasttrain.formats import beton
from fasttrain.formats.beton import BetonError, BetonReader, BetonWriter

SIDE = 16


def numbered_jpeg(index: int) -> bytes:
    """A flat image whose colour tells its number: red = index % 16, green = index // 16, both times 16."""
    stream = io.BytesIO()
    colour = (index % 16 * 16, index // 16 * 16, 128)
    Image.new("RGB", (SIDE, SIDE), colour).save(stream, "JPEG", quality=95, subsampling=0)
    return stream.getvalue()


def number_of(pixels_HW3: np.ndarray) -> int:
    red, green, _ = (pixels_HW3.reshape(-1, 3).mean(0) / 16).round().astype(int)
    return int(green * 16 + red)


def write(path: Path, num_samples: int, max_samples: int | None = None, padding: int = 0) -> Path:
    with BetonWriter(path, max_samples or num_samples) as writer:
        for i in range(num_samples):
            writer.write(numbered_jpeg(i) + bytes(padding), SIDE, SIDE, 1000 - i)  # bytes after the end are legal
    return path


def test_layout_is_that_of_ffcv() -> None:
    types = pytest.importorskip("ffcv.types")
    fields = pytest.importorskip("ffcv.fields")
    assert beton.HEADER.itemsize == types.HeaderType.itemsize
    assert [beton.HEADER.fields[n][1] for n in beton.HEADER.names] == [
        types.HeaderType.fields[n][1] for n in types.HeaderType.names
    ]
    assert beton.FIELD.itemsize == types.FieldDescType.itemsize
    assert beton.ALLOCATION.itemsize == types.ALLOC_TABLE_TYPE.itemsize
    theirs = types.get_metadata_type([fields.RGBImageField(), fields.IntField()])
    assert beton.SAMPLE.itemsize == theirs.itemsize
    assert beton.SAMPLE.fields["label"][1] == theirs.fields["f1"][1]
    assert beton.VERSION == types.CURRENT_VERSION


def test_read_back(tmp_path: Path) -> None:
    reader = BetonReader(write(tmp_path / "a.beton", 20, max_samples=50))
    assert reader.num_samples == 20
    assert reader.label_N.tolist() == list(range(1000, 980, -1))
    assert reader.label_N.dtype == np.int64
    assert (reader.height_N == SIDE).all()
    assert (reader.width_N == SIDE).all()
    assert not reader.mode_N.any()
    assert reader.pointer_N.dtype == reader.size_N.dtype == np.uint64
    for i in range(20):
        start, size = int(reader.pointer_N[i]), int(reader.size_N[i])
        assert reader.data[start : start + size].tobytes() == numbered_jpeg(i)
    assert not reader.data.flags.writeable


def test_no_sample_straddles_a_page(tmp_path: Path) -> None:
    reader = BetonReader(write(tmp_path / "a.beton", 9, padding=3 << 20))
    first, last = (p // beton.MIN_PAGE_SIZE for p in (reader.pointer_N, reader.pointer_N + reader.size_N - 1))
    assert (first == last).all()
    assert len(np.unique(first)) == 5
    assert (np.diff(reader.pointer_N.astype(np.int64)) > 0).all()


def test_pages_grow_with_the_largest_sample(tmp_path: Path) -> None:
    with BetonWriter(tmp_path / "a.beton", 3) as writer:
        for size in (100, 20 << 20, 100):
            writer.write(bytes(size), SIDE, SIDE, 0)
    reader = BetonReader(tmp_path / "a.beton")
    page_size = int(np.fromfile(reader.path, beton.HEADER, 1)["page_size"][0])
    assert page_size == 32 << 20
    assert (reader.pointer_N // page_size == (reader.pointer_N + reader.size_N - 1) // page_size).all()


@pytest.mark.parametrize("os_cache", [True, False])
def test_stock_ffcv_loader_reads_it(tmp_path: Path, os_cache: bool) -> None:
    loader = pytest.importorskip("ffcv.loader")
    decoders = pytest.importorskip("ffcv.fields.decoders")
    # Several pages, and fewer samples than announced.
    path = write(tmp_path / "a.beton", 40, max_samples=64, padding=1 << 20)
    pipelines = {"image": [decoders.SimpleRGBImageDecoder()], "label": [decoders.IntDecoder()]}
    random = loader.OrderOption.RANDOM
    batches = loader.Loader(str(path), 8, num_workers=1, os_cache=os_cache, order=random, pipelines=pipelines)
    seen = []
    for images_B, label_B in batches:
        numbers = [number_of(image) for image in np.asarray(images_B)]
        assert np.asarray(label_B).reshape(-1).tolist() == [1000 - number for number in numbers]
        seen += numbers
    assert sorted(seen) == list(range(40))


def test_reads_what_ffcv_wrote(tmp_path: Path) -> None:
    writer = pytest.importorskip("ffcv.writer")
    fields = pytest.importorskip("ffcv.fields")
    pixels = np.random.default_rng(0).integers(0, 256, (30, 8, 12, 3)).astype(np.uint8)
    path = tmp_path / "theirs.beton"
    their_fields = {"image": fields.RGBImageField(write_mode="raw"), "label": fields.IntField()}
    writer.DatasetWriter(str(path), their_fields, num_workers=1).from_indexed_dataset(
        [(image, i) for i, image in enumerate(pixels)], chunksize=5
    )
    reader = BetonReader(path)
    assert (reader.mode_N == beton.MODE_RAW).all()
    assert reader.label_N.tolist() == list(range(30))
    for i in range(30):
        start = int(reader.pointer_N[i])
        assert reader.data[start : start + int(reader.size_N[i])].tobytes() == pixels[i].tobytes()


def test_same_samples_same_bytes(tmp_path: Path) -> None:
    assert write(tmp_path / "a.beton", 7).read_bytes() == write(tmp_path / "b.beton", 7).read_bytes()


def write_and_fail(path: Path) -> None:
    with BetonWriter(path, 2) as writer:
        writer.write(b"x", 1, 1, 0)
        raise ZeroDivisionError


def test_nothing_is_left_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        write_and_fail(tmp_path / "a.beton")
    with pytest.raises(ValueError, match="more than the 3 samples announced"):
        write(tmp_path / "a.beton", 4, max_samples=3)
    with BetonWriter(tmp_path / "a.beton", 2):
        pass  # no sample, no file
    assert not list(tmp_path.iterdir())


HEADER_SIZE, FIELDS_END = 24, 24 + 2 * 1041


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, np.uint16(1), "version 1"),
        (2, np.uint16(3), "3 fields"),
        (8, np.uint64(2**60), "the metadata would end"),
        (8, np.uint64(9), "after the allocation table|inside the metadata|not one entry"),
        (8, np.uint64(11), "inside the metadata|would end"),
        (16, np.uint64(0), "unfinished"),
        (16, np.uint64(100), "inside the metadata"),
        (16, np.uint64(2**63), "would end"),
        (HEADER_SIZE, np.uint8(5), "fields"),
        (HEADER_SIZE, np.uint8(7), "unknown type"),
        (HEADER_SIZE + 1, np.uint8(200), "no readable name"),
        (FIELDS_END, np.uint8(7), "unknown image mode"),
        (FIELDS_END, np.uint8(1), "raw image of the wrong size"),
        (FIELDS_END + 1, np.uint16(0), "without pixels"),
        (FIELDS_END + 5, np.uint64(2**63), "disagree"),
        (-24, np.uint64(3), "twice"),
        (-24, np.uint64(2**40), "do not exist"),
        (-16, np.uint64(2**63), "disagree"),
        (-8, np.uint64(2**64 - 8), "outside the file"),
        (-8, np.uint64(2**20), "outside the file"),
    ],
)
def test_damage_is_found(tmp_path: Path, offset: int, value: np.generic, message: str) -> None:
    path = write(tmp_path / "a.beton", 10)
    content = bytearray(path.read_bytes())
    start = offset % len(content)
    content[start : start + value.nbytes] = value.tobytes()
    path.write_bytes(content)
    with pytest.raises(BetonError, match=message) as error:
        BetonReader(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("num_samples", [1, 2])
def test_what_was_checked_stays_when_the_file_changes(tmp_path: Path, num_samples: int) -> None:
    """A place that leads out of the file, written after the check, would be read."""
    path = write(tmp_path / "shard.beton", num_samples)
    reader = BetonReader(path)
    columns = "mode_N", "height_N", "width_N", "pointer_N", "size_N", "label_N"
    before = {name: getattr(reader, name).tolist() for name in columns}
    with open(path, "r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert reader.data[-1] == 0xFF
    assert {name: getattr(reader, name).tolist() for name in columns} == before


def test_cut_files_are_found(tmp_path: Path) -> None:
    content = write(tmp_path / "a.beton", 10).read_bytes()
    for length in (
        0,
        10,
        24,
        1000,
        FIELDS_END,
        FIELDS_END + 24,
        len(content) // 2,
        len(content) - 24,
        len(content) - 1,
    ):
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(BetonError):
            BetonReader(tmp_path / "cut")
    (tmp_path / "cut").write_bytes(content + bytes(24))
    with pytest.raises(BetonError, match="after the allocation table"):
        BetonReader(tmp_path / "cut")
    with pytest.raises(BetonError, match="No such file"):
        BetonReader(tmp_path / "missing")
