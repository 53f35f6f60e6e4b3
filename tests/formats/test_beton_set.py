"""Whatever stock FFCV wrote is read where it holds images, and refused in words where it does not or is damaged."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.stock import picture, stock, stock_set

from fasttrain.formats import jpeg
from fasttrain.formats.beton import MODE_RAW, BetonError, BetonReader, BetonWriter
from fasttrain.formats.beton_set import open_betons

fields = pytest.importorskip("ffcv.fields")
Make = Callable[[int], Any]  # the value of a sample

COMPANIONS: dict[str, tuple[Callable[[], Any], Make]] = {
    "float": (fields.FloatField, lambda i: i / 3),
    "int": (fields.IntField, lambda i: 7 * i),
    "bytes": (fields.BytesField, lambda i: np.arange(i * 50, dtype=np.uint8)),  # none at all in the first
    "json": (fields.JSONField, lambda i: {"number": i}),
    "array": (lambda: fields.NDArrayField(np.dtype("f4"), (3, 5)), lambda i: np.full((3, 5), i, np.float32)),
    "big": (lambda: fields.NDArrayField(np.dtype("u1"), (700_000,)), lambda i: np.full(700_000, i, np.uint8)),
}


def tensor_field() -> tuple[Any, Make]:
    torch = pytest.importorskip("torch")
    return fields.TorchTensorField(torch.float16, (4,)), lambda i: torch.full((4,), float(i), dtype=torch.float16)


ARRANGEMENTS = {
    "image first": (("img", "raw"), "float", ("label", "label"), "json"),
    "image last": ("json", ("whose", "label"), "float", "bytes", ("shot", "jpg")),
    "odd sizes before": ("bytes", ("label", "label"), ("picture", "smart"), "array", "tensor"),
    "two whole numbers": ("int", ("image", "proportion"), ("LABEL_of_it_all_and_more", "label")),
    "pages": ("big", ("image", "raw"), "big", ("y", "label")),
    "no label": (("image", "jpg"), "float"),
}


def written(path: Path, arrangement: tuple, count: int, workers: int) -> Path:
    kinds: dict[str, Any] = {}
    makes: list[Make] = []
    for number, part in enumerate(arrangement):
        if part == "tensor":
            kinds[f"f{number}"], make = tensor_field()
        elif isinstance(part, str):
            kind, make = COMPANIONS[part]
            kinds[f"f{number}"] = kind()
        elif part[1] == "label":
            kinds[part[0]], make = fields.IntField(), lambda i: i % 5
        else:
            kinds[part[0]] = fields.RGBImageField(write_mode=part[1], smart_threshold=2000)
            make = picture
        makes.append(make)
    return stock(path, kinds, [tuple(make(i) for make in makes) for i in range(count)], workers)


def pixels_of(reader: BetonReader, row: int) -> np.ndarray:
    start, size = int(reader.pointer_N[row]), int(reader.size_N[row])
    stream = reader.data[start : start + size]
    if reader.mode_N[row] == MODE_RAW:
        return stream.reshape(int(reader.height_N[row]), int(reader.width_N[row]), 3)
    return jpeg.decode(stream.tobytes())


@pytest.mark.parametrize("name", ARRANGEMENTS)
@pytest.mark.parametrize("workers", [1, 2])
def test_any_order_and_company_of_fields_is_read(tmp_path: Path, name: str, workers: int) -> None:
    reader = BetonReader(written(tmp_path / "a.beton", ARRANGEMENTS[name], 20, workers))
    assert reader.num_samples == 20
    assert reader.label_N.tolist() == ([-1] * 20 if name == "no label" else [i % 5 for i in range(20)])
    for i in range(20):
        assert np.abs(pixels_of(reader, i).astype(int) - picture(i)).mean() < 4


class Custom(fields.FloatField):
    """A field of somebody's own: the file does not say how large it is."""


REFUSED = {
    "no image": ({"covariate": "array", "label": "float"}, r"holds fields covariate: array, label: float; no RGB"),
    "two images": (
        {"left": "image", "right": "image", "label": "int"},
        "left: RGB image, right: RGB image, .* can't be",
    ),
    "two image names": ({"image_left": "image", "image_right": "image"}, "can't be told"),
    "two numbers": ({"image": "image", "id": "int", "row": "int"}, "which of the int fields to take"),
    "custom": ({"image": "image", "mine": "custom", "label": "int"}, "mine: custom.* size of a custom field"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_files_are_refused_in_words_that_say_what_they_hold(tmp_path: Path, name: str) -> None:
    kinds, message = REFUSED[name]
    makers = {**COMPANIONS, "image": (fields.RGBImageField, picture), "custom": (Custom, float)}
    path = stock(
        tmp_path / "a.beton",
        {field: makers[kind][0]() for field, kind in kinds.items()},
        [tuple(makers[kind][1](i) for kind in kinds.values()) for i in range(3)],
    )
    with pytest.raises(BetonError, match=message) as error:
        BetonReader(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def stock_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    arrangement = ("bytes", ("photo", "jpg"), "json", ("label", "label"))
    return written(tmp_path_factory.mktemp("stock") / "a.beton", arrangement, 12, 1)


def patch(path: Path, place: int, value: int) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(bytes([value]))


def test_no_damage_leads_outside_the_file(stock_file: Path, tmp_path: Path) -> None:
    content = stock_file.read_bytes()
    table = int.from_bytes(content[16:24], "little")
    fields_end = 24 + 4 * 1041
    itemsize = 56  # 16 bytes, 13 of an image, 16, and a number of 8 that begins at a multiple of 8
    places = [*range(24), *range(24, fields_end, 61), *range(fields_end, fields_end + 12 * itemsize)]
    places += range(table, len(content))
    accepted = 0
    path = shutil.copy(stock_file, tmp_path / "a.beton")
    for place in places:
        for flip in (0x01, 0x80, 0xFF):
            patch(path, place, content[place] ^ flip)
            try:
                reader = BetonReader(path)
            except BetonError:
                continue
            accepted += 1
            end_N = reader.pointer_N.astype(object) + reader.size_N
            assert (end_N <= len(content)).all()
            assert (reader.size_N > 0).all()
            assert len(reader.label_N) == reader.num_samples == 12
        patch(path, place, content[place])
    assert 0 < accepted < 3 * len(places), "labels, sizes and names may differ unnoticed, pointers may not"


def test_cut_stock_files_are_refused(stock_file: Path, tmp_path: Path) -> None:
    content = stock_file.read_bytes()
    for length in [*range(0, 6000, 397), len(content) // 2, len(content) - 24, len(content) - 1]:
        (tmp_path / "a.beton").write_bytes(content[:length])
        with pytest.raises(BetonError):
            BetonReader(tmp_path / "a.beton")


def test_splits_follow_the_names_and_what_is_of_none_is_named(tmp_path: Path) -> None:
    folder = stock_set(tmp_path / "set", 5, 3)
    found = open_betons(folder)
    assert {split: [r.num_samples for r in readers] for split, readers in found.splits.items()} == {
        "train": [5],
        "val": [3],
    }
    assert found.classes == ("0", "1", "2", "3")
    (folder / "val.beton").rename(folder / "cifar_test_8.ffcv")
    (folder / "train.beton").rename(folder / "cifar_train_8.FFCV")
    (folder / "more.beton").write_bytes((folder / "cifar_train_8.FFCV").read_bytes())
    (folder / "ant").mkdir()
    (folder / "1.jpg").write_bytes(b"")
    found = open_betons(folder)
    assert [r.path.name for r in found.splits["val"]] == ["cifar_test_8.ffcv"]
    assert found.unused.reasons == {
        "files whose names are of no split": (1, ["more.beton"]),
        "folders beside .beton files": (1, ["ant"]),
        "images beside what is read (.jpg)": (1, ["1.jpg"]),
    }
    assert not open_betons(folder / "more.beton").unused.count
    assert list(open_betons(folder / "more.beton").splits) == ["train"]


def labelled(path: Path, labels: list[int]) -> Path:
    with BetonWriter(path, len(labels)) as writer:
        for label in labels:
            writer.write(bytes(12), 2, 2, label, raw=True)
    return path


def test_labels_are_classes_up_to_the_largest_and_negative_ones_are_none(tmp_path: Path) -> None:
    labelled(tmp_path / "train.beton", [3, -7, 0])
    labelled(tmp_path / "val.beton", [5])
    found = open_betons(tmp_path)
    assert found.classes == tuple("012345")
    assert [label_N.tolist() for label_N in found.label_S["train"]] == [[3, -1, 0]]
    labelled(tmp_path / "val.beton", [1 << 16])
    found = open_betons(tmp_path)
    assert found.classes == ()
    assert [label_N.tolist() for label_N in found.label_S["train"]] == [[-1, -1, -1]]
    assert "the label 65536 is more than 65535" in found.notes[0]
    labelled(tmp_path / "val.beton", [-(1 << 63)])
    assert open_betons(tmp_path).classes == tuple("0123")


def test_another_file_has_another_fingerprint(tmp_path: Path) -> None:
    def fingerprint(labels: list[int], more: bytes = b"") -> str:
        path = labelled(tmp_path / "a.beton", labels)
        if more:
            with open(path, "r+b") as file:
                file.seek(-24 * len(labels) - len(more), 2)
                file.write(more)
        return open_betons(path).fingerprint("train")

    first = fingerprint([1, 2, 3])
    assert fingerprint([1, 2, 3]) == first
    assert fingerprint([1, 3, 2]) != first
    assert fingerprint([1, 2]) != first
    assert fingerprint([1, 2, 3], b"other pixels") != first


def test_a_folder_of_none_and_a_fifo_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BetonError, match=r"no \.beton files"):
        open_betons(tmp_path)
    os.mkfifo(tmp_path / "train.beton")
    with pytest.raises(BetonError, match="not a regular file"):
        open_betons(tmp_path)
