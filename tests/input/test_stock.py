"""What stock FFCV wrote is trained on as it is, by every loader, and evaluated."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.commands import one_line_of
from support.launch import train
from support.loading import images
from support.stock import picture, stock, stock_set

from fasttrain.evaluate import main as evaluate
from fasttrain.formats.beton import BetonWriter
from fasttrain.input import Order, open_dataset, open_loader, pixel_statistics
from fasttrain.system.errors import DataError

fields = pytest.importorskip("ffcv.fields")


@pytest.fixture(scope="module", params=["jpg", "raw"])
def betons(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stock_set(tmp_path_factory.mktemp("stock") / "set", mode=request.param)


def all_of(path: Path, split: str, loader: str) -> dict[int, tuple[int | None, np.ndarray]]:
    store = open_dataset(path, split, loader)
    made = open_loader(store, Order(store.num_samples, 8, shuffle=False), 2, loader, labels=True)
    found = {i: (label, pixels) for batch in made.epoch(0) for i, label, pixels in images(batch)}
    made.close()
    return found


@pytest.mark.parametrize("loader", ["auto", "ffcv", "resident", "dali"])
def test_every_loader_takes_it(betons: Path, loader: str, request: pytest.FixtureRequest) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
        if "raw" in request.node.name:
            pytest.skip("DALI decodes JPEGs")
    for split, count in (("train", 40), ("val", 12)):
        found = all_of(betons, split, loader)
        assert sorted(found) == list(range(count))
        for i, (label, pixels) in found.items():
            assert label == i % 4
            assert np.abs(pixels.astype(int) - picture(i, 36 + i % 5, 40 + i % 7)).mean() < 4


def test_one_file_is_a_training_split_without_another(betons: Path) -> None:
    store = open_dataset(betons / "val.beton", "train")
    assert (store.num_samples, store.classes) == (12, tuple("0123"))
    assert store.name(3) == store.place(3) == f"sample 3 of {betons / 'val.beton'}"
    assert pixel_statistics(betons / "val.beton", "auto")[0] == (0.485, 0.456, 0.406)
    with pytest.raises(DataError, match=r"no 'val' split: it takes a folder with train.beton and val.beton"):
        open_dataset(betons / "val.beton", "val")


def test_it_is_trained_on_with_knn_and_evaluated(
    betons: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(betons, tmp_path / "run", "--epochs", 2, "--knn-every", 1) == 0
    assert evaluate([str(tmp_path / "run"), "--data", str(betons), "--knn"]) == 0
    assert "knn_top1" in json.loads(capfd.readouterr().out.splitlines()[-1])


def test_a_run_notices_another_file(betons: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = shutil.copytree(betons, tmp_path / "data")
    assert train(data, tmp_path / "run", "--max-steps", 2) == 0
    shutil.copy(data / "train.beton", data / "same.beton")
    os.replace(data / "same.beton", data / "train.beton")
    assert train(data, tmp_path / "run", "--max-steps", 3) == 0
    with open(data / "train.beton", "r+b") as file:
        file.seek(24 + 3 * 1041 + 32)  # the label of the first sample
        file.write(b"\3")
    capfd.readouterr()
    assert train(data, tmp_path / "run", "--max-steps", 4) != 0
    assert "a checkpoint of a run begun with other images" in one_line_of(capfd.readouterr().err)


def test_labels_too_large_for_classes_are_said_once_and_training_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kinds = {"image": fields.RGBImageField(), "identifier": fields.IntField()}
    path = stock(tmp_path / "a.beton", kinds, [(picture(i), 10**9 + i) for i in range(20)])
    assert train(path, tmp_path / "run", "--max-steps", 1) == 0
    open_dataset(path, "train")  # as kNN opens it again
    error = capfd.readouterr().err
    assert error.count(f"note: {path} counts as unlabelled: the label 1000000019 is more than 65535") == 1


def test_a_file_that_is_no_beton_and_an_unfinished_conversion_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(DataError, match="a file: convert it first"):
        open_dataset(tmp_path / "a.png", "train")
    with BetonWriter(tmp_path / "train-00000.beton", 1) as writer:
        writer.write(bytes(12), 2, 2, 0, raw=True)
    (tmp_path / "conversion.json").write_text("{}")
    with pytest.raises(DataError, match="an unfinished conversion"):
        open_dataset(tmp_path, "train")


def test_a_claim_of_gigabytes_is_a_bad_sample_not_an_allocation(tmp_path: Path) -> None:
    with BetonWriter(tmp_path / "a.beton", 1) as writer:
        writer.write(b"\xff\xd8", 65535, 65535, 0)
    store = open_dataset(tmp_path / "a.beton", "train")
    with pytest.raises(DataError, match="pixels"):
        store.read(0)
