"""Existing .beton files as a source: JPEG streams pass through, pixels are encoded, splits and labels stay."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.commands import one_line_of
from support.pictures import make_images
from support.stock import picture, stock, stock_set

from fasttrain.dataprep import convert, verify
from fasttrain.dataprep.sources.kinds import open_source
from fasttrain.formats.beton import MODE_RAW, BetonReader, BetonWriter
from fasttrain.formats.manifest import Manifest


def streams(path: Path) -> list[bytes]:
    reader = BetonReader(path)
    places = zip(reader.pointer_N.tolist(), reader.size_N.tolist(), strict=True)
    return [reader.data[start : start + size].tobytes() for start, size in places]


def test_streams_of_stock_ffcv_pass_through(tmp_path: Path) -> None:
    data, out = stock_set(tmp_path / "set"), tmp_path / "out"
    assert convert.main([str(data), str(out), "--workers", "1"]) == 0
    manifest = Manifest.load(out)
    assert manifest.classes == list("0123")
    assert manifest.class_counts == {"train": [10] * 4, "val": [3] * 4}
    for split in ("train", "val"):
        assert sorted(streams(out / f"{split}-00000.beton")) == sorted(streams(data / f"{split}.beton"))
    assert (out / "val-00000.names").read_text().splitlines()[0].startswith("val.beton/")


def test_pixels_of_stock_ffcv_are_encoded_and_shrunk(tmp_path: Path) -> None:
    data, out = stock_set(tmp_path / "set", mode="raw"), tmp_path / "out"
    assert (
        convert.main([str(data / "train.beton"), str(out), "--write", "jpeg", "--max-side", "20", "--workers", "1"])
        == 0
    )
    reader = BetonReader(out / "train-00000.beton")
    assert not (reader.mode_N == MODE_RAW).any()
    assert (np.maximum(reader.height_N, reader.width_N) == 20).all()
    source = open_source(data / "val.beton")
    sample = source.splits["train"][7]
    assert np.array_equal(source.reader.read(sample), picture(7, 36 + 2, 40))
    assert sample.label == 3


def test_identifiers_are_numbered_and_a_file_of_no_split_is_named(tmp_path: Path) -> None:
    fields = pytest.importorskip("ffcv.fields")
    kinds = {"image": fields.RGBImageField(write_mode="jpg"), "wordnet": fields.IntField()}
    stock(tmp_path / "train.beton", kinds, [(picture(i), 10**6 + i % 2) for i in range(6)])
    shutil.copy(tmp_path / "train.beton", tmp_path / "more.beton")
    source = open_source(tmp_path)
    assert source.classes == ("1000000", "1000001")
    assert sorted(sample.label for sample in source.splits["train"]) == [0, 0, 0, 1, 1, 1]
    assert source.unused.reasons == {"files whose names are of no split": (1, ["more.beton"])}
    assert not source.notes


def test_a_sample_that_claims_too_much_is_skipped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with BetonWriter(tmp_path / "a.beton", 2) as writer:
        writer.write(picture(1).tobytes(), 24, 32, 0, raw=True)
        writer.write(b"\xff\xd8 no JPEG", 65535, 65535, 0)
    assert convert.main([str(tmp_path / "a.beton"), str(tmp_path / "out"), "--workers", "1"]) == 3
    assert "skipped a.beton/1: " in capfd.readouterr().err


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    make_images(tmp_path / "source", 2, 6)
    out = tmp_path / "out"
    assert convert.main([str(tmp_path / "source"), str(out), "--val-fraction", "0.5", "--workers", "1"]) == 0
    return out


def test_a_converted_set_keeps_its_names_odd_ones_too(tmp_path: Path) -> None:
    make_images(tmp_path / "source", 1, 3)
    names = ["a\nb.jpg", "back\\slash.jpg", "\udcff.jpg"]
    for old, new in zip(sorted((tmp_path / "source/class0").iterdir()), names, strict=True):
        old.rename(old.with_name(new))
    assert convert.main([str(tmp_path / "source"), str(tmp_path / "out"), "--workers", "1"]) == 0
    assert convert.main([str(tmp_path / "out"), str(tmp_path / "again"), "--workers", "1", "--seed", "5"]) == 0
    first, second = (sorted((tmp_path / out / "train-00000.names").read_bytes().split()) for out in ("out", "again"))
    assert first == second
    assert {sample.path for sample in open_source(tmp_path / "out").splits["train"]} == {f"class0/{n}" for n in names}


def test_a_converted_set_without_its_names_is_said_to_be(
    converted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (converted / "train-00000.names").unlink()
    source = open_source(converted)
    assert f"note: samples of {converted / 'train-00000.beton'} go without their names" in capfd.readouterr().err
    assert [sample.path for sample in source.splits["train"]] == [f"train-00000.beton/{i}" for i in range(6)]
    assert all(sample.path.startswith("class") for sample in source.splits["val"])
    assert source.classes == ("class0", "class1")


def test_a_converted_set_that_is_damaged_is_one_line(
    converted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((converted / "manifest.json").read_bytes())
    content["classes"], content["class_counts"] = ["one"], {"train": [6], "val": [6]}
    (converted / "manifest.json").write_text(json.dumps(content))
    capfd.readouterr()
    assert convert.main([str(converted), str(tmp_path / "again")]) == 2
    assert "a label is none of the 1 classes" in one_line_of(capfd.readouterr().err)
    (converted / "train-00000.beton").write_bytes(b"x")
    assert convert.main([str(converted), str(tmp_path / "again")]) == 2
    assert "train-00000.beton: 1 bytes" in one_line_of(capfd.readouterr().err)


def test_an_unfinished_conversion_is_no_source_and_no_data_set(
    converted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (converted / "manifest.json").rename(converted / "conversion.json")
    capfd.readouterr()
    assert convert.main([str(converted), str(tmp_path / "again")]) == 2
    assert "an unfinished conversion" in one_line_of(capfd.readouterr().err)
    assert verify.main([str(converted)]) == 2
    assert "is not a converted data set" in one_line_of(capfd.readouterr().err)
