"""Sources that promise what they do not hold, or hold what nobody expects: one line that names the file, and soon."""

import io
import json
import os
import pickle
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.commands import one_line_of

from fasttrain.dataprep import convert
from fasttrain.dataprep.encode import Encoding, encode_samples
from fasttrain.dataprep.sources import kinds
from fasttrain.dataprep.sources.archive import read_range
from fasttrain.dataprep.sources.kinds import open_source
from fasttrain.dataprep.sources.source import Source
from fasttrain.formats.listing import Sample, SourceError
from fasttrain.formats.manifest import Manifest


def picture() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (24, 16), (200, 100, 50)).save(stream, "JPEG")
    return stream.getvalue()


def refusal(source: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """Convert a source that is refused; returns the one line that says why."""
    assert convert.main([str(source), f"{source}-out", "--workers", "1"]) == 2
    line = one_line_of(capfd.readouterr().err)
    assert str(source) in line
    return line


def npy(header: object, content: bytes = b"", version: bytes = b"\1\0") -> bytes:
    """An .npy with a header as it is given, a dictionary or text."""
    text = (header if isinstance(header, str) else repr(header)).encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + content


def plain(shape: tuple, kind: str = "|u1") -> dict[str, object]:
    return {"descr": kind, "fortran_order": False, "shape": shape}


def write_npz(path: Path, method: int = zipfile.ZIP_STORED, **arrays: bytes) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in arrays.items():
            archive.writestr(f"{name}.npy", content)
    return path


IMAGES = npy(plain((2, 8, 8, 3)), bytes(384))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": npy(plain((40_000_000, 0, 3)))}, "images has more rows than the file has bytes"),
        ({"images": npy(plain((5, 0, 14, 3)))}, "images without pixels"),
        ({"images": npy(plain((1 << 40, 8, 8, 3)), bytes(384))}, "another size than its header says"),
        ({"images": npy(plain((2, 8, 8, -3)), bytes(384))}, "a shape that is none"),
        ({"images": npy(plain((2.0, 8, 8, 3)), bytes(384))}, "can't be read"),
        ({"images": npy("{'descr': ('|u1', ")}, "array 'images' can't be read"),
        ({"images": npy("(" * 400)}, "array 'images' can't be read"),
        ({"images": npy("-" * 9000 + "1")}, "array 'images' can't be read"),
        ({"images": npy(plain((2, 8, 8, 3)), bytes(384), b"\7\0")}, "array 'images' can't be read"),
        ({"images": npy(plain((2,), "|O"), bytes(16))}, "an array of objects"),
        ({"images": npy(plain((2,), [("a", "|O")]), bytes(16))}, "an array of objects"),
        ({"images": npy(plain((), "|u1"), bytes(1))}, "a single value"),
        ({"images": b""}, "array 'images' can't be read"),
        ({"images": IMAGES, "labels": npy(plain((), "<i8"), bytes(8))}, "labels is a single value"),
        ({"images": IMAGES, "classes": npy(plain((), "<U3"), bytes(12))}, "classes is a single value"),
        ({"images": IMAGES, "labels": npy(plain((2,), "<U1"), b"\xff\xff\xff\x7f" * 2)}, "what is no character"),
        ({"train_jpeg": npy(plain((9,)), bytes(9))}, "no array 'train_offsets'"),
        ({"train_jpeg": npy(plain((9,)), bytes(9)), "train_offsets": npy(plain((2, 2), "<i8"), bytes(32))}, "no rows"),
        ({"train_jpeg": npy(plain((9,)), bytes(9)), "train_offsets": npy(plain((2,), "<f8"), bytes(16))}, "no rows"),
    ],
)
def test_arrays_that_are_not_what_they_say(
    tmp_path: Path, arrays: dict[str, bytes], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(write_npz(tmp_path / "a.npz", **arrays), capfd)


def test_names_of_classes_that_unpack_to_much_more_than_the_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bomb = npy(plain((4_000_000,), "|S1"), bytes(4_000_000))
    path = write_npz(tmp_path / "a.npz", zipfile.ZIP_DEFLATED, images=IMAGES, classes=bomb)
    assert path.stat().st_size < 10_000
    assert "classes has more rows than the file has bytes" in refusal(path, capfd)


def test_a_compressed_array_may_not_promise_more_than_its_stream_can_hold(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_npz(tmp_path / "a.npz", zipfile.ZIP_DEFLATED, images=npy(plain((2, 8, 8, 3)), os.urandom(384)))
    data, size = path.read_bytes(), len(IMAGES)
    path.write_bytes(data.replace(struct.pack("<I", size), struct.pack("<I", size << 14)))
    assert "another size than its header says" in refusal(path, capfd)


@pytest.mark.parametrize("joined", [False, True])
def test_listing_small_images_takes_little_more_than_their_names(tmp_path: Path, joined: bool) -> None:
    count = 20_000
    pixels = np.zeros(count, np.uint8)
    if joined:
        np.savez(tmp_path / "a.npz", train_jpeg=pixels, train_offsets=np.arange(count + 1))
    else:
        np.savez(tmp_path / "a.npz", images=pixels.reshape(count, 1, 1))
    tracemalloc.start()
    source = open_source(tmp_path / "a.npz")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source.splits["train"]) == count
    assert most < 200 * count


def test_an_array_whose_name_would_fill_the_memory_with_names_of_its_images(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for length, refused in ((255, False), (256, True)):
        path = write_npz(tmp_path / f"{length}.npz", **{f"train{'_' * (length - 11)}images": IMAGES})
        if refused:
            assert "a name of more than 255 characters" in refusal(path, capfd)
        else:
            assert len(open_source(path).splits["train"]) == 2


def test_labels_of_bytes_that_are_no_utf_8(tmp_path: Path) -> None:
    labels = npy(plain((2,), "|S2"), b"a\xff\xe4\xb8")
    source = open_source(write_npz(tmp_path / "a.npz", images=IMAGES, labels=labels))
    assert source.classes == (r"\xe4\xb8", r"a\xff")


FLAGS, VERSION, METHOD = 8, 6, 10  # in an entry of a zip's directory


def changed_directory(path: Path, place: int, value: int) -> Path:
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\1\2")
    data[at + place] = value
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [(FLAGS, 1, "encrypted"), (VERSION, 255, "zip file version 25.5"), (METHOD, 12, "other than deflate")],
)
@pytest.mark.parametrize("kind", ["npz", "zip"])
def test_zips_of_another_kind(
    tmp_path: Path, kind: str, place: int, value: int, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"a.{kind}"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy" if kind == "npz" else "a/1.jpg", IMAGES if kind == "npz" else picture())
        archive.writestr("a/2.jpg", picture())
    changed_directory(path, place, value)
    if kind == "npz" or place == VERSION:
        assert message in refusal(path, capfd)
    else:
        (skipped,) = open_source(path).skipped
        assert message in skipped["reason"]


def test_members_that_share_their_data_are_not_unpacked_again_and_again(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/sound.jpg", picture())
        archive.writestr("a/kernel.jpg", bytes(100_000), zipfile.ZIP_DEFLATED)
        kernel = archive.getinfo("a/kernel.jpg")
        for number in range(50):  # entries of the directory alone, as in the bombs that quote local headers
            copy = zipfile.ZipInfo(f"a/{number}.jpg")
            for name in ("compress_type", "CRC", "compress_size", "file_size", "header_offset"):
                setattr(copy, name, getattr(kernel, name))
            archive.filelist.append(copy)
    source = open_source(path)
    assert {sample.path for sample in source.splits["train"]} == {"a/sound.jpg", "a/49.jpg"}
    assert len(source.skipped) == 50
    assert {skip["reason"] for skip in source.skipped} == {"its data is that of another member, too"}


def test_odd_names_in_a_zip(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("a/1.jpg", "nameless", "a/new\nline.jpg", "a/\x1b[2J.jpg", "a/../2.jpg", "/a/3.jpg"):
            archive.writestr(name, picture())
        archive.getinfo("nameless").filename = ""  # in the directory, which is written last
    source = open_source(path)
    assert "a member without a name" in [skip["reason"] for skip in source.skipped]
    assert {"a/1.jpg", "a/new\nline.jpg", "a/\x1b[2J.jpg", "a/3.jpg"} <= {s.path for s in source.splits["train"]}


def test_a_directory_larger_than_its_zip(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/1.jpg", picture())
    data = bytearray(path.read_bytes())
    end = data.index(b"PK\5\6")
    data[end + 12 : end + 16] = b"\xf0\xff\xff\xff"
    path.write_bytes(data)
    assert "damaged or truncated zip" in refusal(path, capfd)
    start = len(data)  # the same by the fields of 64 bits
    record = b"PK\6\6" + struct.pack("<Q2H2I4Q", 44, 45, 45, 0, 0, 1 << 60, 1 << 60, 1 << 62, 1 << 62)
    locator = b"PK\6\7" + struct.pack("<IQI", 0, start, 1)
    path.write_bytes(bytes(data) + record + locator + b"PK\5\6" + 16 * b"\xff" + bytes(2))
    assert "damaged or truncated zip" in refusal(path, capfd)


def test_a_range_beyond_the_file_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    assert read_range(str(tmp_path / "a"), 3, 4) == b"tent"
    for offset, size in ((0, 1 << 62), (1 << 63, 1), (8, 0), (-1, 2), (4, 4)):
        with pytest.raises(SourceError, match="truncated archive"):
            read_range(str(tmp_path / "a"), offset, size)


def write_cifar(root: Path, labels: object, **meta: object) -> Path:
    root.mkdir()
    rows = np.zeros((3, 3072), np.uint8)
    (root / "data_batch_1").write_bytes(pickle.dumps({b"data": rows, b"labels": labels}, protocol=2))
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": ["ant", "bee"], **meta}))
    return root


def laughs(depth: int) -> list:
    value: list = [0] * 10
    for _ in range(depth):
        value = [value] * 10
    return value


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "the labels are no list"),
        (laughs(12), "a label is list, neither a number nor a name"),
        ([0, 1, 0.5], "a label is float"),
        ([0, 1], "3 images, but 2 labels"),
        ([0, 1, 7], "label 7, but only 2 class names"),
        (np.zeros((3, 2), np.int64), "the labels are no list"),
        (np.zeros(3), "the labels are no list"),
    ],
)
def test_labels_of_a_pickle_that_are_none(
    tmp_path: Path, labels: object, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(write_cifar(tmp_path / "c", labels), capfd)


def test_labels_of_a_pickle_may_be_names_or_missing(tmp_path: Path) -> None:
    source = open_source(write_cifar(tmp_path / "c", ["b", None, b"a"]))
    assert source.classes == ("a", "b")
    assert source.splits["train"].label_N.tolist() == [1, -1, 0]
    assert open_source(write_cifar(tmp_path / "d", [1, None, 0])).splits["train"].label_N.tolist() == [1, -1, 0]


@pytest.mark.parametrize("names", [["ant", ["bee"]], 5, 20 * ["x" * (1 << 16)], laughs(12)])
def test_names_of_a_pickle_that_are_none(tmp_path: Path, names: object, capfd: pytest.CaptureFixture[str]) -> None:
    assert "class names" in refusal(write_cifar(tmp_path / "c", [0, 1, 0], label_names=names), capfd)


def test_an_empty_batch(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "data_batch_1.bin").write_bytes(b"")
    assert "empty or truncated" in refusal(tmp_path / "c", capfd)


def write_parquet(path: Path, **options: object) -> Path:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(exist_ok=True)
    table = pa.table(options.pop("columns", {"image": [picture()] * 3, "label": [0, 1, 0]}), **options)
    pq.write_table(table, path, row_group_size=2)
    return path


def test_tables_of_which_one_has_its_images_elsewhere(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_parquet(tmp_path / "set" / "0.parquet")
    write_parquet(tmp_path / "set" / "1.parquet", columns={"other": [1, 2]})
    assert len(open_source(tmp_path / "set").splits["train"]) == 3
    write_parquet(tmp_path / "set" / "2.parquet", columns={"picture": [picture()], "label": [1]})
    assert "2.parquet: its images are in column 'picture'" in refusal(tmp_path / "set", capfd)


def test_a_table_with_two_columns_of_one_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    columns = [[picture()], [picture()]]
    path = write_parquet(tmp_path / "a.parquet", columns=columns, names=["image", "image"])
    assert "several columns 'image'" in refusal(path, capfd)


def test_row_groups_that_together_have_more_rows_than_bytes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    table = pa.table({"image": pa.nulls(1 << 12, pa.binary())})
    with pq.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
        for _ in range(30):
            writer.write_table(table)
    assert (tmp_path / "a.parquet").stat().st_size > 1 << 12
    assert "more rows than bytes" in refusal(tmp_path / "a.parquet", capfd)


def test_halves_of_characters_in_names_of_classes(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet")
    pq = pytest.importorskip("pyarrow.parquet")
    names = {"info": {"features": {"label": {"names": ["\ud800ant", "bee"]}}}}
    table = pq.read_table(path).replace_schema_metadata({"huggingface": json.dumps(names)})
    pq.write_table(table, path)
    assert convert.main([str(path), str(tmp_path / "out"), "--workers", "1"]) == 0
    assert Manifest.load(tmp_path / "out").classes == ["?ant", "bee"]


def test_a_label_of_json_that_is_nested_too_deeply_costs_no_other_sample(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("1.jpg", picture()), ("1.json", b"[" * 100_000), ("2.jpg", picture()), ("2.cls", b"3")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    source = open_source(tmp_path / "a.tar")
    assert "a.tar/2.jpg" in [sample.path for sample in source.splits["train"]]
    assert source.splits["train"][-1].label >= 0


def test_a_name_without_end_in_a_zip_is_skipped(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("a/1.jpg", f"a/{'x' * 5000}.jpg"):
            archive.writestr(name, picture())
    source = open_source(tmp_path / "a.zip")
    assert [sample.path for sample in source.splits["train"]] == ["a/1.jpg"]
    (skip,) = source.skipped
    assert skip["reason"] == "a name of more than 4096 characters"
    assert len(skip["path"]) == 4096


def test_a_name_without_end_is_skipped(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("a/" * 50_000 + "1.jpg", "x" * 5000 + ".jpg", "a/2.jpg"):
            member = tarfile.TarInfo(name)
            member.size = len(picture())
            tar.addfile(member, io.BytesIO(picture()))
    source = open_source(tmp_path / "a.tar")
    assert [sample.path for sample in source.splits["train"]] == ["a/2.jpg"]
    assert [skip["reason"] for skip in source.skipped] == 2 * ["a name of more than 4096 characters"]
    assert {len(skip["path"]) for skip in source.skipped} == {4096}


@pytest.mark.parametrize("name", ["a.tar", "a.zip", "a.npz", "a.parquet", "set/a.tar", "set/a.parquet",
                                  "set/data_batch_1", "set/data_batch_1.bin"])  # fmt: skip
def test_a_fifo_in_place_of_a_source_is_never_waited_for(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    refusal(path if path.parent == tmp_path else path.parent, capfd)


@pytest.mark.parametrize("name", ["a", "a.tar", "a.npz"])
def test_a_link_to_itself_or_to_a_device_is_no_source(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).symlink_to(tmp_path / name)
    assert "no such folder or file" in refusal(tmp_path / name, capfd)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    refusal(tmp_path / name, capfd)


@pytest.mark.parametrize("name", ["batches.meta", "test_batch"])
def test_a_fifo_beside_sound_batches_is_named(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    root = write_cifar(tmp_path / "c", [0, 1, 0])
    (root / name).unlink(missing_ok=True)
    os.mkfifo(root / name)
    assert f"{name}: not a regular file" in refusal(root, capfd)


def raising(error: BaseException) -> Callable[[Path], Source]:
    def read(path: Path) -> Source:
        raise error

    return read


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("deep"), KeyError("x\ny" * 10_000), zlib.error("x")])
def test_what_no_reader_expects_is_one_short_line(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(kinds.KINDS, "folder", raising(error))
    (tmp_path / "s").mkdir()
    with pytest.raises(type(error)):  # in development it passes through: conftest asks for that
        open_source(tmp_path / "s")
    monkeypatch.setenv("FASTTRAIN_DEBUG", "0")
    assert len(refusal(tmp_path / "s", capfd)) < 1000


def test_ctrl_c_passes_the_boundary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kinds.KINDS, "folder", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        open_source(tmp_path)


def test_what_no_decoder_expects_costs_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reader:
        def read(self, sample: Sample) -> bytes:
            if sample.path == "odd":
                raise RecursionError("deep")
            return picture()

        def size(self, sample: Sample) -> int:
            return 1

    task = [(Sample(name, -1), False) for name in ("first", "odd", "last")]
    monkeypatch.setenv("FASTTRAIN_DEBUG", "0")
    first, odd, last = encode_samples(Reader(), task, Encoding())
    assert odd == "damaged: RecursionError: deep"
    assert first.stream == last.stream == picture()
    monkeypatch.setenv("FASTTRAIN_DEBUG", "1")
    with pytest.raises(RecursionError):
        list(encode_samples(Reader(), task, Encoding()))
