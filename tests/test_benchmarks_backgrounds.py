"""Photographs alone and with shapes on them, as a set for SepCLR."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from benchmarks.backgrounds import SHAPES, main, with_shape


@pytest.fixture
def source(tmp_path: pathlib.Path) -> pathlib.Path:
    for split, count in (("train", 20), ("test", 10)):
        for name in ("cat", "dog"):
            folder = tmp_path / "source" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (32, 24), (number, 100, 100)).save(folder / f"{number}.png")
    return tmp_path / "source"


def draw(source: pathlib.Path, out: pathlib.Path, *words: object) -> int:
    return main([str(word) for word in (source, out, "--train", 32, "--test", 16, *words)])


def images(out: pathlib.Path, what: str, split: str) -> dict[str, list[pathlib.Path]]:
    return {folder.name: sorted(folder.iterdir()) for folder in sorted((out / what / split).iterdir())}


def test_half_of_the_images_are_photographs_alone_and_shapes_are_even(
    source: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    assert draw(source, tmp_path / "out") == 0
    for split, count in (("train", 32), ("test", 16)):
        found = images(tmp_path / "out", "shapes", split)
        assert list(found) == ["background", *SHAPES]
        each = count // 2 // len(SHAPES)
        assert {name: len(files) for name, files in found.items()} == {
            "background": count // 2,
            **dict.fromkeys(SHAPES, each),
        }
        for name, files in found.items():
            colours = [len(Image.open(file).getcolors()) for file in files]
            assert all((colour == 1) == (name == "background") for colour in colours)


def test_targets_stand_by_their_photograph_s_class_once_more_as_links(
    source: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    assert draw(source, tmp_path / "out") == 0
    (tmp_path / "out").rename(tmp_path / "moved")
    for split in ("train", "test"):
        by_shape = images(tmp_path / "moved", "shapes", split)
        by_class = images(tmp_path / "moved", "photographs", split)
        assert set(by_class) <= {"cat", "dog"}
        links = [link for files in by_class.values() for link in files]
        assert all(link.is_symlink() for link in links)
        targets = {file for name in SHAPES for file in by_shape[name]}
        assert {link.resolve() for link in links} == {file.resolve() for file in targets}


def test_a_seed_draws_the_same_set_and_another_one_another(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        assert draw(source, tmp_path / name, "--seed", seed) == 0
    one, same, other = (
        [file.read_bytes() for files in images(tmp_path / name, "shapes", "train").values() for file in files]
        for name in ("one", "same", "other")
    )
    assert one == same
    assert one != other


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_wholly_on_the_image_and_takes_a_modest_part_of_it(shape: str) -> None:
    for seed in range(30):
        drawn = np.asarray(with_shape(Image.new("RGB", (40, 32)), shape, np.random.default_rng(seed)))
        covered = drawn.any(2)
        assert 0.02 < covered.mean() < 0.25
        assert max(np.ptp(places) + 1 for places in covered.nonzero()) <= 0.55 * 32 + 2


def test_what_can_t_be_is_refused_and_leaves_nothing(
    source: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert draw(source, tmp_path / "out", "--test", 21) == 2
    assert "has 20 images in folders of classes, fewer than 21" in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["source"]
    assert draw(source, source) == 2
    assert "exists already" in capsys.readouterr().err
