"""The demo set: the same bytes every time, balanced classes, and nothing to be learnt from mean colour."""

import hashlib
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from fasttrain.dataprep import demo, motifs
from fasttrain.system.errors import UserError

COMMAND = pathlib.Path(demo.__file__)
COUNT = 400


def make_folders(out: pathlib.Path) -> pathlib.Path:
    for name in motifs.MOTIFS:
        (out / name).mkdir(parents=True)
    return out


def digests(out: pathlib.Path) -> dict[str, str]:
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.glob("*/*.jpg"))}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(COMMAND), *arguments], check=False, capture_output=True, text=True, timeout=60
    )


@pytest.fixture(scope="module")
def demo_set(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, subprocess.CompletedProcess[str]]:
    out = tmp_path_factory.mktemp("demo") / "new" / "set"
    return out, run(str(out), "--images", str(COUNT))


def test_command_writes_balanced_classes(demo_set: tuple[pathlib.Path, subprocess.CompletedProcess[str]]) -> None:
    out, finished = demo_set
    assert finished.returncode == 0, finished.stderr
    summary = json.loads(finished.stdout.splitlines()[-1])
    assert (summary["images"], summary["classes"]) == (COUNT, 10)
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == sorted(motifs.MOTIFS)
    assert {len(list((out / name).glob("*.jpg"))) for name in motifs.MOTIFS} == {COUNT // 10}
    assert not out.with_name("set.unfinished").exists()


def test_sizes_vary_within_bounds(demo_set: tuple[pathlib.Path, subprocess.CompletedProcess[str]]) -> None:
    out, _ = demo_set
    sizes = np.array([Image.open(path).size for path in out.glob("*/*.jpg")])
    assert sizes.min() >= 96
    assert sizes.max() <= 500
    assert (sizes.max(axis=1) <= 2 * sizes.min(axis=1)).all()
    assert len({tuple(size) for size in sizes.tolist()}) > 0.9 * COUNT


def test_bytes_depend_on_seed_and_index_only(
    demo_set: tuple[pathlib.Path, subprocess.CompletedProcess[str]], tmp_path: pathlib.Path
) -> None:
    """One thread drawing in another order gives the bytes that the command's gave; another seed does not."""
    expected = {name: digest for name, digest in digests(demo_set[0]).items() if int(pathlib.Path(name).stem) < 3}
    same, other = make_folders(tmp_path / "same"), make_folders(tmp_path / "other")
    for index in reversed(range(30)):
        demo.write_images(same, 0, range(index, index + 1))
    assert digests(same) == expected
    demo.write_images(other, 1, range(30))
    assert not set(digests(other).values()) & set(expected.values())


def test_mean_colour_does_not_tell_the_class(demo_set: tuple[pathlib.Path, subprocess.CompletedProcess[str]]) -> None:
    """Nearest class centroid of the mean RGB, fitted on half the images and tried on the rest: chance is 10 %."""
    out, _ = demo_set
    colour = np.array(
        [
            [np.asarray(Image.open(path)).mean(axis=(0, 1)) for path in sorted((out / name).glob("*.jpg"))]
            for name in motifs.MOTIFS
        ]
    )
    centroids, tried = colour[:, ::2].mean(axis=1), colour[:, 1::2]
    nearest = np.linalg.norm(tried[:, :, None] - centroids, axis=-1).argmin(axis=-1)
    assert (nearest == np.arange(10)[:, None]).mean() < 0.25


@pytest.mark.parametrize("name", motifs.MOTIFS)
def test_every_motif_fills_part_of_the_plane(name: str) -> None:
    """Both motif and background show: a tenth to nine tenths of the plane is inside."""
    rng = np.random.default_rng(0)
    u, v = motifs.motif_plane(200, 200, 25, rng)
    distance, row, column = motifs.MOTIFS[name](u, v, rng)
    assert distance.dtype == np.float32, "float64 would halve the speed"
    assert distance.shape == (200, 200) == np.broadcast_shapes(row.shape, column.shape)
    assert 0.1 < (distance < 0).mean() < 0.9


def test_whole_set_is_kept(demo_set: tuple[pathlib.Path, subprocess.CompletedProcess[str]]) -> None:
    out, _ = demo_set
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*.jpg")}
    again = run(str(out), "--images", str(COUNT))
    assert again.returncode == 0
    assert "kept" in again.stdout
    assert json.loads(again.stdout.splitlines()[-1])["images"] == COUNT
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*/*.jpg")}


def test_remains_of_a_killed_run_are_replaced(tmp_path: pathlib.Path) -> None:
    out, remains = tmp_path / "set", tmp_path / "set.unfinished"
    remains.mkdir()
    (remains / demo.SETTINGS_FILE).write_text("{}")
    (remains / "half.jpg").write_bytes(b"\xff\xd8")
    demo.write_set(demo.DemoConfig(out, images=10))
    assert len(digests(out)) == 10
    assert not remains.exists()
    assert not (out / "half.jpg").exists()


def test_failure_leaves_nothing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(out: pathlib.Path, config: demo.DemoConfig) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(demo, "draw_all", full_disk)
    with pytest.raises(OSError, match="no space"):
        demo.write_set(demo.DemoConfig(tmp_path / "set"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [("--images", "9"), ("--images", "many"), ("--seed", "-1"), ("--colour", "1")])
def test_bad_option_is_one_line(tmp_path: pathlib.Path, arguments: tuple[str, ...]) -> None:
    refused = run(str(tmp_path / "set"), *arguments)
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
    assert arguments[0] in refused.stderr
    assert not list(tmp_path.iterdir())


def test_folder_with_other_content_is_refused(
    demo_set: tuple[pathlib.Path, subprocess.CompletedProcess[str]], tmp_path: pathlib.Path
) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="exists"):
        demo.check(demo.DemoConfig(tmp_path))
    with pytest.raises(UserError, match="exists"):
        demo.check(demo.DemoConfig(demo_set[0], images=COUNT, seed=1))
