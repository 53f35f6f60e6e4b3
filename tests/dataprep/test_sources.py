"""fasttrain.dataprep.sources: which files belong to a data set, in which order, with which labels."""

import os
from collections import Counter
from pathlib import Path

import pytest

from fasttrain.dataprep.order import shuffled_splits
from fasttrain.dataprep.sources.folder import scan_folder
from fasttrain.dataprep.sources.kinds import fingerprint, fingerprints
from fasttrain.formats import folder
from fasttrain.formats.listing import Sample, SourceError


def make(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")
    return root


def test_class_folders(tmp_path: Path) -> None:
    make(tmp_path, "dog/b.JPG", "dog/a.png", "dog/deep/er/c.webp", "ant/z.jpeg", "ant/y.bmp", "ant/notes.txt")
    make(tmp_path, "README.md", ".hidden/x.jpg", "ant/.hidden.jpg", "empty/notes.txt")
    source = scan_folder(tmp_path)
    assert source.classes == ("ant", "dog")
    assert source.splits == {
        "train": [
            Sample("ant/y.bmp", 0),
            Sample("ant/z.jpeg", 0),
            Sample("dog/a.png", 1),
            Sample("dog/b.JPG", 1),
            Sample("dog/deep/er/c.webp", 1),
        ]
    }


def test_flat_folder(tmp_path: Path) -> None:
    source = scan_folder(make(tmp_path, "b.jpg", "a.jpg", "c.txt", "empty/c.txt"))
    assert source.classes == ()
    assert source.splits == {"train": [Sample("a.jpg", -1), Sample("b.jpg", -1)]}


@pytest.mark.parametrize("names", [["val"], ["valid"], ["validation"], ["test"], ["val", "test"]])
def test_split_folders(tmp_path: Path, names: list[str]) -> None:
    make(tmp_path, "train/a/1.jpg", "train/b/2.jpg", *(f"{name}/b/3.jpg" for name in names))
    source = scan_folder(tmp_path)
    assert source.classes == ("a", "b")
    assert source.splits["train"] == [Sample("train/a/1.jpg", 0), Sample("train/b/2.jpg", 1)]
    assert source.splits["val"] == [Sample(f"{names[0]}/b/3.jpg", 1)]


def test_train_alone_is_a_split(tmp_path: Path) -> None:
    source = scan_folder(make(tmp_path, "train/a/1.jpg", "train/b/2.jpg"))
    assert source.classes == ("a", "b")
    assert list(source.splits) == ["train"]


def test_flat_split_folders(tmp_path: Path) -> None:
    source = scan_folder(make(tmp_path, "train/1.jpg", "val/2.jpg"))
    assert source.classes == ()
    assert source.splits == {"train": [Sample("train/1.jpg", -1)], "val": [Sample("val/2.jpg", -1)]}


def test_unlabelled_validation_images(tmp_path: Path) -> None:
    source = scan_folder(make(tmp_path, "train/a/1.jpg", "val/2.jpg"))
    assert source.classes == ("a",)
    assert source.splits["val"] == [Sample("val/2.jpg", -1)]


def test_links(tmp_path: Path) -> None:
    make(tmp_path, "source/a/1.jpg", "elsewhere/2.jpg")
    root = tmp_path / "source"
    (root / "a" / "link.jpg").symlink_to(tmp_path / "elsewhere" / "2.jpg")
    (root / "a" / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    source = scan_folder(root)
    assert [sample.path for sample in source.splits["train"]] == ["a/1.jpg", "a/link.jpg", "linked/2.jpg"]
    assert source.classes == ("a", "linked")
    assert source.skipped == [{"path": "a/dangling.jpg", "reason": "a link that leads nowhere"}]
    fingerprint(source)


def test_what_is_no_regular_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = scan_folder(make(tmp_path, "1.jpg", "2.jpg", "3.jpg", "4.jpg"))
    for name in ("1.jpg", "2.jpg", "3.jpg"):
        (tmp_path / name).unlink()
    os.mkfifo(tmp_path / "1.jpg")
    (tmp_path / "2.jpg").symlink_to("/dev/zero")
    (tmp_path / "3.jpg").mkdir()
    *others, file = source.splits["train"]
    for sample in others:
        with pytest.raises(SourceError, match="not a regular file"):
            source.reader.read(sample)
    monkeypatch.setattr(folder, "MAX_FILE_BYTES", 1 << 20)
    os.truncate(tmp_path / "4.jpg", (1 << 20) + 1)
    with pytest.raises(SourceError, match="larger than 1048576 bytes"):
        source.reader.read(file)


def test_short_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = scan_folder(make(tmp_path, "1.jpg"))
    (tmp_path / "1.jpg").write_bytes(bytes(range(100)))
    read = os.read
    monkeypatch.setattr(os, "read", lambda descriptor, size: read(descriptor, min(size, 7)))
    assert source.reader.read(source.splits["train"][0]) == bytes(range(100))
    monkeypatch.setattr(os, "read", lambda descriptor, size: read(descriptor, size - 1 if size == 100 else 0))
    assert source.reader.read(source.splits["train"][0]) == bytes(range(99)), "a file that became shorter"


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["notes.txt"], "no images"),
        (["a/1.jpg", "2.jpg"], "beside folders"),
        (["train/a/1.jpg", "val/b/2.jpg"], "class 'b' is not in"),
        (["train/1.jpg", "val/b/2.jpg"], "class 'b' is not in"),
        (["train/a/1.jpg", "val/notes.txt"], "no images"),
    ],
)
def test_errors(tmp_path: Path, paths: list[str], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        scan_folder(make(tmp_path, *paths))


def test_missing_and_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such folder"):
        scan_folder(tmp_path / "missing")
    with pytest.raises(SourceError, match="not a folder"):
        scan_folder(make(tmp_path, "file") / "file")


def test_fingerprint_changes_with_the_source(tmp_path: Path) -> None:
    make(tmp_path, "a/1.jpg", "b/2.jpg")
    first = fingerprint(scan_folder(tmp_path))
    assert fingerprint(scan_folder(tmp_path)) == first
    (tmp_path / "a/1.jpg").write_bytes(b"longer")
    second = fingerprint(scan_folder(tmp_path))
    make(tmp_path, "b/3.jpg")
    assert len({first, second, fingerprint(scan_folder(tmp_path))}) == 3


def test_only_the_fingerprint_with_times_tells_a_copy_from_its_source(tmp_path: Path) -> None:
    source = scan_folder(make(tmp_path, "a/1.jpg"))
    same, changing = fingerprints(source)
    os.utime(tmp_path / "a/1.jpg", (1, 1))
    assert fingerprints(source)[0] == same
    assert fingerprints(source)[1] != changing


def test_shuffled_splits(tmp_path: Path) -> None:
    make(tmp_path, *(f"a/{i:03d}.jpg" for i in range(40)), *(f"b/{i:03d}.jpg" for i in range(20)))
    source = scan_folder(tmp_path)
    samples = source.splits["train"]
    whole = shuffled_splits(source, 0.0, 1)
    assert list(whole) == ["train"]
    assert whole["train"] != samples
    assert set(whole["train"]) == set(samples)
    assert shuffled_splits(source, 0.0, 2) != whole == shuffled_splits(source, 0.0, 1)
    # Pinned: another order would give other shards for the same settings.
    assert [sample.path for sample in whole["train"][:3]] == PINNED
    parts = shuffled_splits(source, 0.25, 1)
    assert Counter(sample.label for sample in parts["val"]) == {0: 10, 1: 5}
    assert sorted((*parts["train"], *parts["val"]), key=lambda s: s.path) == samples
    with pytest.raises(SourceError, match="leaves none for the split 'val'"):
        shuffled_splits(source, 0.001, 1)


PINNED = ["a/019.jpg", "a/012.jpg", "a/008.jpg"]


def test_a_val_split_cannot_be_set_apart_twice(tmp_path: Path) -> None:
    source = scan_folder(make(tmp_path, "train/1.jpg", "val/2.jpg"))
    with pytest.raises(SourceError, match="has a validation split already"):
        shuffled_splits(source, 0.5, 0)
