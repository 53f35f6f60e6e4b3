"""OUT that is far away: what a local conversion leaves, whatever the store does meanwhile."""

import importlib.util
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.commands import ROOT, one_line_of
from support.forks import Fork, with_small_files
from support.forks import finished as fork_finished
from support.pictures import make_images

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("fsspec.asyn")

from support import stores  # noqa: E402 - imports fsspec
from support.stores import Faults, Objects  # noqa: E402

from fasttrain.dataprep import convert, destination, state, verify  # noqa: E402
from fasttrain.storage import attempts  # noqa: E402
from fasttrain.system.lock import lock  # noqa: E402

OPTIONS = ("--shard-size", 8, "--workers", 1)
SECRETS = ("TOPSECRET", "hunter2")
FORMATS = ["ffcv", "webdataset"]


def run(*arguments: object) -> int:
    """The command within this process."""
    stores.register()
    return convert.main([str(argument) for argument in (*arguments, *OPTIONS)])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, and one image that can't be read."""
    root = make_images(tmp_path_factory.mktemp("source") / "set", 2, 12)
    (root / "class0" / "bad.jpg").write_bytes(b"")
    return root


@pytest.fixture(scope="module")
def local(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A local conversion, by format."""
    folder = tmp_path_factory.mktemp("local")
    for format in FORMATS:
        assert run(source, folder / format, "--format", format) == 3
    return {format: folder / format for format in FORMATS}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An own temporary folder; failures cost no time and are all told, and stores are empty."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(destination, "gettempdir", lambda: str(tmp_path / "scratch"))
    monkeypatch.setattr(attempts, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(attempts, "_told", 0)
    stores.register()
    Faults.clear()
    yield
    Faults.clear()
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stored(url: str) -> dict[str, bytes]:
    """What lies at a URL, by name."""
    stores.register()
    store, folder = fsspec.core.url_to_fs(url)
    return {name.rpartition("/")[2]: store.cat_file(name) for name in store.ls(folder, detail=False)}


@pytest.fixture(params=["disk", "objects"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where to write in a store of files, or of objects."""
    return f"disk://{tmp_path}/far/set" if request.param == "disk" else "objects://me:hunter2@bucket/sets/set"


@pytest.fixture
def disk(tmp_path: Path) -> str:
    return f"disk://{tmp_path}/far/set"


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("where", ["memory://sets/a/", "disk://{}/far/set", "objects://bucket", "file://{}/far/set"])
def test_what_is_written_far_away_is_what_a_local_conversion_leaves(
    source: Path, local: dict[str, Path], tmp_path: Path, where: str, format: str, capfd: pytest.CaptureFixture[str]
) -> None:
    url = where.format(tmp_path)
    assert run(source, url, "--format", format) == 3
    summary = json.loads(capfd.readouterr().out)
    assert stored(url) == files(local[format])
    assert summary["shards"] == 4
    assert run(source, url, "--format", format) == 3
    assert (
        f"{url.rstrip('/')} is already converted with these settings".removeprefix("file://") in capfd.readouterr().out
    )
    assert not list((tmp_path / "scratch").iterdir())


def test_a_record_comes_after_its_shard_and_the_manifest_after_all(source: Path, url: str) -> None:
    assert run(source, url) == 3
    written = [name.removeprefix(".").removesuffix(".tmp") for name in Faults.written()]
    written = [name.rpartition(".")[0] if "disk" in url else name for name in written]
    assert (written[0], written[-1]) == ("conversion.json", "manifest.json")
    for number in range(4):
        of_shard = [name for name in written if f"-0000{number}" in name]
        assert of_shard == [f"train-0000{number}{end}" for end in (".beton", ".names", ".beton.json")]


@pytest.mark.parametrize("fault", ["cut", "short", "damaged"])
@pytest.mark.parametrize("first", [0, 1, 2, 7])
def test_what_does_not_arrive_whole_is_written_again(
    source: Path, local: dict[str, Path], url: str, fault: str, first: int, capfd: pytest.CaptureFixture[str]
) -> None:
    if fault == "damaged" and "disk" in url:
        pytest.skip("the store tells no checksum")
    Faults.next += [*[""] * first, *[fault] * 3]
    assert run(source, url) == 3
    assert stored(url) == files(local["ffcv"])
    assert "tried again" in capfd.readouterr().err


@pytest.mark.parametrize("first", [0, 1, 2, 3, 7])
@pytest.mark.parametrize(
    ("fault", "status", "message"),
    [("cut", 1, "ConnectionResetError: reset: given up after 4 tries, run the same command again to continue"),
     ("short", 1, "bytes arrived of"), ("refused", 2, "no permission")],
)  # fmt: skip
def test_a_store_that_fails_for_good_ends_in_a_line_and_the_same_command_continues(
    source: Path, local: dict[str, Path], url: str, first: int, fault: str, status: int, message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    Faults.next += [*[""] * first, *[fault] * 99]
    assert run(source, url) == status
    printed = capfd.readouterr()
    assert message in one_line_of(printed.err)
    assert not [secret for secret in SECRETS if secret in printed.out + printed.err]
    there = set(stored(url)) if first else set()
    assert "manifest.json" not in there
    assert {f"{name}.json" for name in there if name.endswith(".beton")} >= there - {"conversion.json"} & {
        name for name in there if name.endswith(".beton.json")
    }, "no record is there without its shard"
    Faults.next.clear()
    assert run(source, url) == 3
    assert stored(url) == files(local["ffcv"])
    text = b"".join(stored(url).values()).decode("latin-1") + "".join(capfd.readouterr())
    assert not [secret for secret in SECRETS if secret in text]


def test_a_store_that_writes_over_nothing(
    source: Path, local: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    Faults.next += ["", "", "", *["refused"] * 99]
    assert run(source, "objects://bucket/set") == 2
    Faults.next.clear()
    assert any(name.endswith(".beton") for name in stored("objects://bucket/set"))
    monkeypatch.setattr(Faults, "keeps", True)
    assert run(source, "objects://bucket/set") == 3
    assert stored("objects://bucket/set") == files(local["ffcv"])


def test_an_upload_that_hangs_is_tried_again(
    source: Path, local: dict[str, Path], disk: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(attempts, "SECONDS", 0.3)
    Faults.next += ["", "hang"]
    assert run(source, disk) == 3
    assert "no answer for 0.3" in capfd.readouterr().err
    time.sleep(Faults.SECONDS)  # what was given up may still arrive, and does no harm
    assert {name: content for name, content in stored(disk).items() if "tmp" not in name} == files(local["ffcv"])


def convert_there(scratch: Path, *arguments: object) -> int:
    """For a process of its own."""
    destination.gettempdir = lambda: str(scratch)
    return run(*arguments)


def test_few_shards_lie_here_at_once(source: Path, disk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload, most = destination.upload, 0

    def counted(*arguments: Any) -> None:
        nonlocal most
        most = max(most, len([*(tmp_path / "scratch").glob("*/*.beton")]))
        upload(*arguments)

    monkeypatch.setattr(destination, "upload", counted)
    monkeypatch.setattr(destination.RemoteFolder, "shards_ahead", 2)
    assert convert.main([str(source), disk, "--shard-size", "1", "--workers", "1"]) == 3
    assert 1 <= most <= 3


def killed_there(scratch: Path, *arguments: object) -> int:
    """The same, which is killed while the names of the third shard are on their way, and only they."""
    destination.RemoteFolder.shards_ahead = 1
    Faults.next += [*[""] * 8, "killed"]
    return convert_there(scratch, *arguments)


def test_a_conversion_that_is_killed_goes_on_from_another_machine(
    source: Path, local: dict[str, Path], disk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fork_finished(tmp_path, killed_there, tmp_path / "scratch", source, disk).returncode == -signal.SIGKILL
    far = tmp_path / "far" / "set"
    assert sorted(path.name for path in far.glob("train-*")) == [
        *(f"train-0000{shard}.{end}" for shard in (0, 1) for end in ("beton", "beton.json", "names")),
        "train-00002.beton",
    ]
    assert [path.name[:14] for path in far.glob(".*")] == [".train-00002.n"], "half of it, under a temporary name"
    (tmp_path / "other").mkdir()
    monkeypatch.setattr(destination, "gettempdir", lambda: str(tmp_path / "other"))
    assert run(source, disk) == 3
    assert stored(disk) == files(local["ffcv"])
    assert not [name for name in Faults.written() if "-00000." in name or "-00001." in name]


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def unfinished(source: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Convert up to the manifest, which is not written."""
    with monkeypatch.context() as patch:
        patch.setattr(convert, "complete", interrupted)
        assert run(source, url) == 130
    Faults.calls.clear()


def test_what_is_finished_is_found_by_one_listing(
    source: Path, local: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "objects://bucket/set"
    unfinished(source, url, monkeypatch)
    del Objects.content["bucket/set/train-00002.beton.json"]
    with monkeypatch.context() as patch:
        patch.setattr(convert, "complete", interrupted)
        assert run(source, url) == 130
    looks = [name for call, name in Faults.calls if call == "cat"]
    assert sorted(name for name in looks if "train" in name) == [f"train-0000{n}.beton.json" for n in (0, 1, 3)]
    assert [call for call, _ in Faults.calls].count("ls") == 1
    assert set(Faults.written()) == {"train-00002.beton", "train-00002.names", "train-00002.beton.json"}
    assert run(source, url) == 3
    assert stored(url) == files(local["ffcv"])


@pytest.mark.parametrize(
    ("name", "content"),
    [("train-00001.beton", b"other"), ("train-00001.beton", None), ("train-00001.names", b""),
     ("train-00001.names", None), ("train-00001.beton.json", b"{"), ("train-00001.beton.json", b"[" * 100_000)],
)  # fmt: skip
def test_a_shard_that_is_not_as_recorded_is_made_again(
    source: Path, local: dict[str, Path], name: str, content: bytes | None,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    url = "objects://bucket/set"
    unfinished(source, url, monkeypatch)
    Objects.content.pop(f"bucket/set/{name}")
    if content is not None:
        Objects.content[f"bucket/set/{name}"] = content
    capfd.readouterr()
    assert run(source, url) == 3
    lines = [line for line in capfd.readouterr().err.splitlines() if "is made again" in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("objects://bucket/set/train-00001.beton.json: ")
    assert stored(url) == files(local["ffcv"])


def test_other_settings_and_other_files_are_refused(
    source: Path, url: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    unfinished(source, url, monkeypatch)
    capfd.readouterr()
    differs = "set holds a conversion that differs (other settings: max_side): remove it or name another folder"
    assert run(source, url, "--max-side", 20) == 2
    assert differs in one_line_of(capfd.readouterr().err)
    assert run(source, url) == 3
    capfd.readouterr()
    assert run(source, url, "--max-side", 20) == 2
    assert differs in one_line_of(capfd.readouterr().err)
    assert run(source, url.rpartition("/")[0]) == 2
    assert "is not empty and holds no conversion" in one_line_of(capfd.readouterr().err)


def test_a_finished_set_that_has_lost_a_file_is_told(source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    url = "objects://bucket/set"
    assert run(source, url) == 3
    Objects.content["bucket/set/train-00002.beton"] += b"x"
    assert run(source, url) == 2
    assert "objects://bucket/set/train-00002.beton: " in (line := one_line_of(capfd.readouterr().err))
    assert "bytes, but the manifest says" in line
    del Objects.content["bucket/set/train-00002.beton"]
    assert run(source, url) == 2
    assert "objects://bucket/set/train-00002.beton: not found" in one_line_of(capfd.readouterr().err)
    Objects.content["bucket/set/manifest.json"] = b"{"
    assert run(source, url) == 2
    assert "objects://bucket/set/manifest.json: malformed" in one_line_of(capfd.readouterr().err)


def test_parts_far_away_end_in_the_same_set(
    source: Path, local: dict[str, Path], url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    missing = []
    for number in (2, 3, 1):
        assert run(source, url, "--part", f"{number}/3") == (3 if number == 1 else 0)
        missing.append(json.loads(capfd.readouterr().out.splitlines()[-1])["shards_missing"])
    assert missing[-1] == 0
    assert 0 not in missing[:-1]
    assert stored(url) == files(local["ffcv"])


@pytest.mark.parametrize("call", ["names", "read_manifest"])
@pytest.mark.parametrize("before", [True, False])
def test_of_parts_that_end_at_the_same_moment_none_misses_a_shard(
    source: Path,
    local: dict[str, Path],
    url: str,
    call: str,
    before: bool,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run(source, url, "--part", "1/2") == 0
    end_part, plain = convert.end_part, getattr(destination.RemoteFolder, call)
    ends = []

    def end_while_another_does(out: Any, *arguments: Any) -> Any:
        def called(out: Any) -> Any:
            monkeypatch.setattr(destination.RemoteFolder, call, plain)
            monkeypatch.setattr(convert, "end_part", end_part)
            found = None if before else plain(out)
            ends.append(run(source, url, "--part", "2/2"))
            return plain(out) if before else found

        monkeypatch.setattr(destination.RemoteFolder, call, called)
        return end_part(out, *arguments)

    monkeypatch.setattr(convert, "end_part", end_while_another_does)
    ends.append(run(source, url, "--part", "2/2"))
    assert ends == [3, 3]
    lines = capfd.readouterr().out.splitlines()
    assert [json.loads(line)["shards_missing"] for line in lines[-2:]] == [0, 0]
    assert stored(url) == files(local["ffcv"])


def test_a_part_that_begins_while_the_last_one_ends_does_not_ask_for_the_set_to_be_removed(
    source: Path, url: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    finished = convert.finished_manifest

    def and_then_it_ends(*arguments: Any) -> Any:
        monkeypatch.setattr(convert, "finished_manifest", finished)
        found = finished(*arguments)
        assert run(source, url) == 3
        return found

    monkeypatch.setattr(convert, "finished_manifest", and_then_it_ends)
    assert run(source, url, "--part", "1/2") == 1
    assert "another process has just ended a conversion here: run the same" in capfd.readouterr().err


def test_two_conversions_at_once_do_no_harm(source: Path, local: dict[str, Path], disk: str, tmp_path: Path) -> None:
    forks = [Fork(tmp_path, convert_there, tmp_path / "scratch", source, disk, STORE_SECONDS=0.02) for _ in range(2)]
    for fork in forks:
        fork.wait(time.monotonic() + 60)
    ends = [fork.kill() for fork in forks]
    assert 3 in [end.returncode for end in ends], [end.stderr for end in ends]
    for end in ends:
        assert end.returncode == 3 or one_line_of(end.stderr)
    assert run(source, disk) == 3, "and where one has ended badly, the other's set is whole"
    assert stored(disk) == files(local["ffcv"])


def test_others_that_begin_at_the_same_moment_are_found_out(
    source: Path, url: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    begin = state.begin

    def begin_at_once(out: Any, settings: dict[str, Any]) -> None:
        begin(out, settings)
        state_before = dict(out.read_json("conversion.json"))
        out._state = None
        out.write_json("conversion.json", {**state_before, "max_side": 7})
        out._state = state_before

    monkeypatch.setattr(convert, "begin", begin_at_once)
    assert run(source, url) == 2
    assert "another conversion, with other settings, is writing here" in one_line_of(capfd.readouterr().err)
    assert set(stored(url)) == {"conversion.json"}


def test_a_full_temporary_folder_is_one_line(source: Path, local: dict[str, Path], disk: str, tmp_path: Path) -> None:
    done = fork_finished(tmp_path, with_small_files, 6_000, convert_there, tmp_path / "scratch", source, disk)
    assert done.returncode == 1, done.stderr
    assert "run the same command again to continue" in (line := one_line_of(done.stderr))
    assert "fasttrain-convert-" in line
    assert run(source, disk) == 3
    assert stored(disk) == files(local["ffcv"])


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("http://me:hunter2@h/x?sig=TOPSECRET", "http://h/x?…: over HTTP nothing can be written"),
        ("s3://b/x-*", "s3://b/x-*: name an OUT without * ? [ {"),
        ("nosuch://a/b", "nosuch://a/b: ValueError: Protocol not known"),
        ("objects://bucket/file", "objects://me:hunter2@bucket/file: not a folder".replace("me:hunter2@", "")),
        ("objects://", "objects://: name a folder there"),
        ("s3:/b/x", "s3:/b/x: a URL has // behind its colon; a folder of that name is ./s3:/b/x"),
        ("zip://x::memory://a.zip", "chains of URLs are not read"),
    ],
)
def test_refusals(source: Path, out: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    Objects.content["bucket/file"] = b"text"
    assert run(source, out) == 2
    assert message in one_line_of(capfd.readouterr().err)


def test_out_may_not_lie_in_a_source_that_is_far_away_too(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("memory://set", "memory://set/out") == 2
    assert "memory://set/out lies inside the source memory://set" in one_line_of(capfd.readouterr().err)


def test_both_may_be_far_away(
    source: Path, local: dict[str, Path], tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    memory = fsspec.filesystem("memory")
    for path in source.rglob("*.jpg"):
        memory.pipe(f"/from/{path.relative_to(source)}", path.read_bytes())
    Faults.next += ["", "", *["refused"] * 99]
    assert run("memory://from", url) == 2
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["set.source"], "which the next run goes on with"
    Faults.next.clear()
    with lock(tmp_path / "here" / "set.source", "held"):
        assert run("memory://from", url) == 2
    assert run("memory://from", url) == 3
    assert not list((tmp_path / "here").iterdir())
    found, wanted = stored(url), files(local["ffcv"])
    assert {**found, "manifest.json": b""} == {**wanted, "manifest.json": b""}
    assert json.loads(found["manifest.json"])["splits"] == json.loads(wanted["manifest.json"])["splits"]


def test_what_killed_conversions_leave_in_the_temporary_folder_is_removed(
    source: Path, disk: str, tmp_path: Path
) -> None:
    for name, age in (("old", 7200), ("held", 7200), ("new", 0)):
        folder = tmp_path / "scratch" / f"fasttrain-convert-{name}"
        folder.mkdir()
        (folder / "train-00000.beton").write_bytes(b"left")
        os.utime(folder, (time.time() - age,) * 2)
    with lock(tmp_path / "scratch" / "fasttrain-convert-held", "held"):
        assert run(source, disk) == 3
    left = sorted(path.name for path in (tmp_path / "scratch").iterdir())
    assert left == ["fasttrain-convert-held", "fasttrain-convert-new"]


def test_a_set_far_away_is_verified_by_its_sizes(source: Path, url: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(source, url, "--format", "webdataset") == 3
    assert verify.main([url]) == 0
    store, folder = fsspec.core.url_to_fs(url)
    store.rm_file(f"{folder}/train-00001.idx")
    store.pipe_file(f"{folder}/train-00002.tar", b"x" * 7)
    store.pipe_file(f"{folder}/train-00009.tar", b"x")
    capfd.readouterr()
    assert verify.main([url]) == 1
    found = json.loads((printed := capfd.readouterr()).out.splitlines()[-1])["problems"]
    assert [problem.partition("set/")[2].partition(",")[0] for problem in found] == [
        "train-00009.tar: not in manifest.json", "train-00001.idx: missing", "train-00002.tar: 7 bytes"
    ]  # fmt: skip
    assert "hunter2" not in printed.out + printed.err
    store.rm_file(f"{folder}/manifest.json")
    for arguments, message in (([url], "no manifest.json"), ([url, "--deep"], "--deep reads every byte: copy it"),
                               (["https://h/x?sig=hunter2"], "over HTTP a folder can't be listed")):  # fmt: skip
        assert verify.main(arguments) == 2
        assert message in (line := one_line_of(capfd.readouterr().err))
        assert "hunter2" not in line


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.usefixtures("ray_alone")
def test_workers_of_ray_write_there_by_themselves(
    source: Path, local: dict[str, Path], disk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    assert run(source, disk, "--engine", "ray") == 3
    assert stored(disk) == files(local["ffcv"])
