"""fasttrain.formats.splits: names that speak of a split, and those that only sound like one."""

import pytest

from fasttrain.formats.splits import is_neutral, pick, split_of, splits_of


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *((name, "train") for name in ("train", "Training", "TRAIN", "train2017", "trainset", "TrainData")),
        *((name, "train") for name in ("ILSVRC2012_img_train", "imagenet-train", "train_64x64", "partial-train")),
        *((name, "trainval") for name in ("trainval", "train_val", "VOC2012_trainval")),
        *((name, "unlabeled") for name in ("unlabeled", "unlabelled_images")),
        ("val2017", "val"), ("valid", "valid"), ("Validation", "validation"), ("dev", "dev"), ("eval", "eval"),
        ("Testing", "test"), ("testset", "test"), ("TEST", "test"), ("test-images", "test"),
        *((name, "") for name in ("bullet_train", "train_station", "training_shoe", "test_tube", "valley", "devil")),
        *((name, "") for name in ("images", "data", "0", "trains", "train_test_split", "été", "")),
    ],
)  # fmt: skip
def test_a_folder_is_a_split_if_its_whole_name_says_so(name: str, split: str) -> None:
    assert split_of(name, whole=True) == split


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("set-train-00000-of-00002", "train"), ("x_test", "test"), ("cc3m_val_000", "val"), ("photos", ""),
        ("train_test", ""),
    ],
)  # fmt: skip
def test_a_file_is_of_a_split_that_its_name_holds(name: str, split: str) -> None:
    assert split_of(name) == split


def test_of_several_validation_splits_the_usual_one_is_picked() -> None:
    assert pick(["test", "dev", "val", "train"]) == ("train", "val")
    assert pick(["test", "dev", "trainval", ""]) == ("trainval", "dev")
    assert pick(["unlabeled", "test"]) == ("unlabeled", "test")
    assert pick(["", ""]) == ("", "")


def test_a_neutral_name_is_that_of_no_class() -> None:
    assert all(map(is_neutral, ("images", "JPEGImages", "img", "data2")))
    assert not any(map(is_neutral, ("apple", "0", "", "image_of_apples")))


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["DIV2K_train_HR", "DIV2K_valid_HR"], ["train", "valid"]),
        (["seg_pred", "seg_test", "seg_train"], ["", "test", "train"]),
        (["bullet_train", "train_station"], ["", ""]),
        (["bullet_train", "driving_test"], ["", ""]),
        (["cat_train", "cat_val", "dog_train", "dog_val"], ["", "", "", ""]),  # two pairs
        (["train", "val", "seg_train", "seg_val"], ["train", "val", "", ""]),
    ],
)
def test_names_of_a_pair_are_splits_whatever_else_they_hold(names: list[str], splits: list[str]) -> None:
    assert splits_of(names) == dict(zip(names, splits, strict=True))
