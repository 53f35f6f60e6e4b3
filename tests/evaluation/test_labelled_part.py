"""Which images keep their labels: a fraction of each class, or those of a list."""

import pathlib

import numpy as np
import pytest
from support.loading import Numbers

from fasttrain.evaluation.labelled_part import labels_of, listed, stratified
from fasttrain.input import open_dataset
from fasttrain.system.errors import DataError, UserError


def test_every_class_keeps_the_same_fraction_and_one_image_at_least() -> None:
    label_N = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, -1], [1000, 100, 3, 50]))
    tenth, hundredth = (stratified(label_N, fraction, 0) for fraction in (0.1, 0.01))
    assert np.bincount(label_N[tenth]).tolist() == [100, 10, 1]
    assert np.bincount(label_N[hundredth]).tolist() == [10, 1, 1]
    assert set(hundredth) <= set(tenth)
    assert (np.diff(tenth) > 0).all()


def test_the_fraction_follows_from_the_seed_alone() -> None:
    label_N = np.arange(400) % 4
    assert stratified(label_N, 0.1, 1).tolist() == stratified(label_N, 0.1, 1).tolist()
    assert stratified(label_N, 0.1, 1).tolist() != stratified(label_N, 0.1, 2).tolist()


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> Numbers:
    """A store of 400 images, called as those of ImageNet are."""
    store = Numbers(400)
    monkeypatch.setattr(store, "source_name", lambda i: f"n{i % 4}/n{i % 4}_{i}.JPEG", raising=False)
    return store


def test_a_list_of_simclrs_names_images_without_folders(named: Numbers, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "1percent.txt"
    path.write_text("n3_399.JPEG\nn1_5.JPEG\n\nn1_5.JPEG\n")
    assert listed(named, path).tolist() == [5, 399]
    path.write_bytes(b"\xef\xbb\xbfn3/n3_399.JPEG\r\nn1_5.JPEG\r\n")
    assert listed(named, path).tolist() == [5, 399]


def test_names_of_no_image_are_told_and_too_many_are_an_error(
    named: Numbers, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "list.txt"
    lines = [f"n{i % 4}_{i}.JPEG" for i in range(200)]
    path.write_text("\n".join([*lines, "n9_1.JPEG"]))
    assert listed(named, path).tolist() == list(range(200))
    assert "1 of 201 names are of no training image, such as n9_1.JPEG" in capsys.readouterr().err
    path.write_text("\n".join([*lines[:10], "n9_1.JPEG"]))
    with pytest.raises(UserError, match=r"1 of 11 names .* an image is called n0/n0_0.JPEG"):
        listed(named, path)


def test_a_name_of_several_images_an_empty_list_and_one_that_is_no_text_are_errors(
    image_folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    store, path = open_dataset(image_folder, "train"), tmp_path / "list.txt"
    path.write_text("000.jpg\n")
    with pytest.raises(UserError, match=r"000\.jpg is the name of 4 images"):
        listed(store, path)
    path.write_text("class1/000.jpg\n")
    assert [store.source_name(i) for i in listed(store, path)] == ["train/class1/000.jpg"]
    for content, said in ((b"\n", "names no image"), (b"\xff\xfe\n", "no text of names")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=said):
            listed(store, path)
    with pytest.raises(UserError, match="No such file"):
        listed(store, tmp_path / "none.txt")


def test_labels_that_cannot_be_read_are_left_out_and_missing_ones_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Numbers(5)

    def labels(index_N: np.ndarray) -> np.ndarray:
        if index_N[0] == 2:
            raise DataError("damaged")
        return index_N

    monkeypatch.setattr(store, "labels", labels)
    assert labels_of(store).tolist() == [0, 1, -1, 3, 4]
    monkeypatch.setattr(store, "labels", lambda _: np.array([-1]))
    with pytest.raises(UserError, match="number 0 has no label"):
        labels_of(store)
