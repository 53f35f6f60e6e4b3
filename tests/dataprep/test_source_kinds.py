"""Every kind of source: the same images come out of each; damage, links and bombs do not get in."""

import codecs
import io
import json
import os
import pickle
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasttrain.dataprep import convert
from fasttrain.dataprep.order import shuffled_splits
from fasttrain.dataprep.sources import archive as archive_source
from fasttrain.dataprep.sources import cifar, labels, npz, parquet
from fasttrain.dataprep.sources.files import expand
from fasttrain.dataprep.sources.folder import scan_folder
from fasttrain.dataprep.sources.kinds import (
    fingerprint,
    open_source,
    recognise,
)
from fasttrain.dataprep.sources.source import Source
from fasttrain.formats import jpeg
from fasttrain.formats.beton import BetonReader
from fasttrain.formats.listing import Listing, Sample, SourceError, listing_digests
from fasttrain.formats.manifest import Manifest


def picture(number: int, kind: str = "JPEG") -> bytes:
    """A flat image: red = 10 times its number."""
    stream = io.BytesIO()
    Image.new("RGB", (24, 16), (10 * number, 100, 50)).save(stream, kind)
    return stream.getvalue()


FILES = {f"{split}/{name}/{i}.jpg": picture(4 * c + i) for split in ("train", "val")
         for c, name in enumerate(("ant", "bee")) for i in range(4)}  # fmt: skip


def write_folder(root: Path) -> Path:
    for name, data in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for number, (name, data) in enumerate(members.items()):
            archive.writestr(name, data, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[number % 2])
    return path


def contents(source: Source) -> dict[str, set[tuple[bytes, str]]]:
    def name(label: int) -> str:
        return source.classes[label] if label >= 0 else ""

    return {split: {(bytes(source.reader.read(s)), name(s.label)) for s in samples}
            for split, samples in source.splits.items()}  # fmt: skip


EXPECTED = {split: {(data, name.split("/")[1]) for name, data in FILES.items() if name.startswith(split)}
            for split in ("train", "val")}  # fmt: skip


@pytest.mark.parametrize("top", ["", "./", "photos/", "/photos/"])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_archives_have_the_layouts_of_folders(tmp_path: Path, kind: str, top: str) -> None:
    write = write_tar if kind == "tar" else write_zip
    extra = {"__MACOSX/._a.jpg": b"x", f"{top}train/ant/notes.txt": b"x", f"{top}train/../../evil.jpg": b"x"}
    path = write(tmp_path / f"a.{kind}", {top + name: data for name, data in FILES.items()} | extra)
    source = open_source(path)
    assert recognise(path) == kind
    assert contents(source) == contents(scan_folder(write_folder(tmp_path / "folder"))) == EXPECTED
    assert not source.skipped
    assert pickle.loads(pickle.dumps(source.reader)) == source.reader
    flat = open_source(write(tmp_path / f"flat.{kind}", {f"photos/{i}.jpg": picture(i) for i in range(3)}))
    assert flat.classes == ()
    assert len(flat.splits["train"]) == 3


def test_convert_from_a_zip(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", FILES)
    assert convert.main([str(path), str(tmp_path / "out"), "--workers", "1"]) == 0
    assert convert.main([str(write_folder(tmp_path / "f")), str(tmp_path / "out2"), "--workers", "1"]) == 0
    assert Manifest.load(tmp_path / "out").class_counts == {"train": [4, 4], "val": [4, 4]}
    for name in ("train-00000.beton", "val-00000.beton"):
        assert len((tmp_path / "out" / name).read_bytes()) == len((tmp_path / "out2" / name).read_bytes())
    assert {p.name for p in tmp_path.iterdir()} == {"a.zip", "out", "out2", "f"}


def test_links_are_reported_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(picture(1))
    path = write_tar(tmp_path / "a.tar", {"a/1.jpg": picture(1)})
    with tarfile.open(path, "a") as tar:
        for name, kind, target in (("a/2.jpg", tarfile.SYMTYPE, str(tmp_path / "secret.jpg")),
                                   ("a/3.jpg", tarfile.LNKTYPE, "a/1.jpg")):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    source = open_source(path)
    assert [skip["path"] for skip in source.skipped] == ["a/2.jpg", "a/3.jpg"]
    assert {skip["reason"] for skip in source.skipped} == {"a link, which is not followed"}
    link = zipfile.ZipInfo("a/2.jpg")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a/1.jpg", picture(1))
        archive.writestr(link, str(tmp_path / "secret.jpg"))
    assert open_source(tmp_path / "a.zip").skipped == [{"path": "a/2.jpg", "reason": "a link, which is not followed"}]
    assert convert.main([str(path), str(tmp_path / "out"), "--workers", "1"]) == convert.EXIT_SKIPPED
    assert len(Manifest.load(tmp_path / "out").skipped) == 2


@pytest.mark.parametrize("cut", [-1024, -11000, 2500])
def test_a_truncated_tar_gives_what_is_readable(tmp_path: Path, cut: int) -> None:
    path = write_tar(tmp_path / "a.tar", {f"a/{i}.jpg": picture(i) for i in range(8)})
    whole = path.read_bytes()
    end = whole.rindex(b"\xff\xd9")
    path.write_bytes(whole[:cut] if cut > 0 else whole[: end + 512 + cut if cut < -2000 else end + 2])
    source = open_source(path)
    assert 1 <= len(source.splits["train"]) <= 8
    assert "truncated" in source.skipped[-1]["reason"]
    for sample in source.splits["train"]:
        jpeg.decode(source.reader.read(sample))


@pytest.mark.parametrize("kind", ["zip", "parquet", "npz", "tar"])
def test_damaged_files_give_one_line(tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    good = write_zip(tmp_path / "good.zip", FILES).read_bytes()
    for content in (b"", b"text" * 1000, good[: len(good) // 2]):
        (tmp_path / f"a.{kind}").write_bytes(content)
        assert convert.main([str(tmp_path / f"a.{kind}"), str(tmp_path / "out")]) == 2
        error = capfd.readouterr().err
        assert len(error.splitlines()) == 1, error
        assert f"a.{kind}" in error


def test_bombs_are_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_source, "MAX_FILE_BYTES", 1 << 20)
    bomb = bytes(2 << 20)
    path = write_zip(tmp_path / "a.zip", {"a/1.jpg": picture(1), "a/2.jpg": bomb})
    assert open_source(path).skipped == [{"path": "a/2.jpg", "reason": "larger than 1048576 bytes"}]
    path = write_tar(tmp_path / "a.tar", {"a/1.jpg": picture(1), "a/2.jpg": bomb})
    assert open_source(path).skipped == [{"path": "a/2.jpg", "reason": "larger than 1048576 bytes"}]
    # A directory that lies about the size: no more than that is unpacked, and the sample is refused.
    monkeypatch.setattr(archive_source, "MAX_FILE_BYTES", 1 << 30)
    path = write_zip(tmp_path / "b.zip", {"a/1.jpg": picture(1), "a/2.jpg": bomb})
    path.write_bytes(path.read_bytes().replace(len(bomb).to_bytes(4, "little"), (100).to_bytes(4, "little")))
    source = open_source(path)
    with pytest.raises(SourceError, match="damaged archive"):
        source.reader.read(source.splits["train"][1])
    monkeypatch.setattr(npz, "MAX_UNPACKED_BYTES", 1000)
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((50, 8, 8, 3), np.uint8))
    with pytest.raises(SourceError, match="compressed and larger than 1000 bytes"):
        open_source(tmp_path / "a.npz")


def test_a_compressed_tar_is_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"), io.BytesIO())
    with pytest.raises(SourceError, match="compressed with gzip: decompress it first"):
        open_source(tmp_path / "a.tar")


def samples_tar(path: Path, label: str, first: int, count: int = 4) -> Path:
    names = ("ant", "bee")
    members = {}
    for i in range(first, first + count):
        members[f"set/{i:04d}.{'png' if i % 3 == 2 else 'jpg'}"] = picture(i, "PNG" if i % 3 == 2 else "JPEG")
        name = names[i % 2]
        content = {"cls": str(i % 2), "text": name, "json": json.dumps({"caption": "x", "label": name})}[label]
        members[f"set/{i:04d}.{'json' if label == 'json' else 'cls'}"] = content.encode()
    return write_tar(path, members)


@pytest.mark.parametrize("label", ["cls", "text", "json"])
def test_webdataset(tmp_path: Path, label: str) -> None:
    for i in range(3):
        samples_tar(tmp_path / f"set-train-{i:03d}.tar", label, 4 * i)
    samples_tar(tmp_path / "set-val-000.tar", label, 12)
    source = open_source(tmp_path)
    assert source.classes == (("0", "1") if label == "cls" else ("ant", "bee"))
    assert {split: len(samples) for split, samples in source.splits.items()} == {"train": 12, "val": 4}
    for i, sample in enumerate(source.splits["train"]):
        assert sample.label == i % 2
        assert source.reader.read(sample) == picture(i, "PNG" if i % 3 == 2 else "JPEG")
    assert recognise(tmp_path / "set-train-000.tar") == "webdataset"
    for pattern in ("set-train-{000..001}.tar", "set-train-00[01].tar", "set-train-{000,001}.tar"):
        assert len(open_source(tmp_path / pattern).splits["train"]) == 8


def test_labels_of_a_webdataset_that_are_none_cost_no_image(tmp_path: Path) -> None:
    good = {"1.jpg": picture(1), "1.json": b'{"cls": 0}'}
    bad = {"2.json": b"{", "3.json": b'{"label": 0.5}', "4.json": b'{"label": [0]}', "5.json": b"[1]",
           "6.cls": b"\xff\xfe", "7.json": b"[" * 100_000}  # fmt: skip
    images = {f"{name.partition('.')[0]}.jpg": picture(2) for name in bad}
    members = {
        key: data for name in bad for key, data in ((name, bad[name]), (name[:2] + "jpg", images[name[:2] + "jpg"]))
    }
    source = open_source(write_tar(tmp_path / "a.tar", {**good, **members}))
    assert source.splits["train"].label_N.tolist() == [0] + 6 * [-1]
    (note,) = source.notes
    assert note.startswith("6 labels are no classes, so their images have none; the first is of a.tar/2.jpg: ")
    assert not source.skipped
    unlabelled = open_source(write_tar(tmp_path / "b.tar", members), "webdataset")
    assert unlabelled.classes == ()
    assert len(unlabelled.splits["train"]) == len(unlabelled.splits["train"].label_N) == 6
    whole = {
        **good,
        "2.jpg": picture(2),
        "2.json": b'{"label": 1.0}',
        "3.jpg": picture(3),
        "3.json": b'{"label": null}',
        "4.jpg": picture(3),
        "4.json": b'{"label": true}',
    }
    assert open_source(write_tar(tmp_path / "c.tar", whole)).splits["train"].label_N.tolist() == [0, 1, -1, 1]


def test_expand() -> None:
    assert expand("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand("{a,b}/{1..2}") == ["a/1", "a/2", "b/1", "b/2"]
    assert expand("plain.tar") == ["plain.tar"]


@pytest.mark.parametrize("layout", ["huggingface", "binary"])
def test_parquet(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    root = tmp_path / "set"
    (root / "data").mkdir(parents=True)
    for name, first, count in (("train-00000-of-00002", 0, 7), ("train-00001-of-00002", 7, 5), ("test-00000", 12, 4)):
        data = [picture(i) for i in range(first, first + count)]
        images = [{"bytes": d, "path": "x.jpg"} for d in data] if layout == "huggingface" else data
        table = pa.table({"image": images, "label": [i % 2 for i in range(first, first + count)]})
        if layout == "huggingface":
            names = {"info": {"features": {"label": {"names": ["ant", "bee"], "_type": "ClassLabel"}}}}
            table = table.replace_schema_metadata({"huggingface": json.dumps(names)})
        pq.write_table(table, root / "data" / f"{name}.parquet", row_group_size=3)
    source = open_source(root)
    assert source.classes == (("ant", "bee") if layout == "huggingface" else ("0", "1"))
    assert {split: len(samples) for split, samples in source.splits.items()} == {"train": 12, "val": 4}
    assert [s.label for s in source.splits["train"]] == [i % 2 for i in range(12)]
    assert [source.reader.read(s) for s in source.splits["train"]] == [picture(i) for i in range(12)]
    assert convert.main([str(root), str(tmp_path / "out"), "--workers", "2"]) == 0
    assert Manifest.load(tmp_path / "out").class_counts == {"train": [6, 6], "val": [2, 2]}
    # Where the cache holds two groups, each group is read within one window of the order.
    monkeypatch.setattr("fasttrain.dataprep.order.CACHE_BYTES", 4 * int(source.groups["train"].bytes_G[0]) + 8)
    order = shuffled_splits(source, 0.0, 1)["train"]
    assert sorted(s.place for s in order) == [s.place for s in source.splits["train"]]
    groups = [s.place[:2] for s in order]
    spans = [len(groups) - groups[::-1].index(g) - groups.index(g) for g in set(groups)]
    assert max(spans) <= 9
    assert groups != sorted(groups)


PARQUET_LABELS = {
    "int64": ([1, None, 0, 1], ("0", "1"), [1, -1, 0, 1]),
    "uint8": ([1, None, 0, 1], ("0", "1"), [1, -1, 0, 1]),
    "uint64": ([1, None, 0, 1], ("0", "1"), [1, -1, 0, 1]),
    "float": ([1.0, None, 0.0, 1.0], ("0", "1"), [1, -1, 0, 1]),
    "halffloat": ([1.0, None, 0.0, 1.0], ("0", "1"), [1, -1, 0, 1]),
    "bool": ([True, None, False, True], ("0", "1"), [1, -1, 0, 1]),
    "string": (["b", None, "a", "b"], ("a", "b"), [1, -1, 0, 1]),
    "large_string": (["b", None, "a", "b"], ("a", "b"), [1, -1, 0, 1]),
    "null": ([None] * 4, (), [-1] * 4),
}


@pytest.mark.parametrize("categorical", [False, True])
@pytest.mark.parametrize("kind", PARQUET_LABELS)
def test_parquet_labels(tmp_path: Path, kind: str, categorical: bool) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    values, classes, expected = PARQUET_LABELS[kind]
    column = pa.array(
        values, getattr(pa, {"bool": "bool_", "halffloat": "float16", "float": "float32"}.get(kind, kind))()
    )
    if categorical and kind in ("halffloat", "null"):
        pytest.skip("no such dictionary")
    table = pa.table(
        {"image": [picture(i) for i in range(4)], "label": column.dictionary_encode() if categorical else column}
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    source = open_source(tmp_path / "a.parquet")
    assert source.classes == classes
    assert source.splits["train"].label_N.tolist() == expected


def test_parquet_categories_of_several_files(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    for name, codes, known in (
        ("train-0", [1, 0, None], ["bee", "cat"]),
        ("train-1", [0], ["ant"]),
        ("val-0", [1], ["cat", "ant"]),
    ):
        column = pa.DictionaryArray.from_arrays(pa.array(codes, pa.int8()), known)
        pq.write_table(pa.table({"image": [picture(1)] * len(codes), "cls": column}), tmp_path / f"{name}.parquet")
    source = open_source(tmp_path)
    assert source.classes == ("ant", "bee", "cat")
    assert {s: group.label_N.tolist() for s, group in source.splits.items()} == {"train": [2, 1, -1, 0], "val": [0]}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.5, 1.0], "0.5 is no whole number"),
        ([float("nan"), 1.0], "nan is no whole number"),
        ([[1, 2], [3]], r"it holds list<\w+: int64>, neither whole numbers nor text"),
        ([b"\xff", b"b"], r"b'\\xff' is no text"),
        (np.array([1 << 63, 0], np.uint64), "not in range"),
    ],
)
def test_parquet_labels_that_are_none(
    tmp_path: Path, values: list | np.ndarray, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"image": [picture(1)] * 2, "label": values}), tmp_path / "a.parquet")
    assert convert.main([str(tmp_path / "a.parquet"), str(tmp_path / "named"), "--labels", "label"]) == 2
    (error,) = capfd.readouterr().err.splitlines()
    assert re.search(f"column 'label' holds no classes: .*{message}", error)
    assert convert.main([str(tmp_path / "a.parquet"), str(tmp_path / "out")]) == 0
    assert re.search(f"^note: no labels: column 'label' holds no classes: .*{message}", capfd.readouterr().err)
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.num_samples("train") == 2
    assert manifest.classes == []
    assert len(manifest.notes) == 1


def test_parquet_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="no column of images"):
        open_source(tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [picture(1), None], "cls": ["b", "a"]}), tmp_path / "b.parquet")
    source = open_source(tmp_path / "b.parquet")
    assert source.classes == ("a", "b")
    with pytest.raises(SourceError, match="no image bytes"):
        source.reader.read(source.splits["train"][1])
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 10)
    pq.write_table(pa.table({"image": [picture(1), picture(2)]}), tmp_path / "c.parquet")
    source = open_source(tmp_path / "c.parquet")
    with pytest.raises(SourceError, match="row group 0 takes more than 10 bytes"):
        source.reader.read(source.splits["train"][0])


@pytest.mark.parametrize("layout", ["huggingface", "binary"])
def test_rows_that_share_a_value_are_no_bomb(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    image = pa.DictionaryArray.from_arrays(np.zeros(800, np.int32), pa.array([os.urandom(1 << 20)]))
    if layout == "huggingface":
        image = pa.StructArray.from_arrays([image, pa.nulls(800, pa.string())], ["bytes", "path"])
    label = pa.DictionaryArray.from_arrays(np.zeros(800, np.int32), ["long" * (1 << 18)])
    table = pa.table({"image": image, "label": label})
    pq.write_table(table, tmp_path / "a.parquet", store_schema=False)  # without, it is read as a table of plain bytes
    assert (tmp_path / "a.parquet").stat().st_size < 3 << 20
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 32 << 20)
    before = pa.default_memory_pool().max_memory()
    source = open_source(tmp_path / "a.parquet")
    assert len(source.classes[0]) == 1 << 20
    held = pa.total_allocated_bytes()
    for sample in source.splits["train"][:3]:
        with pytest.raises(SourceError, match="row group 0 takes more than 33554432 bytes in memory"):
            source.reader.read(sample)
        monkeypatch.setattr(parquet, "_decoded", None)  # the others know without decoding again
    assert pa.default_memory_pool().max_memory() < before + (64 << 20)
    assert pa.total_allocated_bytes() < held + (1 << 20)  # the reason alone is kept, not what was decoded


def test_a_table_of_more_rows_than_bytes(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"image": pa.nulls(1 << 16, pa.binary())}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="more rows than bytes"):
        open_source(tmp_path / "a.parquet")


PIXELS = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3)).astype(np.uint8)
ROWS = PIXELS.transpose(0, 3, 1, 2).reshape(6, -1)


def write_cifar(root: Path, kind: str) -> Path:
    root.mkdir(parents=True)
    label = np.array([0, 1, 2, 0, 1, 2], np.uint8)
    names = ["ant", "bee", "cat"]
    if kind == "10 python":
        for name in ("data_batch_1", "data_batch_2", "test_batch"):
            (root / name).write_bytes(pickle.dumps({b"data": ROWS, b"labels": label.tolist()}, protocol=2))
        (root / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    elif kind == "100 python":
        for name in ("train", "test"):
            (root / name).write_bytes(pickle.dumps({"data": ROWS, "fine_labels": label.tolist(), "coarse_labels": [0]}))
        (root / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    elif kind == "10 binary":
        for name in ("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin"):
            (root / name).write_bytes(np.hstack([label[:, None], ROWS]).tobytes())
        (root / "batches.meta.txt").write_text("\n".join(names) + "\n\n")
    else:
        for name in ("train.bin", "test.bin"):
            (root / name).write_bytes(np.hstack([label[:, None] * 0 + 9, label[:, None], ROWS]).tobytes())
        (root / "fine_label_names.txt").write_text("\n".join(names))
    return root


@pytest.mark.parametrize("kind", ["10 python", "100 python", "10 binary", "100 binary"])
def test_cifar(tmp_path: Path, kind: str) -> None:
    root = write_cifar(tmp_path / "source" / "cifar-batches", kind)
    source = open_source(root.parent)
    assert recognise(root) == "cifar"
    assert source.classes == ("ant", "bee", "cat")
    assert len(source.splits["train"]) == (12 if "10 " in kind else 6)
    for i, sample in enumerate(source.splits["val"]):
        np.testing.assert_array_equal(source.reader.read(sample), PIXELS[i])
        assert sample.label == i % 3
    assert convert.main([str(root), str(tmp_path / "out"), "--write", "raw", "--workers", "2"]) == 0
    reader = BetonReader(tmp_path / "out" / "val-00000.beton")
    stored = {reader.data[int(p) : int(p) + 3072].tobytes() for p in reader.pointer_N}
    assert stored == {image.tobytes() for image in PIXELS}


class Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("touch evil",)


def test_a_pickle_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_cifar(tmp_path / "c", "10 python")
    for content in (Evil(), {b"data": ROWS, b"labels": Evil()}):
        (tmp_path / "c" / "data_batch_1").write_bytes(pickle.dumps(content))
        with pytest.raises(SourceError, match="which no array needs: not loaded"):
            open_source(tmp_path / "c")
    (tmp_path / "c" / "data_batch_1").write_bytes(b"\x80\x04junk")
    with pytest.raises(SourceError, match="damaged pickle"):
        open_source(tmp_path / "c")
    assert not (tmp_path / "evil").exists()


class Call:
    """Pickled as a call of a function with these arguments."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def doubled(times: int) -> object:
    return Call(codecs.encode, doubled(times - 1) if times else b"text", "hex")


TEXT = "x" * 1000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (doubled(20), "encodes by another codec than latin1"),
        ([Call(codecs.encode, TEXT, "latin1") for _ in range(100)], "unpacks to much more than its size"),
        (Call(np.ndarray, (1 << 30,)), "calls what no array needs"),
        (Call(np.int64(1).__reduce__()[0], np.dtype("V100000000"), b"x"), "other than plain numbers"),
    ],
)
def test_a_pickle_is_no_bomb(tmp_path: Path, content: object, message: str) -> None:
    (tmp_path / "a").write_bytes(pickle.dumps({"data": content}, protocol=2))
    with pytest.raises(SourceError, match=message):
        cifar.load_pickle(str(tmp_path / "a"))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickled_arrays(tmp_path: Path, protocol: int) -> None:
    content = {"data": ROWS, "labels": [np.int64(3), np.uint8(4), 5], "offsets": np.arange(3.0, dtype=">f8")}
    (tmp_path / "a").write_bytes(pickle.dumps(content, protocol))
    loaded = cifar.load_pickle(str(tmp_path / "a"))
    np.testing.assert_array_equal(loaded["data"], ROWS)
    assert loaded["labels"] == [3, 4, 5]
    assert loaded["offsets"].tolist() == [0, 1, 2]


def test_pickled_names_that_are_no_text_stay_apart(tmp_path: Path) -> None:
    content = {"data": np.concatenate([ROWS[:1]] * 3), "labels": [b"\xfe", b"\xff", b"a"]}
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(content, protocol=2))
    assert open_source(tmp_path).classes == ("\\xfe", "\\xff", "a")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path: Path, save: Callable[..., None]) -> None:
    label = np.array([[0], [1], [2], [0], [1], [2]])
    save(tmp_path / "medical.npz", train_images=PIXELS, train_labels=label, val_images=PIXELS[:, :, :, 0],
         val_labels=label, test_images=PIXELS, test_labels=label)  # fmt: skip
    source = open_source(tmp_path / "medical.npz")
    assert source.classes == ("0", "1", "2")
    for i, sample in enumerate(source.splits["train"]):
        np.testing.assert_array_equal(source.reader.read(sample), PIXELS[i])
        np.testing.assert_array_equal(source.reader.read(source.splits["val"][i])[..., 1], PIXELS[i, :, :, 0])
        assert sample.label == i % 3
    streams = [picture(i) for i in range(5)]
    ends = np.cumsum([0, *map(len, streams)])
    joined = np.frombuffer(b"".join(streams), np.uint8)
    save(tmp_path / "jpegs.npz", train_jpeg=joined, train_offsets=ends, train_labels=np.arange(5, dtype=np.uint8) % 2,
         classes=np.array(["ant", "bee"]))  # fmt: skip
    source = open_source(tmp_path / "jpegs.npz")
    assert source.classes == ("ant", "bee")
    assert [source.reader.read(sample) for sample in source.splits["train"]] == streams
    save(tmp_path / "plain.npz", images=PIXELS)
    assert open_source(tmp_path / "plain.npz").classes == ()
    save(tmp_path / "gray.npz", images=PIXELS[..., :1])
    gray = open_source(tmp_path / "gray.npz")
    np.testing.assert_array_equal(gray.reader.read(gray.splits["train"][1]), np.repeat(PIXELS[1, :, :, :1], 3, 2))
    save(tmp_path / "keras.npz", x_train=PIXELS, y_train=label, x_test=PIXELS, y_test=label)
    assert set(open_source(tmp_path / "keras.npz").splits) == {"train", "val"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"numbers": np.zeros(3)}, "no images"),
        ({"images": np.zeros((2, 8, 8, 3))}, "float64"),
        ({"images": np.zeros((2, 8, 8, 3), np.uint8), "labels": np.zeros(3)}, "2 images, but 3 labels"),
        ({"images": np.array([Evil()], object)}, "array of objects"),
        ({"jpeg": np.zeros(3, np.uint8), "offsets": np.array([0, 9])}, "no images|do not match"),
    ],
)
def test_npz_errors(tmp_path: Path, content: dict, message: str) -> None:
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(SourceError, match=message):
        open_source(tmp_path / "a.npz")


def test_number_labels() -> None:
    number, of = labels.number_labels, labels.Labels

    def each(found: labels.Each) -> list[int]:
        return np.concatenate(list(found)).tolist()

    assert number({"train": of(["3", 1, None])})[0] == ("0", "1", "2", "3")
    assert each(number({"train": of([1 << 40, 7, -1])})[1]["train"]) == [1, 0, -1]
    assert each(number({"train": of(["b", "a"]), "val": of(["a", None])})[1]["val"]) == [0, -1]
    classes, found = number({"train": of(["b", "a"]), "val": np.array([-1, 3])})
    assert classes == ("3", "a", "b")
    assert each(found["val"]) == [-1, 0]
    assert number({"train": of()})[0] == ()
    with pytest.raises(SourceError, match="label 2, but only 2 class names"):
        number({"train": of([2])}, ["a", "b"])


def test_labels_that_are_no_class_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "MAX_NAMES_BYTES", 10)
    found = labels.Labels(["text", "text", "other"] * 100)
    with pytest.raises(SourceError, match="more than 10 bytes of different texts"):
        found.append("more")


def test_kind_overrides(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"a.bin: not a folder"):
        open_source(write_tar(tmp_path / "a.bin", FILES))
    assert contents(open_source(tmp_path / "a.bin", "tar")) == EXPECTED


def test_fingerprint_of_an_archive(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", FILES)
    first = fingerprint(open_source(path))
    os.utime(path, (1, 1))
    assert fingerprint(open_source(path)) == first
    write_tar(path, {**FILES, "train/ant/0.jpg": picture(9)})
    write_tar(tmp_path / "b.tar", FILES)
    assert fingerprint(open_source(tmp_path / "b.tar")) != first


def test_files_of_one_name_all_count_in_the_fingerprint(tmp_path: Path) -> None:
    for folder, label, size in (("a", b"0", 10), ("b", b"1", 20_000)):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "train-0.tar", {"1.jpg": b"x" * size, "1.cls": label})
    pattern = tmp_path / "{a,b}" / "train-0.tar"
    # Pinned: another one would have every finished conversion done again.
    assert fingerprint(open_source(pattern)).startswith("88bb110efa0ddc9b")
    with open(tmp_path / "a" / "train-0.tar", "ab") as file:
        file.write(bytes(10_240))
    assert not fingerprint(open_source(pattern)).startswith("88bb110efa0ddc9b")


def test_a_listing_and_its_digest_hold_names_of_any_text() -> None:
    names = ["\xe9", "\u65e5", "\udcc3\udca9", "\ud800", "\U0001f600", "a\nb"]
    listing = Listing(Sample(name, -1) for name in names)
    assert [sample.path for sample in listing] == names
    digests = {listing_digests((name,), {"train": Listing([Sample(name, -1)])}, lambda _: "00")[0] for name in names}
    assert len(digests) == len(names)


def test_listing() -> None:
    samples = [Sample(f"näme{i}", i, (i, 2 * i)) for i in range(5)]
    listing = Listing(samples)
    assert listing == samples
    assert listing[1:3] == samples[1:3]
    taken = listing.take(np.array([4, 0]))
    assert taken == [samples[4], samples[0]]
    assert pickle.loads(pickle.dumps(taken)) == taken
    assert len(pickle.dumps(Listing(Sample("x" * 50, 0) for _ in range(1000)).take(np.array([1])))) < 300
    assert taken.label_N.tolist() == [4, 0]
    assert taken.place_NK.tolist() == [[4, 8], [0, 0]]
