"""Features: every image that can be read has one, and a label."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.loading import Numbers
from torch import nn

from fasttrain.engine.ranks import Ranks, given_back
from fasttrain.evaluation import extraction
from fasttrain.evaluation.features import LARGEST, Features, Preparation, extract, open_labelled
from fasttrain.formats.tar import TarShardReader
from fasttrain.input import LoaderError, Store, open_dataset
from fasttrain.system.errors import RunError, UserError

CPU = torch.device("cpu")


def extracted(store: Store, folder: Path) -> Features:
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return extract(network, store, folder, CPU, Preparation(16, (0.5,) * 3, (0.5,) * 3, 16, 1, 0.1))


def test_a_label_that_cannot_be_read_counts_as_an_image_that_cannot(
    tar_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(tar_shards, tmp_path / "data")
    with open(data / "train-00000.tar", "r+b") as file:
        file.seek(TarShardReader(data / "train-00000.tar").sample(0).label_at)
        file.write(b"x")
    train, _ = open_labelled(data, "auto", 16)
    found = extracted(train, tmp_path)
    assert len(found) == len(found.label_N) == train.num_samples - 1
    assert found.index_M.tolist() == list(range(1, train.num_samples))
    assert torch.equal(found.rows(slice(0, 2), CPU), torch.from_numpy(found.values_NF[1:3]))
    assert (found.label_N >= 0).all()
    assert "sample 0 of" in (errors := capsys.readouterr().err)
    assert "its .cls is no number of a class; left out" in errors


def test_ten_images_may_always_be_missing_and_each_is_named(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(image_folder, tmp_path / "data")
    images = sorted((data / "val").rglob("*.jpg"))
    for count in (10, 11):
        for image in images[:count]:
            image.write_bytes(image.read_bytes()[:60])
        if count == 10:
            assert len(extracted(open_dataset(data, "val"), tmp_path)) == 14
            assert capsys.readouterr().err.count("; left out") == 10
        else:
            with pytest.raises(LoaderError, match="11 images can't be read"):
                extracted(open_dataset(data, "val"), tmp_path)


def test_a_set_without_labels_is_refused_before_anything_is_computed(
    tar_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TarShardReader, "label", lambda *_: -1)
    with pytest.raises(UserError, match="has images without labels"):
        open_labelled(tar_shards, "auto", 16)


def test_one_image_without_a_label_is_found_by_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Numbers(40)
    monkeypatch.setattr(store, "labels", lambda index_N: np.where(index_N == 21, -1, 0))
    with pytest.raises(UserError, match="has images without labels"):
        extracted(store, tmp_path)


def test_features_that_are_no_numbers_are_counted_and_poison_no_others(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Odd(nn.Module):
        def forward(self, x_N3SS: torch.Tensor) -> torch.Tensor:
            out_NF = torch.ones(len(x_N3SS), 3)
            out_NF[0] = torch.tensor([float("nan"), float("inf"), 1e30])
            return out_NF

    largest = float(np.float32(LARGEST))
    preparation = Preparation(8, (0.5,) * 3, (0.5,) * 3, 32, 1, 0.0)
    features = extract(Odd(), open_dataset(shards, "val"), tmp_path, CPU, preparation)
    assert features.rows(slice(0, 2), CPU).tolist() == [[0, largest, largest], [1, 1, 1]]
    assert "warning: 1 of 24 images have features that are no numbers" in capsys.readouterr().err


def test_features_most_of_which_are_no_numbers_have_no_accuracy(shards: Path, tmp_path: Path) -> None:
    class Broken(nn.Module):
        def forward(self, x_N3SS: torch.Tensor) -> torch.Tensor:
            return torch.full((len(x_N3SS), 3), float("nan"))

    preparation = Preparation(8, (0.5,) * 3, (0.5,) * 3, 32, 1, 0.0)
    with pytest.raises(RunError, match="more than 10% of the images have features that are no numbers"):
        extract(Broken(), open_dataset(shards, "val"), tmp_path, CPU, preparation)


def test_a_large_set_is_in_no_more_files_than_a_process_may_have_open(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extraction, "MOST_PARTS", 3)
    store, found = open_dataset(shards), []
    with given_back():
        ranks = Ranks("cpu")
        for size in (store.num_samples, 1):
            preparation = Preparation(16, (0.5,) * 3, (0.5,) * 3, size, 1, 0.0)
            network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
            found.append(extraction.extract_on_all(network, store, tmp_path / str(size), ranks, preparation))
    assert len(list((tmp_path / "1").glob("*[0-9].npy"))) == 3
    np.testing.assert_allclose(found[1].values_NF[:], found[0].values_NF[:], rtol=1e-6, atol=1e-6)
    assert torch.equal(found[1].label_N, found[0].label_N)
