"""The protocols over images as they are asked for: which images each trains on, and what it says of itself."""

import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from support.forks import on_ranks
from torch import nn

from fasttrain.engine.ranks import Ranks
from fasttrain.evaluation import labelled_part
from fasttrain.evaluation.features import Preparation
from fasttrain.evaluation.options import OverImagesOptions
from fasttrain.evaluation.over_images import Ranked, over_images
from fasttrain.input import located, open_dataset
from fasttrain.input.places import Place
from fasttrain.system.errors import UserError

PREPARATION = Preparation(8, (0.5,) * 3, (0.25,) * 3, 16, 1, 0.0)


def done(data: pathlib.Path, work: pathlib.Path, place: Place | None = None, **options: Any) -> list[Ranked]:
    asked = OverImagesOptions(supervised_epochs=1, supervised_batch_size=16, **options)
    train, val = open_dataset(data, "train"), open_dataset(data, "val")
    encoder = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    encoder.append(nn.Linear(12, 6))
    return list(over_images(asked, "small", encoder, train, val, PREPARATION, work, Ranks("cpu"), 0, place))


def test_images_are_shuffled_as_training_does_and_a_figure_says_so(
    shards: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fasttrain.input.shuffle.network_file_system", lambda path: "nfs4")
    ranked = [done(shards, tmp_path, place, linear_moco=True, semi=(0.5,)) for place in (None, located(shards))]
    shuffles = [found.settings.get("shuffle") for each in ranked for found in each]
    assert shuffles == [None, None, "block, 3 shards at once", None], "by blocks where most of them are wanted"
    assert len(list(tmp_path.iterdir())) == 2, "a folder for each protocol"
    assert all(len(list(folder.iterdir())) == 2 for folder in tmp_path.iterdir()), "one does not go on from the other"


def test_each_protocol_tells_its_settings_and_the_images_that_it_was_trained_on(
    shards: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    store = open_dataset(shards, "train")
    path = tmp_path / "tenpercent.txt"
    path.write_text("\n".join(store.source_name(i) for i in range(0, 72, 6)))
    found = done(
        shards, tmp_path / "work", linear_moco=True, finetune=True, semi=(0.1, 0.5), semi_files=(str(path),)
    )  # fmt: skip
    told = [(each.protocol, each.variant, each.settings["train_images"], each.settings["labels"]) for each in found]
    assert told == [
        ("linear_moco", "", 72, "all"), ("finetune", "", 72, "all"),
        ("semi", "10pct", 8, "10 % of each class, by the seed"),
        ("semi", "50pct", 36, "50 % of each class, by the seed"), ("semi", "tenpercent", 12, "those of tenpercent.txt"),
    ]  # fmt: skip
    assert [each.settings["batch_size"] for each in found] == [16, 16, 8, 16, 8]
    assert all(each.settings["epochs"] == 1 for each in found)
    assert [each.settings["steps"] for each in found] == [4, 4, 1, 2, 1]  # of 72, 72, 8, 36 and 12 images
    assert all(each.ranked_Nr.shape == (24, 4) and each.ranked_Nr.dtype == torch.int64 for each in found)
    assert len(list((tmp_path / "work").iterdir())) == 5


def test_only_what_is_asked_for_is_done_and_wrong_lists_come_before_any_training(
    shards: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert done(shards, tmp_path) == []
    monkeypatch.setattr("fasttrain.evaluation.over_images.train_classifier", lambda *_: 1 / 0)
    path = tmp_path / "list.txt"
    path.write_text("none.jpg\n")
    with pytest.raises(UserError, match="1 of 1 names are of no training image"):
        done(shards, tmp_path, linear_moco=True, semi_files=(str(path),))


def semi_on_rank(data: pathlib.Path, work: pathlib.Path, path: pathlib.Path) -> int:
    labelled_part.MAX_UNMATCHED = 0.5
    (found,) = done(data, work, semi_files=(str(path),))
    return found.settings["train_images"]


def test_ranks_read_a_list_once_and_train_on_the_same_images(shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    store, path = open_dataset(shards, "train"), tmp_path / "most.txt"
    names = [store.source_name(i) for i in range(60)]
    path.write_text("\n".join([*names, "none.jpg"]))
    both = on_ranks(tmp_path, 2, semi_on_rank, shards, tmp_path / "work", path)
    assert [one.returncode for one in both] == [60, 60], both
    assert [one.stderr.count("names are of no training image") for one in both] == [1, 0]


def test_figures_of_two_parts_of_one_name_would_be_alike() -> None:
    with pytest.raises(UserError, match="name two parts alike"):
        OverImagesOptions(semi_files=("a/1percent.txt", "b/1percent.txt"))
    with pytest.raises(UserError, match="name two parts alike"):
        OverImagesOptions(semi=(0.01,), semi_files=("a/1pct.txt",))
    with pytest.raises(UserError, match="--semi must be above 0 and at most 1"):
        OverImagesOptions(semi=(0.0,))


def test_the_drawn_part_is_of_the_images_labels(shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (found,) = done(shards, tmp_path, semi=(0.01, 0.01))
    assert found.settings["train_images"] == len(np.unique(open_dataset(shards, "train").labels(np.arange(72))))
