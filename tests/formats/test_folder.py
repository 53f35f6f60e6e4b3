"""fasttrain.formats.folder: what is read of a folder, as which split and class, and what of it is counted."""

import os
from pathlib import Path

import pytest

from fasttrain.formats.folder import list_folder
from fasttrain.formats.layout import Layout, Skipped, arrange, lines_of
from fasttrain.formats.listing import Sample, SourceError, Unused
from fasttrain.formats.signature import HEAD_BYTES, is_image

HEADS = {
    "jpeg": b"\xff\xd8\xff\xe0", "png": b"\x89PNG\r\n\x1a\n", "gif": b"GIF89a", "tiff": b"II*\0", "big": b"MM\0*",
    "webp": b"RIFF\0\0\0\0WEBP", "bmp": b"BM" + bytes(12) + b"\x28\0\0\0",
}  # fmt: skip


def make(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")
    return root


def counts(layout: Layout) -> dict[str, int]:
    return {split: len(samples) for split, samples in layout.splits.items()}


def unused(layout: Layout) -> dict[str, list[str]]:
    return {reason: names for reason, (_, names) in layout.unused.reasons.items()}


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("Training", "Testing"), ("train", "dev"), ("train2017", "val2017"), ("TRAIN", "EVAL"), ("trainset", "testset"),
        ("train_images", "test_images"), ("ILSVRC2012_img_train", "ILSVRC2012_img_val"), ("data/train", "data/val"),
        ("a/b/c/train", "a/b/c/valid"), ("images/train", "images/val"), ("unlabeled", "test"),
    ],
)  # fmt: skip
def test_splits_are_found_in_any_spelling_and_at_any_depth(tmp_path: Path, train: str, val: str) -> None:
    make(tmp_path, f"{train}/ant/1.jpg", f"{train}/bee/2.jpg", f"{val}/bee/3.jpg")
    make(tmp_path, "annotations/a.json", "README.md", "labels/train/1.txt")
    layout = list_folder(tmp_path)
    assert layout.classes == ("ant", "bee")
    assert counts(layout) == {"train": 2, "val": 1}
    assert layout.splits["val"].label_N.tolist() == [1]
    assert unused(layout) == {
        "files that are no images (.json)": ["annotations/a.json"],
        "files that are no images (.md)": ["README.md"],
        "files that are no images (.txt)": ["labels/train/1.txt"],
    }


@pytest.mark.parametrize("names", [("airplane", "train", "truck"), ("bullet_train", "train_station"), ("test", "ant")])
def test_classes_that_are_called_like_splits_stay_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    layout = list_folder(make(tmp_path, *(f"{name}/1.jpg" for name in names)))
    assert layout.classes == tuple(sorted(names))
    assert list(layout.splits) == ["train"]


def test_a_training_split_alone_is_one_beside_what_holds_no_images(tmp_path: Path) -> None:
    layout = list_folder(make(tmp_path, "train/ant/1.jpg", "train/bee/1.jpg", "annotations/a.json", "icon.png"))
    assert layout.classes == ("ant", "bee")
    assert unused(layout)["images beside the splits"] == ["icon.png"]


def test_splits_that_are_not_used_are_counted(tmp_path: Path) -> None:
    make(tmp_path, "train/a/1.jpg", "val/a/1.jpg", "test/1.jpg", "test/2.jpg", "unlabeled/3.jpg", "more/a/4.jpg")
    make(tmp_path, "train_large/a/5.jpg")
    layout = list_folder(tmp_path)
    assert counts(layout) == {"train": 1, "val": 1}
    assert layout.unused.content() == [
        {"reason": "images beside the splits", "count": 1, "first": ["more"]},
        {"reason": "images of the split test", "count": 2, "first": ["test"]},
        {"reason": "images of the split train", "count": 1, "first": ["train_large"]},
        {"reason": "images of the split unlabeled", "count": 1, "first": ["unlabeled"]},
    ]
    (line,) = lines_of(layout)
    assert line.startswith("not used: images beside the splits: 1, first more; images of the split test: 2, first test")


def test_validation_splits_alone_are_no_classes(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds test, val, but no training split: name one of them"):
        list_folder(make(tmp_path, "val/a/1.jpg", "test/a/1.jpg"))
    assert list_folder(make(tmp_path / "one", "set/test/a/1.jpg", "set/test/b/1.jpg")).classes == ("a", "b")


def test_folders_of_neutral_names_within_splits_are_looked_through(tmp_path: Path) -> None:
    make(tmp_path, "train/images/1.jpg", "train/labels/1.txt", "valid/images/2.jpg", "valid/labels/2.txt")
    layout = list_folder(tmp_path)
    assert layout.classes == ()
    assert counts(layout) == {"train": 1, "val": 1}


def test_a_validation_split_without_the_labels_of_the_other_is_noted(tmp_path: Path) -> None:
    layout = list_folder(make(tmp_path, "train/n01/images/1.jpg", "train/n02/images/1.jpg", "val/images/2.jpg"))
    assert layout.classes == ("n01", "n02")
    assert layout.splits["val"].label_N.tolist() == [-1]
    assert layout.notes == ["the images of the validation split, in val, have no labels"]


def test_a_split_unpacked_into_a_folder_of_its_name_is_looked_through(tmp_path: Path) -> None:
    layout = list_folder(make(tmp_path, "train/train/ant/1.jpg", "train/train/bee/1.jpg", "test/Test/bee/2.jpg"))
    assert layout.classes == ("ant", "bee")
    assert layout.splits["val"].label_N.tolist() == [1]


def test_a_class_folder_of_nothing_but_folders_of_images_is_noted(tmp_path: Path) -> None:
    layout = list_folder(make(tmp_path, "bottle/good/1.jpg", "bottle/bad/1.jpg", "cup/1.jpg", "cup/more/2.jpg"))
    assert layout.classes == ("bottle", "cup")
    (note,) = layout.notes
    assert note.startswith("1 of 2 class folders hold nothing but folders of images, the first is bottle:")


def test_folders_below_the_only_one_of_a_class_folder_are_noted_too(tmp_path: Path) -> None:
    layout = list_folder(make(tmp_path, *(f"{top}/in/{name}/1.jpg" for top in ("one", "two") for name in "ab")))
    assert layout.classes == ("one", "two")
    assert layout.notes[0].startswith("2 of 2 class folders hold nothing but folders of images, the first is one:")


@pytest.mark.parametrize("name", ["images", "JPEGImages", "img"])
def test_a_class_that_is_called_like_all_images_is_noted(tmp_path: Path, name: str) -> None:
    layout = list_folder(make(tmp_path, f"{name}/1.jpg", "masks/1.png"))
    assert layout.classes == tuple(sorted((name, "masks")))
    assert layout.notes == [f"one of 2 classes is called {name!r}: if that folder holds all images, name it"]
    assert list_folder(make(tmp_path / "letters", "x/1.jpg", "v/1.jpg")).notes == []


def test_a_pair_of_folders_that_are_called_alike_are_splits(tmp_path: Path) -> None:
    make(tmp_path, *(f"seg_{split}/seg_{split}/{name}/1.jpg" for split in ("train", "test") for name in ("ice", "sea")))
    layout = list_folder(make(tmp_path, "seg_pred/1.jpg"))
    assert layout.classes == ("ice", "sea")
    assert counts(layout) == {"train": 2, "val": 2}
    assert unused(layout) == {"images beside the splits": ["seg_pred"]}


@pytest.mark.parametrize("kind", HEADS)
def test_images_are_told_by_their_extension_or_else_by_their_first_bytes(tmp_path: Path, kind: str) -> None:
    assert is_image(HEADS[kind].ljust(HEAD_BYTES, b"\0"))
    make(tmp_path, *(f"{kind}.{end}" for end in ("JPG", "Jpeg", "jpe", "jfif", "tif", "TIFF", "gif", "PNG", "webp")))
    make(tmp_path, "text", "photo.1", "x.jpg.part")
    (tmp_path / "noext").write_bytes(HEADS[kind].ljust(HEAD_BYTES, b"\0"))
    layout = list_folder(tmp_path)
    assert len(layout.splits["train"]) == 10
    assert unused(layout) == {
        "files that are no images (no extension)": ["text"],
        "files that are no images (.1)": ["photo.1"],
        "files that are no images (.part)": ["x.jpg.part"],
    }


@pytest.mark.parametrize("head", [b"", b"BM and so on, text", b"RIFF\0\0\0\0WAVE", b"\xff\xd8", b"<svg>"])
def test_other_first_bytes_are_no_image(head: bytes) -> None:
    assert not is_image(head[:HEAD_BYTES])


def test_links_to_class_folders_are_classes(tmp_path: Path) -> None:
    make(tmp_path, "store/ant/1.jpg", "store/bee/2.jpg", "set/cat/3.jpg")
    (tmp_path / "set/ant").symlink_to("../store/ant")
    (tmp_path / "set/bee").symlink_to(tmp_path / "store/bee")
    layout = list_folder(tmp_path / "set")
    assert layout.classes == ("ant", "bee", "cat")
    assert [sample.path for sample in layout.splits["train"]] == ["ant/1.jpg", "bee/2.jpg", "cat/3.jpg"]
    assert not layout.unused.count


def test_what_is_called_like_an_image_and_is_none_is_named(tmp_path: Path) -> None:
    root = make(tmp_path, "a/1.jpg", "b/1.jpg", "album.jpg/1.jpg")
    (root / "a/to.jpg").symlink_to("1.jpg")
    (root / "a/nowhere.jpg").symlink_to("missing")
    (root / "a/itself.jpg").symlink_to("itself.jpg")
    (root / "a/above").symlink_to("..")
    (root / "b/folder.jpg").mkdir()
    os.mkfifo(root / "b/fifo.jpg")
    os.mkfifo(root / "b/fifo")
    layout = list_folder(root)
    assert layout.splits["train"].label_N.tolist() == [0, 0, 1, 2]
    assert {skip["path"]: skip["reason"] for skip in layout.skipped} == {
        "a/itself.jpg": "can't be read: Too many levels of symbolic links",
        "a/nowhere.jpg": "a link that leads nowhere",
        "b/fifo.jpg": "not a regular file",
        "b/folder.jpg": "an empty folder",
    }
    assert unused(layout) == {
        "files that are no images (no extension)": ["b/fifo"],
        "links to a folder that they lie in": ["a/above"],
    }
    assert any(line.startswith("4 images can't be used, the first is a/itself.jpg") for line in lines_of(layout))


def test_folders_that_link_to_each_other_end(tmp_path: Path) -> None:
    names = [f"f{i}" for i in range(12)]
    make(tmp_path, *(f"{name}/1.jpg" for name in names))
    for name in names:
        for other in names:
            (tmp_path / name / f"to-{other}").symlink_to(f"../{other}")
    layout = list_folder(tmp_path)
    assert set(layout.splits["train"].label_N.tolist()) == set(range(12))
    assert layout.unused.count


class DeepTree:
    """A folder in a folder, 3,000 times, with an image in the last."""

    root = ""

    def __init__(self) -> None:
        self.skipped: Skipped = []
        self.unused = Unused()

    def entries(self, folder: str) -> tuple[list[str], list[Sample]]:
        return (["deep"], []) if folder.count("/") < 3000 else ([], [Sample(f"{folder}/1.jpg", -1)])


def test_deep_folders_are_listed() -> None:
    assert counts(arrange(DeepTree())) == {"train": 1}


def test_a_training_split_without_images_is_what_is_wrong_and_not_the_classes_of_the_other(tmp_path: Path) -> None:
    (tmp_path / "train" / "ant").mkdir(parents=True)
    with pytest.raises(SourceError, match=r"train: no images \(.*folders without images: 1, first train/ant"):
        list_folder(make(tmp_path, "val/ant/1.jpg"))


def test_pictures_of_other_formats_are_not_called_other_files(tmp_path: Path) -> None:
    layout = list_folder(make(tmp_path, "1.jpg", "2.HEIC", "3.avif", "4.txt"))
    assert unused(layout) == {
        "pictures of a format that is not read (.heic)": ["2.HEIC"],
        "pictures of a format that is not read (.avif)": ["3.avif"],
        "files that are no images (.txt)": ["4.txt"],
    }


class CountedName(str):
    """A name that counts how often any is compared."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        CountedName.compared += 1
        return str.__eq__(self, other)


class WideTree:
    """Two splits of 300 classes, of an image each."""

    root = ""

    def __init__(self) -> None:
        self.skipped: Skipped = []
        self.unused = Unused()

    def entries(self, folder: str) -> tuple[list[str], list[Sample]]:
        names = {"": ["train", "val"], "train": 300, "val": 300}.get(folder, [])
        if isinstance(names, int):
            names = [CountedName(f"{number:03d}") for number in range(names)]
        return names, [Sample(f"{folder}/1.jpg", -1)] if "/" in folder else []


def test_the_classes_of_a_validation_split_are_not_looked_for_one_by_one() -> None:
    CountedName.compared = 0
    layout = arrange(WideTree())
    assert layout.splits["val"].label_N.tolist() == list(range(300))
    assert CountedName.compared < 10 * 300


def test_an_error_of_no_images_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no images \(.*\); not used: archives inside \(\.tar\): 1, first a\.tar"):
        list_folder(make(tmp_path, "a.tar"))


def test_what_is_not_used_takes_little_memory_and_says_the_first() -> None:
    found = Unused()
    for i in range(1000):
        found.add("many", f"name{i}")
        found.add(f"reason {i}", "x", 2)
    assert found.count == 3000
    content = {of["reason"]: of for of in found.content()}
    assert content["many"] == {"reason": "many", "count": 1000, "first": [f"name{i}" for i in range(20)]}
    assert len(content) == 51
    assert content["other"]["count"] == 2 * (1000 - 49)
    assert str(found).count(";") == 8
