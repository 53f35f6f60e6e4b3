"""Sources that are far away: the shards of a local conversion, whatever the way there does meanwhile."""

import builtins
import errno
import hashlib
import importlib.abc
import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from support.commands import ROOT, one_line_of, typed
from support.forks import Fork, finished, with_small_files
from support.hub import hub
from support.pictures import make_images
from support.web import Web, web_server

from fasttrain.dataprep import convert, download, engines
from fasttrain.storage import attempts, remote, transfer
from fasttrain.storage.attempts import without_secrets
from fasttrain.system.errors import RunError
from fasttrain.system.lock import lock

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("fsspec.asyn")
pytest.importorskip("aiohttp")

OPTIONS = ("--shard-size", 8, "--workers", 1)
SECRETS = ("TOPSECRET", "hunter2")
REMOTE = "pip install '.[remote]'"


def run(*arguments: object) -> int:
    """The command within this process."""
    return convert.main([str(argument) for argument in (*arguments, *OPTIONS)])


def contents(out: Path) -> dict[str, object]:
    """The files of a conversion, without what the manifest says of where the source was, and of how it was read."""
    found: dict[str, object] = {path.name: path.read_bytes() for path in out.iterdir()}
    manifest = json.loads((out / "manifest.json").read_bytes())
    for name in ("source", "kind", "labels"):
        manifest["settings"].pop(name, None)
    notes = [note for note in manifest["notes"] if not note.startswith("read from ")]
    return {**found, "manifest.json": {**manifest, "notes": notes}}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, one image that can't be read, a file that is none, and a hidden one."""
    root = make_images(tmp_path_factory.mktemp("images") / "set", 2, 8)
    (root / "class0" / "bad.jpg").write_bytes(b"")
    (root / "class1" / "read me.txt").write_text("text")
    (root / ".hidden").write_text("text")
    return root


@pytest.fixture(scope="module")
def shards(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images as three tars of samples with labels."""
    folder = tmp_path_factory.mktemp("tars")
    paths = sorted(images.glob("class*/0*.jpg"))
    for number in range(3):
        with tarfile.open(folder / f"set-{number:03d}.tar", "w") as tar:
            for path in paths[number::3]:
                key = f"{path.parent.name}-{path.stem}"
                (folder / f"{key}.cls").write_text(path.parent.name[-1])
                tar.add(path, f"{key}.jpg")
                tar.add(folder / f"{key}.cls", f"{key}.cls")
                (folder / f"{key}.cls").unlink()
    return folder


@pytest.fixture
def web(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """A server with the tars, whose failures cost no time."""
    monkeypatch.setattr(attempts, "PAUSE_SECONDS", 0.0)
    with web_server() as server:
        server.files.update({f"/a/{path.name}": path.read_bytes() for path in shards.iterdir()})
        yield server


@pytest.fixture
def memory(images: Path) -> Iterator[Any]:
    """fsspec's file system in memory, with the images below /set."""
    store = fsspec.filesystem("memory")
    for path in images.rglob("*"):
        if path.is_file():
            store.pipe(f"/set/{path.relative_to(images)}", path.read_bytes())
    yield store
    store.store.clear()
    store.pseudo_dirs[:] = [""]


@pytest.mark.parametrize("url", ["file://{images}", "local://{images}/", "memory://set", "memory:///set/"])
@pytest.mark.usefixtures("memory")
def test_a_folder_from_afar_gives_the_bytes_of_a_local_one(images: Path, tmp_path: Path, url: str) -> None:
    assert run(images, tmp_path / "local") == run(url.format(images=images), tmp_path / "remote") == 3
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["local", "remote"], "the copy is removed"


@pytest.mark.parametrize("format", ["ffcv", "webdataset"])
@pytest.mark.parametrize("pattern", ["set-{000..002}.tar", "set-000.tar", "set-00{0,2}.tar"])
def test_tars_over_http_give_the_bytes_of_local_ones(
    shards: Path, web: Web, tmp_path: Path, pattern: str, format: str
) -> None:
    assert run(shards / pattern, tmp_path / "local", "--format", format) == 0
    assert run(f"{web.url}/a/{pattern}", tmp_path / "remote", "--format", format) == 0
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")


@pytest.mark.parametrize("pattern", ["set-*.tar", "set-00[01].tar", "set-00?.tar", "*-00{1..2}.tar", ""])
def test_patterns_and_folders_of_a_store(shards: Path, memory: Any, tmp_path: Path, pattern: str) -> None:
    for path in shards.iterdir():
        memory.pipe(f"/tars/{path.name}", path.read_bytes())
    options = ("--kind", "webdataset", "--labels", "cls")
    assert run(shards / pattern, tmp_path / "local", *options) == 0
    assert run(f"memory://tars/{pattern}", tmp_path / "remote", *options) == 0
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")


def test_archives_and_a_folder_without_images(images: Path, memory: Any, web: Web, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in sorted(images.rglob("*.jpg")):
            archive.write(path, path.relative_to(images))
    web.files["/set.zip"] = (tmp_path / "set.zip").read_bytes()
    assert run(tmp_path / "set.zip", tmp_path / "local") == run(f"{web.url}/set.zip", tmp_path / "remote") == 3
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")
    folder = shutil.copytree(images, tmp_path / "copy")
    (folder / "class9").mkdir()
    memory.makedirs("/set/class9")
    assert run(folder, tmp_path / "local2") == run("memory://set", tmp_path / "remote2") == 3
    assert contents(tmp_path / "remote2") == contents(tmp_path / "local2")


def test_a_hidden_file_counts_where_it_is_named(shards: Path, memory: Any, tmp_path: Path) -> None:
    memory.pipe("/tars/.set.tar", (shards / "set-000.tar").read_bytes())
    assert run("memory://tars/.set.tar", tmp_path / "out") == 0
    assert run("memory://tars", tmp_path / "none") == 2


def test_the_fingerprint_is_that_of_the_content_wherever_it_lies(images: Path, memory: Any) -> None:
    first = remote.list_remote("memory://set")
    assert remote.list_remote(f"file://{images}").digest() == first.digest()
    memory.pipe("/set/class0/000.jpg", memory.cat("/set/class0/000.jpg"))
    assert remote.list_remote("memory://set").digest() == first.digest()
    assert remote.list_remote("memory://set").digest(times=True) != first.digest(times=True)
    memory.pipe("/set/class0/000.jpg", b"longer")
    assert remote.list_remote("memory://set").digest() != first.digest()


def test_another_version_of_a_file_is_another_source(
    web: Web, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    url = f"{web.url}/a/set-000.tar"
    assert run(url, tmp_path / "out") == 0
    web.requests.clear()
    assert run(url, tmp_path / "out") == 0
    assert "already converted" in capfd.readouterr().out
    assert [method for method, _, _ in web.requests] == ["HEAD"], "nothing is downloaded again"
    web.etags["/a/set-000.tar"] = '"another"'
    assert run(url, tmp_path / "out") == 2
    assert "the source has changed" in one_line_of(capfd.readouterr().err)


OTHERS = [("--labels", "none"), ("--labels", "cls"), ("--kind", "webdataset")]


@pytest.mark.parametrize("first", [(), ("--labels", "cls")])
@pytest.mark.parametrize("other", [(), *OTHERS])
def test_other_labels_or_another_kind_are_other_settings(
    web: Web, tmp_path: Path, first: tuple[str, ...], other: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    url = f"{web.url}/a/set-{{000..002}}.tar"
    assert run(url, tmp_path / "out", *first) == 0
    recorded = json.loads((tmp_path / "out" / "manifest.json").read_bytes())["settings"]
    assert ("labels" in recorded, "kind" in recorded) == (bool(first), False), "auto is not recorded"
    capfd.readouterr()
    assert run(url, tmp_path / "out", *other) == (0 if other == first else 2)
    printed = capfd.readouterr()
    if other == first:
        assert "already converted with these settings" in printed.out
    else:
        named = sorted({word.lstrip("-") for word in (*first[:1], *other[:1])})
        assert f"other settings: {', '.join(named)}" in one_line_of(printed.err)


def test_what_other_labels_began_is_not_continued(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    record, number = engines.record_shard, itertools.count()

    def full(*arguments: Any) -> Any:
        if next(number) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return record(*arguments)

    url = f"{web.url}/a/set-{{000..002}}.tar"
    with monkeypatch.context() as patched:
        patched.setattr(engines, "record_shard", full)
        assert run(url, tmp_path / "out", "--labels", "cls") == 1
    capfd.readouterr()
    assert run(url, tmp_path / "out", "--labels", "none") == 2
    assert "other settings: labels" in one_line_of(capfd.readouterr().err)
    assert run(url, tmp_path / "out", "--labels", "cls") == 0


LARGE = 1 << 21  # more than is received before it is looked at


@pytest.fixture
def large(shards: Path, web: Web, tmp_path: Path) -> Path:
    """A tar of more than two blocks of a response; it lies at /large.tar, too."""
    (tmp_path / "large.tar").write_bytes((shards / "set-000.tar").read_bytes() + bytes(LARGE))
    web.files["/large.tar"] = (tmp_path / "large.tar").read_bytes()
    return tmp_path / "large.tar"


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("length", ["length", "chunked"])
def test_a_cut_connection_goes_on_or_begins_again(
    web: Web, large: Path, tmp_path: Path, length: str, ranges: bool
) -> None:
    web.length, web.ranges = length, ranges
    looks = ["", ""] if length == "chunked" else []  # a GET for its size, when it is listed and when it is checked
    web.faults["/large.tar"] = [*looks[:1], 3 << 19, 0, 503]
    assert run(f"{web.url}/large.tar", tmp_path / "out") == run(large, tmp_path / "local") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "local")
    asked = [asked for method, _, asked in web.requests if method == "GET"]
    first, *later = asked[len(looks[:1]) :][:4]
    assert first == ""
    assert set(later) == {f"bytes={len_received(later[0])}-"}


def len_received(asked: str) -> int:
    """Where a request goes on: somewhere before the cut, as what is on the way then is lost."""
    found = int(asked.removeprefix("bytes=").removesuffix("-"))
    assert 0 < found <= 3 << 19
    return found


def test_a_file_that_is_always_cut_is_never_taken_for_whole(
    web: Web, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    web.faults["/a/set-001.tar"] = [0] * 99
    assert run(f"{web.url}/a/set-{{000..001}}.tar", tmp_path / "out") == 1
    line = one_line_of(capfd.readouterr().err)
    assert "/a/set-001.tar: " in line
    assert f"given up after {attempts.TRIES} tries, run the same command again to continue" in line
    files = tmp_path / "out.source" / "files"
    assert [path.name for path in files.iterdir()] == ["set-000.tar"], "what is whole is kept"
    web.faults.clear()
    web.requests.clear()
    assert run(f"{web.url}/a/set-{{000..001}}.tar", tmp_path / "out") == 0
    assert [target for method, target, _ in web.requests if method == "GET"] == ["/a/set-001.tar"]


def test_a_response_without_an_end_is_refused(web: Web, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    web.length = "close"
    assert run(f"{web.url}/a/set-000.tar", tmp_path / "out") == 2
    assert "says neither its size nor where it ends" in one_line_of(capfd.readouterr().err)


def test_a_server_that_refuses_to_say_anything_but_the_file(shards: Path, web: Web, tmp_path: Path) -> None:
    web.head = False
    assert run(f"{web.url}/a/set-000.tar", tmp_path / "out") == 0
    assert run(shards / "set-000.tar", tmp_path / "local") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


def test_a_server_that_stalls_ends_in_a_line(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(attempts, "SECONDS", 0.2)
    web.faults["/a/set-000.tar"] = ["stall"] * 99
    assert run(f"{web.url}/a/set-000.tar", tmp_path / "out") == 1
    assert "/a/set-000.tar: no answer" in one_line_of(capfd.readouterr().err)


@pytest.mark.parametrize("call", ["info", "find", "open"])
def test_a_store_that_hangs_ends_in_a_line(
    memory: Any, tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(attempts, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(attempts, "SECONDS", 0.1)
    monkeypatch.setattr(attempts, "LISTING_SECONDS", 0.1)
    monkeypatch.setattr(type(memory), call, lambda *_, **__: time.sleep(300))
    assert run("memory://set", tmp_path / "out") == 1
    assert "no answer for 0.1 s: given up after 4 tries" in one_line_of(capfd.readouterr().err)


@pytest.mark.parametrize(
    ("status", "exit_status", "message"),
    [(404, 2, "not found"), (403, 2, "no permission: HTTP 403"), (401, 2, "no permission: HTTP 401"),
     (500, 1, "HTTP 500: given up"), (429, 1, "HTTP 429: given up")],
)  # fmt: skip
@pytest.mark.parametrize("when", ["listed", "read"])
def test_statuses_are_one_line_without_secrets(
    web: Web, tmp_path: Path, status: int, exit_status: int, message: str, when: str,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    web.head = when == "read"
    web.faults["/a/set-000.tar"] = [status] * 99
    url = f"{web.url.replace('//', '//me:hunter2@')}/a/set-000.tar?X-Amz-Signature=TOPSECRET"
    assert run(url, tmp_path / "out") == exit_status
    printed = capfd.readouterr()
    assert message in one_line_of(printed.err)
    no_secrets(tmp_path, printed.out + printed.err)


def no_secrets(folder: Path, text: str) -> None:
    texts = [text, *(path.read_bytes().decode("latin-1") for path in folder.rglob("*") if path.is_file())]
    assert not [secret for secret in SECRETS for one in texts if secret in one]


def test_a_signature_is_renewed_and_never_kept(
    shards: Path, web: Web, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    web.faults["/a/set-000.tar"] = [500] * attempts.TRIES
    url = f"{web.url.replace('//', '//me:hunter2@')}/a/set-000.tar"
    assert run(f"{url}?sig=TOPSECRET", tmp_path / "out") == 1
    no_secrets(tmp_path, "".join(capfd.readouterr()))
    assert run(f"{url}?sig=TOPSECRET2", tmp_path / "out") == 0
    no_secrets(tmp_path, "".join(capfd.readouterr()))
    assert web.requests[-1][1] == "/a/set-000.tar?sig=TOPSECRET2"


def test_what_counts_as_a_secret() -> None:
    assert without_secrets("s3://KEY:SE/CRET@bucket/x-?.tar") == "s3://bucket/x-?.tar"
    assert without_secrets("get https://u@h/x?token, then") == "get https://h/x?… then"
    assert without_secrets("az://box/a.tar?sv=1&sig=2") == "az://box/a.tar?…"
    assert without_secrets("hf://datasets/o/n@main/x") == "hf://datasets/o/n@main/x"
    assert without_secrets("sftp://user:p@ss@host/x") == "sftp://host/x"
    assert without_secrets("sftp://u@corp:@p@ss@@host:22/x, sftp://u:@h/x") == "sftp://host:22/x, sftp://h/x"
    assert without_secrets("s3://KEY:SE/CR@ET@bucket/x") == "s3://bucket/x"
    assert without_secrets("sftp://u:p@ss@host/a@b/c@d") == "sftp://host/a@b/c@d"
    assert without_secrets("https://u:p@ss@h/x?mail=a@b") == "https://h/x?…"


@pytest.mark.parametrize("finished", [True, False])
def test_a_password_with_an_at_sign_is_never_kept(
    memory: Any, shards: Path, tmp_path: Path, finished: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    memory.pipe("/me:TOP@hunter2@host/set.tar", (shards / "set-000.tar").read_bytes() if finished else b"")
    assert run("memory://me:TOP@hunter2@host/set.tar", tmp_path / "out") == (0 if finished else 2)
    printed = capfd.readouterr()
    assert "memory://host/set.tar" in printed.err
    no_secrets(tmp_path, printed.out + printed.err)


def test_a_file_that_changes_on_the_way(web: Web, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = "/a/set-000.tar"
    find = web.find

    def change(target: str) -> bytes | None:
        if sum(found.startswith(path) for _, found, _ in web.requests) > 1:
            web.etags[path] = '"another"'
        return find(target)

    web.find = change  # type: ignore[method-assign]
    assert run(web.url + path, tmp_path / "out") == 1
    assert "/a/set-000.tar: it has changed since it was listed" in one_line_of(capfd.readouterr().err)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"longer" * 10_000, "set/class0/000.jpg: more than the "), (b"short", "set/class0/000.jpg: ended after 5 of "),
     (None, "changed while it was downloaded, first class0/000.jpg")],
)  # fmt: skip
def test_a_store_that_changes_meanwhile(
    memory: Any, tmp_path: Path, content: bytes | None, message: str,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    prepared = download._prepared

    def changed(*arguments: Any) -> Any:
        memory.pipe("/set/class0/000.jpg", memory.cat("/set/class0/000.jpg") if content is None else content)
        return prepared(*arguments)

    monkeypatch.setattr(attempts, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(download, "_prepared", changed)
    assert run("memory://set", tmp_path / "out") == 1
    assert message in one_line_of(capfd.readouterr().err)
    assert run("memory://set", tmp_path / "out") == 2
    assert "the source has changed" in one_line_of(capfd.readouterr().err)


def test_headers_are_those_of_fsspecs_settings(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    web.token = "Bearer hunter2"
    assert run(f"{web.url}/a/set-000.tar", tmp_path / "out") == 2
    monkeypatch.setitem(fsspec.config.conf, "http", {"headers": {"Authorization": "Bearer hunter2"}})
    assert run(f"{web.url}/a/set-000.tar", tmp_path / "out") == 0


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nosuch://a/b", "nosuch://a/b: ValueError: Protocol not known"),
        ("memory://missing", "memory://missing: not found"),
        ("memory://set/*.tar", "memory:///set/*.tar: no file has such a name"),
        ("zip://x::memory://set/a.zip", "chains of URLs are not read"),
        ("{web}/a/", "over HTTP a folder can't be listed: name its files, as in shard-{000..012}.tar"),
        ("{web}/a/*.tar", "over HTTP a folder can't be listed"),
        ("{web}/page", "a page of text, no file of images"),
        ("http://127.0.0.1:1/x.tar", "http://127.0.0.1:1/x.tar: ClientConnectorError"),
    ],
)
@pytest.mark.usefixtures("memory")
def test_refusals(web: Web, tmp_path: Path, url: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    web.files["/page"], web.types["/page"] = b"<html>", "text/html"
    assert run(url.replace("{web}", web.url), tmp_path / "out") in (1, 2)
    assert message in one_line_of(capfd.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("url", "missing", "how"),
    [("s3://a/b", "s3fs", REMOTE), ("gs://a/b", "gcsfs", REMOTE), ("hf://datasets/o/n", "huggingface_hub", REMOTE),
     ("https://h/x.tar", "aiohttp", REMOTE), ("memory://a", "fsspec", REMOTE), ("az://a/b", "adlfs", "Install adlfs"),
     ("sftp://a/b", "paramiko", '"paramiko" to be installed'), ("smb://a/b", "smbclient", '"smbprotocol"')],
)  # fmt: skip
def test_a_missing_package_is_named(
    tmp_path: Path, url: str, missing: str, how: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plain_import = builtins.__import__
    for name in list(sys.modules):
        if name.partition(".")[0] == missing:
            monkeypatch.delitem(sys.modules, name)

    def without(name: str, *arguments: Any, **named: Any) -> Any:
        if name.partition(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return plain_import(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(sys, "meta_path", [Missing(missing), *sys.meta_path])
    assert run(url, tmp_path / "out") == 2
    assert f"{url} needs {missing}: " in (line := one_line_of(capfd.readouterr().err))
    assert how in line


class Missing(importlib.abc.MetaPathFinder):
    """Finds that a package is not installed."""

    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(self, name: str, *arguments: object) -> None:
        if name.partition(".")[0] == self._package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def named_in_listing(*names: str, size: int = 1) -> dict[str, Any]:
    return {f"/set/{name}": {"name": f"/set/{name}", "size": size, "type": "file"} for name in names}


@pytest.mark.parametrize(
    "found",
    [
        named_in_listing("../x.jpg"),
        named_in_listing("a/../../x.jpg"),
        named_in_listing("a//x.jpg"),
        named_in_listing("a/./x.jpg"),
        named_in_listing("a\0.jpg"),
        named_in_listing("a\ud800.jpg"),
        named_in_listing("/etc/x.jpg"),
        named_in_listing("x" * 252 + ".jpg"),
        {"/etc/x.jpg": {"name": "/etc/x.jpg", "size": 1, "type": "file"}},
        {"x.jpg": {"name": "x.jpg", "size": 1, "type": "file"}},
        named_in_listing("a", "a/b.jpg"),
    ],
)
def test_names_that_leave_the_folder_are_refused(
    memory: Any, tmp_path: Path, found: dict, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(type(memory), "find", lambda *_, **__: dict(found))
    assert run("memory://set", tmp_path / "out") == 2
    line = one_line_of(capfd.readouterr().err)
    assert "a file's name can't be one on disk" in line or "a is both a file and a folder" in line
    assert not list(tmp_path.iterdir())


def test_marks_of_folders_are_no_files(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {**named_in_listing("a", "b/", size=0), **named_in_listing("a/x.jpg")}
    monkeypatch.setattr(type(memory), "find", lambda *_, **__: found)
    listed = remote.list_remote("memory://set")
    assert ([file.path for file in listed.files], listed.folders) == (["a/x.jpg"], ["a", "b"])


def test_names_that_differ_in_case_need_a_disk_that_tells_them_apart(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    memory.pipe("/set/class0/A.jpg", memory.cat("/set/class0/000.jpg"))
    memory.pipe("/set/class0/a.jpg", memory.cat("/set/class0/001.jpg"))
    begin_copy = convert.begin_copy

    def begin_where_case_does_not_matter(source: str, listing: remote.Remote, out: Path) -> None:
        begin_copy(source, listing, out)
        shutil.copy(tmp_path / "out.source" / "copy.json", tmp_path / "out.source" / "COPY.JSON")

    with monkeypatch.context() as patch:
        patch.setattr(convert, "begin_copy", begin_where_case_does_not_matter)
        assert run("memory://set", tmp_path / "out") == 2
    assert "names differ only in case" in one_line_of(capfd.readouterr().err)
    (tmp_path / "out.source" / "COPY.JSON").unlink()
    assert run("memory://set", tmp_path / "out") == 3


def test_a_large_file_goes_on_from_what_was_on_the_disk(
    web: Web, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "BLOCK_BYTES", 1 << 10)
    monkeypatch.setattr(download, "SYNC_BYTES", 1 << 18)
    web.faults["/large.tar"] = [3 << 19, *[500] * (attempts.TRIES - 1)]
    assert run(f"{web.url}/large.tar", tmp_path / "out") == 1
    web.requests.clear()
    assert run(f"{web.url}/large.tar", tmp_path / "out") == run(large, tmp_path / "local") == 0
    (asked,) = [asked for method, _, asked in web.requests if method == "GET"]
    assert len_received(asked) % download.SYNC_BYTES == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


def test_a_download_that_was_killed_continues(web: Web, shards: Path, tmp_path: Path) -> None:
    pattern = f"{web.url}/a/set-{{000..002}}.tar"
    web.faults["/a/set-002.tar"] = ["stall"]
    words = [pattern, str(tmp_path / "out"), *map(str, OPTIONS)]
    fork = Fork(tmp_path, convert.main, words)
    files, deadline = tmp_path / "out.source" / "files", time.monotonic() + 100
    while len(list(files.glob("*.tar"))) < 2:
        assert time.monotonic() < deadline, fork.kill()
        assert fork.process.is_alive(), fork.kill()
        time.sleep(0.01)
    os.kill(fork.process.pid, signal.SIGKILL)
    fork.process.join(60)
    web.requests.clear()
    assert run(pattern, tmp_path / "out") == 0
    assert [target for method, target, _ in web.requests if method == "GET"] == ["/a/set-002.tar"]
    assert run(shards / "set-{000..002}.tar", tmp_path / "local") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


def test_a_conversion_that_ended_after_the_download_uses_the_copy(
    memory: Any, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: object) -> None:
        raise RunError("killed")

    for place in ("complete", "remove_copy"):
        with monkeypatch.context() as patch:
            patch.setattr(convert, place, killed)
            assert run("memory://set", tmp_path / "out") == 1
        assert (tmp_path / "out.source").exists()
        monkeypatch.setattr(type(memory), "open", killed)  # nothing is read again
    assert run("memory://set", tmp_path / "out") == 3
    assert not (tmp_path / "out.source").exists()
    assert run(images, tmp_path / "local") == 3
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


@pytest.mark.usefixtures("memory")
def test_options_that_will_not_do_may_be_others_with_the_same_copy(
    images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert run("memory://set", out, "--val-fraction", 0.01) == 2
    said = one_line_of(capfd.readouterr().err)
    assert "memory://set: setting apart 0.01 of each class" in said
    monkeypatch.setattr(transfer, "received", lambda *_arguments, **_options: pytest.fail("it was here"))
    monkeypatch.setattr(download, "received", transfer.received)
    assert run("memory://set", out) == 3
    assert run(images, tmp_path / "local") == 3
    assert contents(out) == contents(tmp_path / "local")


def test_a_full_disk_keeps_what_is_whole(web: Web, shards: Path, tmp_path: Path) -> None:
    web.files["/a/set-002.tar"] += bytes(1 << 20)
    words = [f"{web.url}/a/set-{{000..002}}.tar", str(tmp_path / "out"), *map(str, OPTIONS)]
    done = finished(tmp_path, with_small_files, 1 << 19, convert.main, words)
    assert done.returncode == 1
    line = one_line_of(done.stderr)
    assert "out.source/files/set-002.tar: " in line
    assert "finished files are kept, run the same command again to continue" in line
    assert run(*words[:2]) == 0


def test_too_little_room_is_said_before_the_download(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 93, 7))  # type: ignore[attr-defined]
    assert run(f"{web.url}/a/set-000.tar", tmp_path / "out") == 1
    size = len(web.files["/a/set-000.tar"])
    assert f"the copy takes {size:,} bytes more, and 7 are free" in one_line_of(capfd.readouterr().err)
    assert "GET" not in [method for method, _, _ in web.requests]


def test_what_lies_in_the_way_is_left_alone(web: Web, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out.source"
    folder.mkdir()
    (folder / "mine").write_text("mine")
    assert run(f"{web.url}/a/set-000.tar", tmp_path / "out") == 2
    assert f"{folder} is in the way and holds no copy of a source" in one_line_of(capfd.readouterr().err)
    assert (folder / "mine").read_text() == "mine"
    (folder / "mine").unlink()
    web.faults["/a/set-000.tar"] = [404]
    assert run(f"{web.url}/a/set-000.tar", tmp_path / "out") == 2
    shutil.rmtree(tmp_path / "out")
    capfd.readouterr()
    assert run(f"{web.url}/a/set-001.tar", tmp_path / "out") == 2
    assert f"{folder} holds a copy of {web.url}/a/set-000.tar" in one_line_of(capfd.readouterr().err)


def test_two_conversions_from_afar_into_one_folder(web: Web, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    with lock(tmp_path / "out", "held"):
        assert run(f"{web.url}/a/set-000.tar", tmp_path / "out") == 2
    assert "another conversion is writing here" in one_line_of(capfd.readouterr().err)
    assert not (tmp_path / "out.source").exists()


def test_a_pattern_and_an_output_that_looks_like_one(
    web: Web, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(f"{web.url}/a/set-00{{0,1}}.tar", tmp_path / "out[1]") == 2
    assert "name an OUT without * ? [ {" in one_line_of(capfd.readouterr().err)
    assert run(f"{web.url}/a/set-000.tar", tmp_path / "out{0..1}") == 0


def test_an_output_inside_a_source_of_this_machine(
    images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(f"file://{images}", images / "out") == 2
    assert "lies inside the source" in one_line_of(capfd.readouterr().err)


class NoCredentialsError(Exception):
    """As botocore's."""


class Bucket(fsspec.asyn.AsyncFileSystem):
    """Object storage as its packages show it: keys without folders, versions of files, and bytes by range.

    files: by key. faults: by key, what the next requests for its bytes raise, or how many of these they give.
    """

    protocol = "bucket"
    cachable = False
    files: ClassVar[dict[str, bytes]] = {}
    faults: ClassVar[dict[str, list[Exception | int]]] = {}

    async def _info(self, path: str, **_: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        if path in self.files:
            content = self.files[path]
            etag = hashlib.md5(content, usedforsecurity=False).hexdigest()
            return {"name": path, "size": len(content), "type": "file", "ETag": etag, "LastModified": time.time()}
        if any(key.startswith(f"{path}/") for key in self.files):
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    async def _ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        prefix = f"{self._strip_protocol(path)}/"
        below = {prefix + key.removeprefix(prefix).partition("/")[0] for key in self.files if key.startswith(prefix)}
        return [await self._info(name) if detail else name for name in sorted(below)]

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        faults = self.faults.get(path, [])
        fault = faults.pop(0) if faults else end
        if isinstance(fault, Exception):
            raise fault
        return self.files[path][start:end][:fault]


@pytest.fixture
def bucket(images: Path, monkeypatch: pytest.MonkeyPatch) -> type[Bucket]:
    """The images at bucket://b/set, asked for in blocks of 100 bytes."""
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    names = (path for path in images.rglob("*") if path.is_file())
    monkeypatch.setattr(Bucket, "files", {f"b/set/{p.relative_to(images)}": p.read_bytes() for p in names})
    monkeypatch.setattr(Bucket, "faults", {})
    for name in ("BLOCK_BYTES", "SMALLEST_BLOCK"):
        monkeypatch.setattr(transfer, name, 100)
    monkeypatch.setattr(attempts, "PAUSE_SECONDS", 0.0)
    return Bucket


def test_object_storage(bucket: type[Bucket], images: Path, tmp_path: Path) -> None:
    bucket.faults["b/set/class0/000.jpg"] = [
        ConnectionError("reset"),
        100,
        7,
        100,
        OSError(errno.EIO, "again"),
        TimeoutError(),
    ]
    assert run("bucket://b/set", tmp_path / "out") == run(images, tmp_path / "local") == 3
    assert contents(tmp_path / "out") == contents(tmp_path / "local")
    assert not bucket.faults["b/set/class0/000.jpg"]
    digest = remote.list_remote("bucket://b/set").digest(times=True)
    assert remote.list_remote("bucket://b/set").digest(times=True) == digest, "a version says more than a time"
    key = "b/set/class0/001.jpg"
    bucket.files[key] = bucket.files[key][::-1]
    assert remote.list_remote("bucket://b/set").digest() != digest


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (NoCredentialsError("Unable to locate credentials"), 2, "no credentials: they are those of its own library"),
        (PermissionError("Forbidden"), 2, "no permission"),
        (FileNotFoundError("The specified key does not exist."), 2, "not found"),
        (
            ConnectionError("reset by https://h/b?X-Amz-Signature=TOPSECRET"),
            1,
            "ConnectionError: reset by https://h/b?…",
        ),
    ],
)
def test_errors_of_object_storage(
    bucket: type[Bucket], tmp_path: Path, error: Exception, status: int, message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    bucket.faults["b/set/class0/000.jpg"] = [error] * 9
    assert run("bucket://b/set", tmp_path / "out") == status
    printed = capfd.readouterr().err
    assert f"bucket://b/set/class0/000.jpg: {message}" in one_line_of(printed)
    no_secrets(tmp_path, printed)


FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture
def repository(web: Web, images: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The branches of hf://datasets/o/n, of two commits: the images below data/, and one of them changed."""
    pytest.importorskip("huggingface_hub")
    files = {f"data/{path.relative_to(images)}": path.read_bytes() for path in images.rglob("*.jpg")}
    commits = {FIRST: files, SECOND: {**files, "data/class0/000.jpg": files["data/class0/001.jpg"]}}
    branches = {"main": FIRST, "refs/pr/1": SECOND}
    monkeypatch.setattr(web, "find", hub("o/n", commits, branches))
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": web.url, "token": False})
    return branches


def test_a_repository_is_read_at_the_commit_it_began_with(
    web: Web, repository: dict[str, str], images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    only_images = shutil.copytree(images, tmp_path / "images", ignore=shutil.ignore_patterns("*.txt"))
    web.faults[f"/datasets/o/n/resolve/{FIRST}/data/class1/007.jpg"] = [403]
    assert run("hf://datasets/o/n/data", tmp_path / "out") == 2
    assert "no permission: HTTP 403" in one_line_of(capfd.readouterr().err)
    repository["main"] = SECOND
    assert run("hf://datasets/o/n/data", tmp_path / "out") == 3
    assert run(only_images, tmp_path / "local") == 3
    assert contents(tmp_path / "out") == contents(tmp_path / "local")
    assert f"read from hf://datasets/o/n@{FIRST}/data" in capfd.readouterr().err
    assert run("hf://datasets/o/n/data", tmp_path / "out") == 2
    assert "the source has changed" in one_line_of(capfd.readouterr().err)
    assert run(f"hf://datasets/o/n@{FIRST}/data", tmp_path / "out") == 3, "the commit itself is the same source"


def test_other_revisions_and_patterns_of_a_repository(repository: dict[str, str], images: Path) -> None:
    assert remote.list_remote("hf://datasets/o/n@refs/pr/1/data").url == f"hf://datasets/o/n@{SECOND}/data"
    listed = remote.list_remote("hf://datasets/o/n/data/class?/00{0..2}.jpg")
    assert [file.path for file in listed.files] == [f"class{c}/00{i}.jpg" for c in (0, 1) for i in range(3)]
    assert all(file.sha256 and file.mark for file in listed.files)


@pytest.mark.usefixtures("repository")
def test_a_file_that_comes_with_another_checksum(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    find = web.find

    def damaged(target: str) -> bytes | None:
        content = find(target)
        return content[::-1] if content and target.endswith("/class0/003.jpg") else content

    monkeypatch.setattr(web, "find", damaged)
    assert run("hf://datasets/o/n/data", tmp_path / "out") == 1
    assert "class0/003.jpg: it came with another SHA-256" in one_line_of(capfd.readouterr().err)
    monkeypatch.setattr(web, "find", find)
    assert run("hf://datasets/o/n/data", tmp_path / "out") == 3


def test_the_download_tells_how_far_it_is(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fasttrain.system.progress.SECONDS_BETWEEN_LINES", 0.0)
    web.files["/a/set-000.tar"] += bytes(3 * 10**6)
    assert run(f"{web.url}/a/set-000.tar", tmp_path / "out") == 0
    assert "download: 3/3 MB" in capfd.readouterr().err


def test_a_local_conversion_does_not_wait_for_fsspec() -> None:
    code = "import sys, fasttrain.dataprep.convert; print({'fsspec', 'aiohttp'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.usefixtures("ray_alone")
def test_workers_of_ray_read_the_copy(web: Web, shards: Path, tmp_path: Path) -> None:
    done = typed(
        "dataprep/convert.py", f"{web.url}/a/set-{{000..002}}.tar", "out", *OPTIONS, "--engine", "ray", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert run(shards / "set-{000..002}.tar", tmp_path / "local") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "local")
