"""Sources as they are found in the world: splits by folder or name, odd keys, labels that are none, other files."""

import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.commands import ROOT

from fasttrain.dataprep import convert
from fasttrain.dataprep.sources import labels
from fasttrain.dataprep.sources.files import numbered, split_files
from fasttrain.dataprep.sources.kinds import open_source, recognise
from fasttrain.dataprep.sources.source import Source
from fasttrain.dataprep.sources.webdataset import split_key
from fasttrain.formats.listing import SourceError, Unused
from fasttrain.formats.manifest import Manifest
from fasttrain.system.errors import DataError


def picture(number: int, kind: str = "JPEG") -> bytes:
    """A flat image: red = 10 times its number."""
    stream = io.BytesIO()
    Image.new("RGB", (24, 16), (10 * number, 100, 50)).save(stream, kind)
    return stream.getvalue()


def tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def samples(count: int, first: int = 0) -> dict[str, bytes]:
    numbers = range(first, first + count)
    return {name: data for i in numbers for name, data in ((f"{i}.jpg", picture(i)), (f"{i}.cls", b"%d" % (i % 2)))}


def labelled(source: Source) -> dict[str, list[int]]:
    return {split: listing.label_N.tolist() for split, listing in source.splits.items()}


def reasons(source: Source) -> dict[str, list[str]]:
    return {reason: names for reason, (_, names) in source.unused.reasons.items()}


# Splits of files


@pytest.mark.parametrize("pattern", ["", "{train,val}/*.tar", "*/0000{0..1}.tar"])
def test_splits_of_tars_follow_their_folders(tmp_path: Path, pattern: str) -> None:
    for row, split in enumerate(("train", "val")):
        for i in range(2):
            tar(tmp_path / split / f"0000{i}.tar", samples(2, 4 * row + 2 * i))
    source = open_source(tmp_path / pattern)
    assert labelled(source) == {"train": [0, 1, 0, 1], "val": [0, 1, 0, 1]}
    assert source.splits["val"][2].path == "val/00001.tar/6.jpg"


@pytest.mark.parametrize("name", ["set[1].tar", "set{1,2}.tar", "set*.tar", "set{0..1}.tar"])
def test_the_name_of_a_file_that_is_there_is_no_pattern(tmp_path: Path, name: str) -> None:
    tar(tmp_path / "set1.tar", samples(1))
    assert labelled(open_source(tar(tmp_path / name, samples(3)))) == {"train": [0, 1, 0]}


@pytest.mark.parametrize("pattern", ["*.jpg", "{0,1}.jpg", "*"])
def test_a_pattern_of_other_files_is_refused(tmp_path: Path, pattern: str) -> None:
    for name in ("0.jpg", "1.jpg"):
        (tmp_path / name).write_bytes(picture(0))
    with pytest.raises(SourceError, match=r"names .*0\.jpg, but a pattern is for \.tar files"):
        open_source(tmp_path / pattern)


@pytest.mark.parametrize(
    ("files", "train", "val", "unused"),
    [
        (["Training-0.tar", "TESTING-0.tar"], [0], [1], []),
        (["train2017.tar", "val2017.tar", "test2017.tar"], [0], [1], ["files of the split test"]),
        (["a/train/0.tar", "a/dev/0.tar"], [0], [1], []),
        (["plain_text/train-0.tar", "plain_text/test-0.tar"], [0], [1], []),
        (["x.tar", "y.tar", "y_test.tar"], [0, 1], [2], []),
        (["train-0.tar", "extra.tar", "test/1.tar"], [0], [2], ["files beside the splits"]),
        (["birds_train/0.tar", "birds_valid/0.tar"], [0], [1], []),
        (["a/DIV2K_train_HR/x/0.tar", "a/DIV2K_valid_HR/x/0.tar"], [0], [1], []),
        (["default/partial-train/0.parquet", "default/partial-test/0.parquet"], [0], [1], []),
        (["bullet_train/0.tar", "driving_test/0.tar"], [0, 1], None, []),
        (["a/bird_train/0.tar", "b/bird_val/0.tar"], [0, 1], None, []),
        (["cat_train/0.tar", "cat_val/0.tar", "dog_train/0.tar", "dog_val/0.tar"], [0, 1, 2, 3], None, []),
        (["0.tar", "1.tar"], [0, 1], None, []),
        (["test-0.tar", "test-1.tar"], [0, 1], None, []),
    ],
)  # fmt: skip
def test_splits_of_files_follow_names_before_folders(
    files: list[str], train: list[int], val: list[int] | None, unused: list[str]
) -> None:
    found = Unused()
    assert split_files([f"/home/dev/{name}" for name in files], found) == {
        "train": train,
        **({"val": val} if val else {}),
    }
    assert list(found.reasons) == unused


@pytest.mark.parametrize("layout", ["plain_text/{}-00000-of-00001", "{}/0000", "data/{}-0"])
def test_tables_are_found_below_a_folder(tmp_path: Path, layout: str) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    for split, count in (("train", 3), ("test", 2)):
        path = tmp_path / f"{layout.format(split)}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"image": [picture(i) for i in range(count)], "Label": list(range(count))}), path)
    (tmp_path / "README.md").write_text("text")
    source = open_source(tmp_path)
    assert labelled(source) == {"train": [0, 1, 2], "val": [0, 1]}
    assert reasons(source) == {"files that are no images (.md)": ["README.md"]}
    pattern = layout.format("{train,test}") + ".parquet"
    assert labelled(open_source(tmp_path / pattern)) == labelled(source)


def test_arrays_of_any_spelling(tmp_path: Path) -> None:
    pixels, label = np.zeros((4, 8, 8, 3), np.uint8), np.arange(4)
    np.savez(tmp_path / "a.npz", TrainX=pixels, trainY=label, X_test=pixels[:2], y_test=label[:2], validation_x=pixels,
             validation_y=label, notes=np.zeros(1))  # fmt: skip
    source = open_source(tmp_path / "a.npz")
    assert labelled(source) == {"train": [0, 1, 2, 3], "val": [0, 1, 2, 3]}
    assert reasons(source) == {"arrays": ["X_test", "y_test", "notes"]}


# Tars


def test_keys_end_at_the_first_dot_of_the_last_part() -> None:
    assert split_key("a.b/22.05.PNG") == ("a.b/22", "05.png")
    assert split_key("photo 1.2 (clean).jpg") == ("photo 1", "2 (clean).jpg")
    assert split_key("noext") == ("noext", "")


def test_samples_of_keys_with_dots_are_read_with_their_labels(tmp_path: Path) -> None:
    dotted = {
        "22.05.png": picture(1, "PNG"),
        "22.05.cls": b"1",
        "photo 1.2 (c).jpg": picture(2),
        "photo 1.2 (c).cls": b"0",
    }
    source = open_source(tar(tmp_path / "a.tar", {**samples(2), **dotted}))
    assert labelled(source) == {"train": [0, 1, 1, 0]}
    assert not source.unused.count


def test_a_sample_of_several_images_gives_the_plain_one(tmp_path: Path) -> None:
    members = {"1.seg.png": picture(1, "PNG"), "1.jpg": picture(2), "1.cls": b"0", "1.txt": b"caption"}
    source = open_source(tar(tmp_path / "a.tar", members))
    assert [sample.path for sample in source.splits["train"]] == ["a.tar/1.jpg"]
    assert reasons(source) == {
        "further images of a sample": ["1.seg.png"], "files that are no images (.txt)": ["1.txt"]
    }  # fmt: skip


def test_equal_names_one_after_the_other_are_samples_of_their_own(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in 2 * [("0.jpg", picture(0)), ("0.cls", b"1")]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    assert labelled(open_source(tmp_path / "a.tar")) == {"train": [1, 1]}


@pytest.mark.parametrize("damage", ["none", "a shard is missing", "unfinished", "another manifest"])
def test_converted_tars_keep_their_classes_and_are_read_as_a_whole(tmp_path: Path, damage: str) -> None:
    shards = tmp_path / "shards"
    for name in ("apple", "pear"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "0.jpg").write_bytes(picture(1))
    options = ["--format", "webdataset", "--shard-size", "1", "--workers", "1"]
    assert convert.main([str(tmp_path / "photos"), str(shards), *options]) == 0
    if damage == "a shard is missing":
        (shards / "train-00001.tar").unlink()
    elif damage == "unfinished":
        (shards / "manifest.json").rename(shards / "conversion.json")
    elif damage == "another manifest":
        (shards / "manifest.json").write_text("{}")
    if damage in ("a shard is missing", "unfinished"):
        with pytest.raises(DataError, match="No such file" if damage == "a shard is missing" else "unfinished"):
            open_source(shards)
        return
    source = open_source(shards)
    assert sorted(labelled(source)["train"]) == [0, 1]
    assert source.classes == (("apple", "pear") if damage == "none" else ("0", "1"))
    assert len(source.notes) == (damage == "another manifest")


def test_a_byte_order_mark_is_no_part_of_a_label(tmp_path: Path) -> None:
    labels_of = {"0.cls": "\ufeffapple", "1.cls": "apple", "2.json": '\ufeff{"label": "pear"}'}
    members = {f"{i}.jpg": picture(i) for i in range(3)} | {name: text.encode() for name, text in labels_of.items()}
    source = open_source(tar(tmp_path / "a.tar", dict(sorted(members.items()))))
    assert source.classes == ("apple", "pear")
    assert labelled(source) == {"train": [0, 0, 1]}


def test_labels_in_a_member_that_is_asked_for_make_a_tar_a_webdataset(tmp_path: Path) -> None:
    file = tar(tmp_path / "a.tar", {"0.jpg": picture(0), "0.txt": b"pear", "1.jpg": picture(1), "1.txt": b"apple"})
    assert open_source(file).classes == ()
    source = open_source(file, labels="txt")
    assert source.classes == ("apple", "pear")
    assert labelled(source) == {"train": [1, 0]}


@pytest.mark.parametrize("count", [6, 100])  # more than are looked at to tell the kind
def test_labels_may_come_after_all_images(tmp_path: Path, count: int) -> None:
    both = sorted(samples(count).items(), key=lambda member: member[0].endswith("cls"))
    source = open_source(tar(tmp_path / "a.tar", {**dict(both), "lost.cls": b"1", "b.bmp": picture(1, "BMP")}))
    assert labelled(source) == {"train": [i % 2 for i in range(count)] + [-1]}
    assert reasons(source) == {"labels beside no image": ["a.tar/lost"]}


def test_members_of_every_image_format_are_samples(tmp_path: Path) -> None:
    ends = ("JPG", "jpeg", "bmp", "webp", "tif", "gif", "png")
    members = {name: data for end in ends for name, data in ((f"{end}.{end}", picture(1)), (f"{end}.CLS", b"1"))}
    source = open_source(tar(tmp_path / "a.tar", members))
    assert labelled(source) == {"train": 7 * [1]}


@pytest.mark.parametrize("split", ["", "train/"])
def test_tars_whose_names_are_no_numbers_of_shards_are_classes(tmp_path: Path, split: str) -> None:
    for name in ("n00001", "n00010", "n00200"):
        tar(tmp_path / f"{split}{name}.tar", {f"{name}_1.JPEG": picture(1), f"{name}_2.JPEG": picture(2)})
    if split:
        tar(tmp_path / "val" / "n00010.tar", {"3.JPEG": picture(3)})
    (tmp_path / "more.tar.gz").write_bytes(b"x")
    source = open_source(tmp_path)
    assert source.classes == ("n00001", "n00010", "n00200")
    assert labelled(source) == {"train": [0, 0, 1, 1, 2, 2], **({"val": [1]} if split else {})}
    assert reasons(source) == {"archives inside (.gz)": ["more.tar.gz"]}
    assert "--kind webdataset takes them for shards" in source.notes[0]
    assert {bytes(source.reader.read(sample)) for sample in source.splits["train"]} == {picture(1), picture(2)}


def test_a_tar_for_each_split_holds_class_folders(tmp_path: Path) -> None:
    for split in ("train", "val"):
        tar(tmp_path / f"{split}.tar", {f"{split}/ant/1.jpg": picture(1), f"{split}/bee/1.jpg": picture(2)})
    source = open_source(tmp_path)
    assert recognise(tmp_path) == "tar"
    assert labelled(source) == {"train": [0, 1], "val": [0, 1]}


def test_numbers_of_shards() -> None:
    assert numbered(["train-00000-of-00002.tar", "train-00001-of-00002.tar", "val-0.tar"])
    assert numbered(["a/0.tar", "b/0.tar", "b/1.tar"])
    assert not numbered(["n01440764.tar", "n01443537.tar"])
    assert not numbered(["0.tar", "apple.tar"])


def test_kind_tar_takes_numbered_tars_for_classes(tmp_path: Path) -> None:
    for i in range(2):
        tar(tmp_path / f"{i}.tar", {"a.jpg": picture(i)})
    assert open_source(tmp_path).classes == ()
    assert open_source(tmp_path, "tar").classes == ("0", "1")


# What lies beside


def test_what_lies_in_an_archive_and_is_no_image_is_counted(tmp_path: Path) -> None:
    members = {
        "ant/1.jpg": picture(1), "bee/1.jpg": picture(2), "bee/noext": picture(3), "bee/text": b"text",
        "inner.tar": b"x", "labels.csv": b"x", ".hidden": b"x", "ant/../../out.jpg": picture(4),
        "/".join("d" * 1000) + "/deep.jpg": picture(5),
    }  # fmt: skip
    unused = {
        "files that are no images (no extension)": ["bee/text"], "archives inside (.tar)": ["inner.tar"],
        "files that are no images (.csv)": ["labels.csv"], "names that lead out of the archive": ["ant/../../out.jpg"],
    }  # fmt: skip
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    for path in (tmp_path / "a.zip", tar(tmp_path / "a.tar", members)):
        source = open_source(path, "tar" if path.suffix == ".tar" else "auto")
        assert labelled(source) == {"train": [0, 1, 1]}
        assert reasons(source) == unused
        assert [skip["reason"] for skip in source.skipped] == ["in folders nested too deep"]


def test_backslashes_in_a_zip_separate_folders(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("photos\\", b"")
        for name in ("ant", "bee"):
            archive.writestr(f"photos\\{name}\\1.jpg", picture(1))
    assert open_source(tmp_path / "a.zip").classes == ("ant", "bee")


def test_images_that_are_written_again_in_an_archive_are_counted(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for data in (picture(1), picture(2)):
            member = tarfile.TarInfo("a.jpg")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    source = open_source(tmp_path / "a.tar")
    assert source.reader.read(source.splits["train"][0]) == picture(2)
    assert reasons(source) == {"images written again later": ["a.jpg"]}


def test_image_folders_beside_their_archives_are_read_as_folders(tmp_path: Path) -> None:
    for name in ("train/ant/1.jpg", "train/bee/1.jpg", "val/ant/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture(1))
    tar(tmp_path / "train.tar", {"ant/1.jpg": picture(1)})
    source = open_source(tmp_path)
    assert labelled(source) == {"train": [0, 1], "val": [0]}
    assert reasons(source) == {"archives inside (.tar)": ["train.tar"]}


@pytest.mark.parametrize("names", [["images"], ["ant", "bee"]])
def test_folders_of_the_names_of_all_archives_beside_them_are_what_lies_in_these(
    tmp_path: Path, names: list[str]
) -> None:
    for name in names:
        tar(tmp_path / f"{name}.tar", {"1.jpg": picture(1)})
        (tmp_path / name / "below").mkdir(parents=True)
        (tmp_path / name / "below" / "1.jpg").write_bytes(picture(1))
    assert recognise(tmp_path) == "folder"
    assert reasons(open_source(tmp_path)) == {"archives inside (.tar)": [f"{name}.tar" for name in names]}
    tar(tmp_path / "other.tar", {"1.jpg": picture(1)})
    assert recognise(tmp_path) == "tar"  # a part may be unpacked
    assert reasons(open_source(tmp_path)) == {
        "images beside what is read (.jpg)": [f"{name}/below/1.jpg" for name in names]
    }


@pytest.mark.parametrize(("images", "tars", "kind"), [(3, 1, "folder"), (1, 2, "webdataset")])
def test_of_images_and_tars_side_by_side_the_more_are_read_and_the_others_counted(
    tmp_path: Path, images: int, tars: int, kind: str
) -> None:
    for i in range(images):
        (tmp_path / f"{i}.jpg").write_bytes(picture(i))
    for i in range(tars):
        tar(tmp_path / f"{i}.tar", samples(1))
    assert recognise(tmp_path) == kind
    assert open_source(tmp_path).unused.count == (tars if kind == "folder" else images)


def test_cifar_among_other_data_sets_is_read_and_said(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in ("data_batch_1.bin", "test_batch.bin"):
        (folder / name).write_bytes(bytes(3073))
    (folder / "readme.html").write_text("text")
    (tmp_path / "MNIST").mkdir()
    source = open_source(tmp_path)
    assert labelled(source) == {"train": [0], "val": [0]}
    assert source.notes == [f"CIFAR is read from {folder}"]
    assert reasons(source) == {
        "folders beside CIFAR's": ["MNIST"],
        "files that are no images (.html)": ["cifar-10-batches-bin/readme.html"],
    }
    folder.rename(tmp_path / "one")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "train.bin").write_bytes(bytes(3074))
    with pytest.raises(SourceError, match=r"CIFAR lies in .*one and in .*two: name one of them"):
        open_source(tmp_path)


def test_the_last_line_and_the_manifest_tell_what_is_not_used(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    members = {**samples(2), "1.txt": b"caption", "2.jpg": picture(2), "2.json": b'{"label": [1]}'}
    path = tar(tmp_path / "a.tar", members)
    assert convert.main([str(path), str(tmp_path / "out"), "--workers", "1"]) == 0
    out, err = capfd.readouterr()
    summary, manifest = json.loads(out.splitlines()[-1]), Manifest.load(tmp_path / "out")
    assert summary["unused"] == {"count": 1, "reasons": {"files that are no images (.txt)": 1}}
    assert manifest.unused == [{"reason": "files that are no images (.txt)", "count": 1, "first": ["1.txt"]}]
    assert summary["notes"] == manifest.notes
    assert len(manifest.notes) == 1
    notes = [line for line in err.splitlines() if line.startswith("note: ")]
    assert notes == [f"note: {manifest.notes[0]}", "note: not used: files that are no images (.txt): 1, first 1.txt"]
    assert convert.main([str(path), str(tmp_path / "out"), "--workers", "1"]) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["unused"] == summary["unused"]


def test_names_that_would_steer_a_terminal_are_escaped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b[2J\x07\r"
    members = {f"a{evil}/1.jpg": b"text", f"a{evil}/2.jpg": picture(1), "b/1.jpg": picture(1), f"{evil}.txt": b""}
    assert convert.main([str(tar(tmp_path / "a.tar", members)), str(tmp_path / "out")]) == convert.EXIT_SKIPPED
    for text in capfd.readouterr():
        assert text.replace("\n", "").isprintable()
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.classes == [f"a{evil}", "b"]


# Labels


def test_labels_of_a_name_and_none(tmp_path: Path) -> None:
    members = {"1.jpg": picture(1), "1.cls": b"0", "1.kind": b"dog", "1.json": b'{"breed": 3}', "2.jpg": picture(2)}
    path = tar(tmp_path / "a.tar", members)
    assert labelled(open_source(path)) == {"train": [0, -1]}
    assert open_source(path, labels="kind").classes == ("dog",)
    assert labelled(open_source(path, labels="breed")) == {"train": [3, -1]}
    none = open_source(path, labels="none")
    assert (none.classes, labelled(none)) == ((), {"train": [-1, -1]})
    with pytest.raises(SourceError, match="--labels colour: there are none, or no classes"):
        open_source(path, labels="colour")


def test_labels_of_folders_are_their_names_or_none(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(picture(1))
    none = open_source(tmp_path, labels="none")
    assert (none.classes, labelled(none)) == ((), {"train": [-1, -1]})
    with pytest.raises(SourceError, match="a source of kind folder has its own: auto or none"):
        open_source(tmp_path, labels="x")


def test_labels_of_a_column(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    table = pa.table({"image": [picture(1)] * 2, "label": [1, 0], "Breed": [b"husky", b"collie"], "mask": [b"x"] * 2})
    pq.write_table(table, tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet", labels="breed")
    assert source.classes == ("collie", "husky")
    assert reasons(source) == {"further columns of bytes": ["Breed", "mask"]}
    assert open_source(tmp_path / "a.parquet", labels="none").classes == ()
    with pytest.raises(SourceError, match="no column 'colour'; columns: image, label, Breed, mask"):
        open_source(tmp_path / "a.parquet", labels="colour")


@pytest.mark.parametrize("kind", ["npz", "npz of one split", "parquet", "webdataset"])
def test_a_split_without_images_is_refused_in_one_line(
    tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    pixels, empty = np.zeros((2, 8, 8, 3), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)
    if kind.startswith("npz"):
        source /= "a.npz"
        np.savez(source, **({"x_train": pixels, "x_test": empty} if kind == "npz" else {"images": empty}))
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet")
        table = pyarrow.table({"image": [picture(0), picture(1)], "label": [0, 1]})
        pyarrow.parquet.write_table(table, source / "train.parquet")
        pyarrow.parquet.write_table(table.slice(0, 0), source / "test.parquet")
    else:
        tar(source / "train.tar", samples(2))
        tar(source / "val.tar", {"0.cls": b"0"})
    assert convert.main([str(source), str(tmp_path / "out")]) == 2
    split = "train" if kind == "npz of one split" else "val"
    assert capfd.readouterr().err.endswith(f"error: {source}: no images in the {split} split\n")


def test_a_key_of_a_json_that_holds_nothing_does_not_hide_another(tmp_path: Path) -> None:
    texts = [b'{"label": null, "class": "x"}', b'{"label": null}', b'{"label": "y", "class": "x"}']
    members = {name: data for i, text in enumerate(texts) for name, data in
               ((f"{i}.jpg", picture(i)), (f"{i}.json", text))}  # fmt: skip
    source = open_source(tar(tmp_path / "a.tar", members))
    assert source.classes == ("x", "y")
    assert labelled(source) == {"train": [0, -1, 1]}


@pytest.mark.parametrize(("values", "classes"), [([1, 0], ("0", "1")), (["b", "a"], ("a", "b"))])
@pytest.mark.parametrize("lacking", ["no column", "nulls"])
def test_tables_without_labels_do_not_cost_those_of_others(
    tmp_path: Path, values: list[int | str], classes: tuple[str, ...], lacking: str
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    images = {"image": [picture(0), picture(1)]}
    # Sorted by name, the one without labels comes first.
    unlabelled = images if lacking == "no column" else {**images, "label": pyarrow.nulls(2)}
    pyarrow.parquet.write_table(pyarrow.table(unlabelled), tmp_path / "test.parquet")
    pyarrow.parquet.write_table(pyarrow.table({**images, "label": values}), tmp_path / "train.parquet")
    source = open_source(tmp_path)
    assert source.classes == classes
    assert labelled(source) == {"train": [1, 0], "val": [-1, -1]}
    assert source.notes == ["1 of 2 tables have no column 'label', so their images have no labels"]


def test_a_column_of_numbers_here_and_text_there_holds_no_classes(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    for i, value in enumerate((0, "a")):
        pyarrow.parquet.write_table(pyarrow.table({"image": [picture(i)], "label": [value]}), tmp_path / f"{i}.parquet")
    source = open_source(tmp_path)
    assert source.notes == ["no labels: column 'label' holds text in some tables, and something else in others"]
    assert labelled(source) == {"train": [-1, -1]}
    with pytest.raises(SourceError, match="something else in others"):
        open_source(tmp_path, labels="label")


@pytest.mark.parametrize("name", ["Label", "category", "class_id", "y", "TARGET"])
def test_columns_that_are_customary_for_labels(tmp_path: Path, name: str) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"IMAGE": [picture(1)] * 2, name: [1, 0]}), tmp_path / "a.parquet")
    assert labelled(open_source(tmp_path / "a.parquet")) == {"train": [1, 0]}


IMAGES = np.zeros((3, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.eye(3)[[2, 0, 1]], [2, 0, 1]),
        (np.array([["b"], ["a"], ["b"]]), [1, 0, 1]),
        (np.array([b"b", b"a", b"b"]), [1, 0, 1]),
        (np.array([0.5, 1, 2]), None),
        (np.ones((3, 2), np.uint8), None),
        (np.array([b"\xff", b"a", b"\xfe"]), [1, 2, 0]),
        (np.zeros((3, 2, 2)), None),
    ],
)
def test_labels_of_arrays(tmp_path: Path, values: np.ndarray, expected: list[int] | None) -> None:
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=values)
    source = open_source(tmp_path / "a.npz")
    assert labelled(source) == {"train": expected or [-1] * 3}
    assert [note[:10] for note in source.notes] == ([] if expected else ["no labels:"])
    if not expected:
        with pytest.raises(SourceError, match="labels"):
            open_source(tmp_path / "a.npz", labels="labels")
    with pytest.raises(SourceError, match="no array 'colour'"):
        open_source(tmp_path / "a.npz", labels="colour")


def test_names_of_classes_that_are_bytes_are_decoded(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=np.arange(3), classes=np.array([b"ant", b"bee", b"c\xc3\xa9"]))
    assert open_source(tmp_path / "a.npz").classes == ("ant", "bee", "cé")


@pytest.mark.parametrize(
    ("texts", "classes"),
    [
        (["1_0", "10"], ("10", "1_0")), (["1", "01"], ("01", "1")), (["+1", "2"], ("+1", "2")),
        (["1", "0", None], ("0", "1")), (["-1", "1"], ("0", "1")), (["१", "2"], ("2", "१")),
    ],
)  # fmt: skip
def test_text_is_a_number_only_if_nothing_else_gives_it(texts: list[str | None], classes: tuple[str, ...]) -> None:
    assert labels.number_labels({"train": labels.Labels(texts)})[0] == classes


def test_text_that_names_no_classes_is_left_out_and_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "MAX_NAMES_BYTES", 20)
    members = {f"{i}.{end}": data for i in range(9) for end, data in (("jpg", picture(1)), ("cls", b"text %d" % i))}
    source = open_source(tar(tmp_path / "a.tar", members))
    assert labelled(source) == {"train": [-1] * 9}
    assert source.notes == ["no labels: the labels hold more than 20 bytes of different texts"]


@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_names_that_the_locale_cannot_spell_are_those_of_the_source(tmp_path: Path, kind: str) -> None:
    names, source = ("\u65e5\u672c/0.jpg", "\xe9/0.jpg"), tmp_path / "photos"
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for i, name in enumerate(names):
            archive.writestr(name, picture(i))
        archive.extractall(source)
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "fasttrain.dataprep.convert", source.with_suffix(".zip" if kind == "zip" else "")]
    done = subprocess.run(
        [*map(str, command), str(tmp_path / "out")], env=ascii_only, cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert Manifest.load(tmp_path / "out").num_samples("train") == 2
    for name in names if kind == "zip" else ():
        assert f"{name}\n" in (tmp_path / "out" / "train-00000.names").read_text("utf-8")
