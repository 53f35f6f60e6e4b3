"""dataprep/verify.py: every kind of damage is named, and nothing else is."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.clock import Clock
from support.commands import ROOT, one_line, one_line_of
from support.forks import RunCommand
from support.pictures import make_images
from support.stock import stock_set

from fasttrain.dataprep import convert, verify
from fasttrain.dataprep.shards import checksum
from fasttrain.formats.beton import BetonReader
from fasttrain.formats.manifest import Manifest
from fasttrain.input import open_dataset
from fasttrain.system import watch
from fasttrain.system.errors import DataError

OPTIONS = ("--shard-size", "10", "--workers", "2")


@pytest.fixture(scope="module", params=["ffcv", "webdataset"])
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    make_images(folder / "source", 3, 8)
    assert convert.main([str(folder / "source"), str(folder / "out"), "--format", request.param, *OPTIONS]) == 0
    return folder / "out"


def problems_of(out: Path, *options: str, capfd: pytest.CaptureFixture[str]) -> list[str]:
    capfd.readouterr()
    status = verify.main([str(out), "--workers", "1", *options])
    *lines, last = capfd.readouterr().out.splitlines()
    result = json.loads(last)
    assert lines == result["problems"]
    assert result["ok"] == (not lines)
    assert status == (verify.EXIT_PROBLEMS if lines else 0)
    return lines


@pytest.mark.parametrize("options", [(), ("--deep",)])
def test_a_sound_set(sound: Path, options: tuple, capfd: pytest.CaptureFixture[str]) -> None:
    assert problems_of(sound, *options, capfd=capfd) == []


def test_the_list_of_skipped_images_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fasttrain.dataprep.totals.LISTED_SKIPS", 1)
    root, out = make_images(tmp_path / "source", 2, 3), tmp_path / "out"
    for name in ("a.jpg", "b.jpg"):
        (root / "class0" / name).write_bytes(b"")
    assert convert.main([str(root), str(out), *OPTIONS]) == convert.EXIT_SKIPPED
    far = f"memory://{tmp_path.name}"
    memory = pytest.importorskip("fsspec").filesystem("memory")
    memory.put(str(out), far, recursive=True)
    listed = out / "skipped.txt"
    assert problems_of(out, capfd=capfd) == []
    flip(listed, 0)
    assert problems_of(out, capfd=capfd) == [f"{listed}: the content has changed (another SHA-256)"]
    listed.write_text("")
    assert f"{listed}: 0 bytes, but" in problems_of(out, capfd=capfd)[0]
    listed.unlink()
    assert problems_of(out, capfd=capfd) == [f"{listed}: missing"]
    assert verify.main([far]) == 0
    memory.rm(f"{far}/skipped.txt")
    assert verify.main([far]) == verify.EXIT_PROBLEMS
    assert f"{far}/skipped.txt: missing" in capfd.readouterr().out


def test_a_list_of_skipped_images_that_the_manifest_does_not_name(
    sound: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(sound, tmp_path / "out")
    (out / "skipped.txt").touch()
    assert problems_of(out, capfd=capfd) == [f"{out}/skipped.txt: not in manifest.json"]


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


def shard(out: Path, number: int) -> Path:
    return next(p for p in sorted(out.iterdir()) if p.stem == f"train-{number:05d}" and p.suffix in (".beton", ".tar"))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda out: shard(out, 0).unlink(), "missing"),
    "cut": (lambda out: shard(out, 1).write_bytes(shard(out, 1).read_bytes()[:-700]), "bytes, but the manifest says"),
    "one byte": (lambda out: flip(shard(out, 1), shard(out, 1).stat().st_size // 2), "the content has changed"),
    "unknown": (lambda out: shutil.copy(shard(out, 0), out / f"train-00009{shard(out, 0).suffix}"), "not in manifest"),
    "swapped": (lambda out: shutil.copy(shard(out, 2), shard(out, 1)), "train-00001.* the manifest says|has changed"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(sound: Path, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    out = shutil.copytree(sound, tmp_path / "out")
    damage, message = DAMAGE[name]
    damage(out)
    problems = problems_of(out, capfd=capfd)
    assert any(re.search(message, problem) for problem in problems), problems
    assert {Path(problem.split(":")[0]).stem for problem in problems} <= {"train-00000", "train-00001", "train-00009"}


def restate(out: Path, name: str) -> None:
    """Put what a shard is now into the manifest, so that only its content can give it away."""
    content = json.loads((out / "manifest.json").read_bytes())
    for entry in content["splits"]["train"]:
        if entry["name"] == name:
            entry.update(num_bytes=(out / name).stat().st_size, sha256=checksum(out / name))
    (out / "manifest.json").write_text(json.dumps(content))


def test_deep_finds_an_image_that_does_not_decode(
    sound: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(sound, tmp_path / "out")
    path = shard(out, 0)
    data = bytearray(path.read_bytes())
    start = data.index(b"\xff\xda") + 14
    data[start : start + 60] = bytes(60)
    data[start + 20 : start + 22] = b"\xff\xd9"  # the end of the image, too early
    path.write_bytes(data)
    restate(out, path.name)
    assert problems_of(out, capfd=capfd) == []
    (problem,) = problems_of(out, "--deep", capfd=capfd)
    assert re.search(rf"sample 0 of {path} \(class\d/\d+\.jpg\): ", problem)


def test_counts_and_labels(sound: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = shutil.copytree(sound, tmp_path / "out")
    content = json.loads((out / "manifest.json").read_bytes())
    content["splits"]["train"][0]["num_samples"] += 1
    content["classes"], content["class_counts"] = ["one"], {"train": [24]}
    (out / "manifest.json").write_text(json.dumps(content))
    problems = problems_of(out, capfd=capfd)
    assert "10 samples, but the manifest says 11" in problems[0]
    assert "a label outside the 1 classes" in problems[1]


def test_names_that_leave_the_folder(sound: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = shutil.copytree(sound, tmp_path / "out")
    content = json.loads((out / "manifest.json").read_bytes())
    content["splits"]["train"][0]["name"] = "../secret.beton"
    (out / "manifest.json").write_text(json.dumps(content))
    assert verify.main([str(out)]) == 2
    assert "splits['train'][0].name: '../secret.beton' is no plain file name" in one_line_of(capfd.readouterr().err)


def test_a_count_of_a_class_that_is_wrong_is_named(
    sound: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(sound, tmp_path / "out")
    content = json.loads((out / "manifest.json").read_bytes())
    content["class_counts"]["train"] = [8, 9, 7]
    (out / "manifest.json").write_text(json.dumps(content))
    (problem,) = problems_of(out, capfd=capfd)
    assert problem == "manifest.json: 9 samples of 'class1' in train, but the shards hold 8"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: flip(path, 3), "the content has changed"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, but the manifest says"),
    ],
)
def test_damaged_names_are_a_problem_here_and_none_in_training(
    sound: Path, tmp_path: Path, damage: Callable[[Path], object], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(sound, tmp_path / "out")
    damage(out / "train-00001.names")
    (problem,) = problems_of(out, capfd=capfd)
    assert f"train-00001.names: {message}" in problem or message in problem
    assert open_dataset(out, "train").num_samples == 24


def test_names_that_are_too_few_are_found_by_their_number(
    sound: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(sound, tmp_path / "out")
    path = out / "train-00001.names"
    path.write_text("one\n")
    content = json.loads((out / "manifest.json").read_bytes())
    content["splits"]["train"][1]["names"].update(num_bytes=4, sha256=checksum(path))
    (out / "manifest.json").write_text(json.dumps(content))
    assert problems_of(out, capfd=capfd) == [f"{path}: not a name for each of 10 samples"]


def test_a_flipped_bit_of_a_label_is_named_here_and_one_line_elsewhere(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_images(tmp_path / "source", 3, 8)
    out = tmp_path / "out"
    assert convert.main([str(tmp_path / "source"), str(out), "--workers", "1"]) == 0
    path = out / "train-00000.beton"
    label_at = 24 + 2 * 1041 + 5 * 24 + 16
    flip(path, label_at + 2)
    restate(out, path.name)
    (problem,) = problems_of(out, capfd=capfd)
    label = BetonReader(path).label_N[5]
    assert problem == f"{path}: a label outside the 3 classes: {label} of sample 5"
    store = open_dataset(out, "train")
    with pytest.raises(DataError, match=rf"sample 5 of .*\.beton: label {label} is none of the 3 classes"):
        store.labels(np.arange(8))


def test_stock_files_are_checked_without_a_checksum(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = stock_set(tmp_path / "set", 9, 3)
    for options in ((), ("--deep",)):
        assert problems_of(data, *options, capfd=capfd) == []
    capfd.readouterr()
    assert verify.main([str(data / "val.beton"), "--workers", "1"]) == 0
    assert "no checksum to compare" in capfd.readouterr().err
    reader = BetonReader(data / "val.beton")
    flip(data / "val.beton", int(reader.pointer_N[2]) + 1)  # the second byte of every JPEG
    assert problems_of(data, capfd=capfd) == []
    (problem,) = problems_of(data, "--deep", capfd=capfd)
    assert f"sample 2 of {data / 'val.beton'}: " in problem
    (data / "train.beton").write_bytes((data / "train.beton").read_bytes()[:-1])
    assert str(data / "train.beton") in problems_of(data, capfd=capfd)[0]


def test_index_damage(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_images(tmp_path / "source", 2, 4)
    out = tmp_path / "out"
    assert convert.main([str(tmp_path / "source"), str(out), "--format", "webdataset", "--workers", "1"]) == 0
    index = (out / "train-00000.idx").read_text()
    (out / "train-00000.idx").write_text(index.replace("jpg 512", "jpg 513"))
    problems = problems_of(out, capfd=capfd)
    assert "train-00000.idx: the content has changed" in problems[0]
    assert "the index does not match the members" in problems[1]
    (out / "train-00000.idx").unlink()
    assert "train-00000.idx: missing" in problems_of(out, capfd=capfd)[0]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("tar", lambda tar: tar[:124] + b"\xff" * 10 + b"\xfc\0" + tar[136:], "damaged archive"),
        ("tar", lambda tar: tar[:-1024] + b"junk" * 256, "damaged archive"),
        ("tar", lambda tar: tar[:-1024] + tar[:1024] + tar[-1024:], "the index does not match the members|damaged"),
        ("tar", lambda tar: tar[:-1024], "no end mark"),
        ("idx", lambda index: index.rsplit(b"\n", 2)[0].replace(b" 8\n", b" 7\n", 1) + b"\n", "does not match"),
    ],
)
def test_a_tar_that_is_not_as_its_index_says(
    tmp_path: Path, name: str, damage: Callable[[bytes], bytes], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    make_images(tmp_path / "source", 2, 4)
    out = tmp_path / "out"
    assert convert.main([str(tmp_path / "source"), str(out), "--format", "webdataset", "--workers", "1"]) == 0
    path = out / f"train-00000.{name}"
    path.write_bytes(damage(path.read_bytes()))
    problems = problems_of(out, capfd=capfd)
    assert re.search(message, problems[-1]), problems
    assert str(path.with_suffix("")) in problems[-1]


def test_raw_shards(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_images(tmp_path / "source", 2, 4)
    out = tmp_path / "out"
    assert convert.main([str(tmp_path / "source"), str(out), "--write", "raw", "--workers", "1"]) == 0
    assert np.all(BetonReader(out / "train-00000.beton").mode_N == 1)
    assert problems_of(out, "--deep", capfd=capfd) == []


def test_as_typed(run_command: RunCommand, tmp_path: Path, sound: Path) -> None:
    done = run_command("dataprep/verify.py", sound)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"ok": True, "problems": []}
    done = run_command("dataprep/verify.py", tmp_path)
    assert done.returncode == 2
    assert "is not a converted data set" in one_line(done)


def test_storage_that_hangs_is_named(
    sound: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    clock, name = Clock(monkeypatch), shard(sound, 1).name

    def slow(path: Path) -> str:
        if path.name == name:
            clock.passes(11, looks=2)  # the second look comes once the first has been acted on
        return checksum(path)

    monkeypatch.setattr(watch, "poll_seconds", lambda: 0.01)
    monkeypatch.setattr(verify, "checksum", slow)
    assert verify.main([str(sound), "--workers", "1"]) == 0
    assert capfd.readouterr().err == f"warning: no shard for 11 s, at {name}\n"


@pytest.mark.parametrize("options", [(), ("--deep",)])
def test_more_shards_than_a_process_may_open(tmp_path: Path, options: tuple) -> None:
    make_images(tmp_path / "source", 2, 60)
    out = tmp_path / "out"
    assert convert.main([str(tmp_path / "source"), str(out), "--shard-size", "1", "--workers", "1"]) == 0
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64));"
    code = f"{limit} from fasttrain.dataprep.verify import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, out, "--workers", "2", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_manifest_names_the_index(sound: Path) -> None:
    shards = Manifest.load(sound).splits["train"]
    assert all((shard.index is None) == shard.name.endswith(".beton") for shard in shards)


def test_a_sample_of_the_shards_is_checked_and_said(
    sound: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(sound, tmp_path / "out")
    assert len(Manifest.load(out).splits["train"]) == 3
    flip(shard(out, 1), shard(out, 1).stat().st_size // 2)
    assert problems_of(out, "--sample", "2", "--deep", capfd=capfd) == []  # the first and the last
    assert verify.main([str(out), "--sample", "2"]) == 0
    assert "note: 2 of 3 shards are checked, evenly spread" in capfd.readouterr().err
    flip(shard(out, 2), shard(out, 2).stat().st_size // 2)
    problems = problems_of(out, "--sample", "2", capfd=capfd)
    assert {"train-00002" in problem for problem in problems} == {True}
    assert any("train-00001" in problem for problem in problems_of(out, "--sample", "3", capfd=capfd))
