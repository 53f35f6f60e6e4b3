"""Plain files as a data set for training: what is said of them, and the images set apart for validation."""

import os
from pathlib import Path

import numpy as np
import pytest
from support.pictures import make_images

from fasttrain.dataprep.order import shuffled_splits
from fasttrain.dataprep.sources.folder import scan_folder
from fasttrain.input import open_dataset
from fasttrain.input.folder_store import FolderStore
from fasttrain.system.errors import DataError, UserError


def names(store: FolderStore) -> set[str]:
    return {store.name(i) for i in range(store.num_samples)}


def test_the_same_images_are_set_apart_as_by_a_conversion(tmp_path: Path) -> None:
    make_images(tmp_path, 3, 8)
    train, val = (FolderStore(tmp_path, split, val_fraction=0.25) for split in ("train", "val"))
    converted = shuffled_splits(scan_folder(tmp_path), 0.25, 0)
    for split, store in (("train", train), ("val", val)):
        assert names(store) == {str(tmp_path / sample.path) for sample in converted[split]}
    assert np.bincount(val.labels(np.arange(6))).tolist() == [2, 2, 2]
    assert train.fingerprint == val.fingerprint != FolderStore(tmp_path, "train").fingerprint


def test_nothing_is_set_apart_of_a_split_set_or_of_shards(image_folder: Path, shards: Path) -> None:
    with pytest.raises(DataError, match="has a validation split already"):
        open_dataset(image_folder, "train", val_fraction=0.1)
    with pytest.raises(UserError, match="--val-fraction is for plain image files"):
        open_dataset(shards, "train", val_fraction=0.1)
    with pytest.raises(DataError, match="has no 'val' split; it has: train"):
        open_dataset(image_folder / "train", "val")


def test_what_of_a_folder_is_not_used_is_said_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_images(tmp_path / "train", 2, 2)
    make_images(tmp_path / "val", 2, 2)
    make_images(tmp_path / "test", 2, 2)
    (tmp_path / "train/class0/a\x1b.jpg").symlink_to("nowhere")
    (tmp_path / "list.txt").write_text("text")
    for split in ("train", "val"):
        FolderStore(tmp_path, split)
    assert capfd.readouterr().err.splitlines() == [
        "note: 1 images can't be used, the first is train/class0/a\\x1b.jpg: a link that leads nowhere",
        "note: not used: files that are no images (.txt): 1, first list.txt; images of the split test: 4, first test",
    ]
    os.rename(tmp_path / "list.txt", tmp_path / "other.txt")
    monkeypatch.setenv("RANK", "1")
    FolderStore(tmp_path, "train")
    assert capfd.readouterr().err == ""
