"""A set that lies elsewhere: what comes, when, and once; what fails, and how it is told; how much is kept."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.web import Web, web_server

from fasttrain.formats.manifest import glimpses
from fasttrain.storage import attempts, bounded_folder, cache
from fasttrain.storage.cache import Cache, open_cache
from fasttrain.system import watch
from fasttrain.system.errors import DataError, RunError, UserError
from fasttrain.system.watch import ARRIVALS

SIZE = 20_000
NAMES = [f"train-{number:05d}.beton" for number in range(4)]
# What another process does with a cache: fetches files that are named, and says when it has them.
FETCHING = """
import pathlib, sys
from fasttrain.storage import cache
url, folder, *names = sys.argv[1:]
opened = cache.open_cache(url, pathlib.Path(folder), 10**9)
print("open", flush=True)
for name in names:
    print(len(opened.path(name).read_bytes()), flush=True)
"""


def content_of(name: str, edition: int = 0) -> bytes:
    return hashlib.sha256(f"{name} {edition}".encode()).digest() * (SIZE // 32)


def publish(web: Web, edition: int = 0) -> None:
    """Have the server hold a set of four shards at /set."""
    files = {name: content_of(name, edition) for name in NAMES}
    shards = [
        {"name": name, "num_samples": 1, "num_bytes": SIZE, "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
    ]
    manifest = {
        "version": 2, "format": "ffcv", "classes": [], "splits": {"train": shards}, "pixel_mean": [0.5] * 3,
        "pixel_std": [0.5] * 3, "settings": {}, "skipped": [], "class_counts": {}, "versions": {},
    }  # fmt: skip
    web.files.update({f"/set/{name}": content for name, content in files.items()})
    web.files["/set/manifest.json"] = json.dumps(manifest).encode()


def asked(web: Web, name: str) -> int:
    """How often a file was asked for."""
    return sum(f"/set/{name}" == target.partition("?")[0] for _, target, _ in web.requests)


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """A server with a set, whose failures cost no time."""
    monkeypatch.setattr(attempts, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(attempts, "_told", 0)
    monkeypatch.setattr(bounded_folder, "SPARE_BYTES", 0)
    monkeypatch.setattr(cache, "ROOM_SECONDS", 0.0)
    with web_server() as server:
        publish(server)
        yield server


def opened(web: Web, folder: Path, limit: int = 10**9, query: str = "") -> Cache:
    return open_cache(f"{web.url}/set{query}", folder, limit)


def kept(found: Cache) -> list[str]:
    return sorted(path.name for path in found.folder.iterdir() if path.name != "manifest.json")


def test_a_file_comes_once_and_stays(web: Web, tmp_path: Path) -> None:
    found = opened(web, tmp_path)
    assert found.path(NAMES[1]).read_bytes() == content_of(NAMES[1]) == found.path(NAMES[1]).read_bytes()
    assert opened(web, tmp_path).path(NAMES[1]).read_bytes() == content_of(NAMES[1])
    assert asked(web, NAMES[1]) == 1
    assert asked(web, "manifest.json") == 2, "it comes anew at each start"
    assert kept(found) == NAMES[1:2]


def test_a_store_that_is_no_server_of_the_web(tmp_path: Path, web: Web) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    try:
        for path, content in web.files.items():
            memory.pipe(path, content)
        found = open_cache("memory://set/", tmp_path, 10**9)
        assert found.path(NAMES[2]).read_bytes() == content_of(NAMES[2])
        memory.rm(f"/set/{NAMES[0]}")
        with pytest.raises(DataError, match=f"{NAMES[0]}: not found"):
            found.path(NAMES[0])
    finally:
        memory.store.clear()


def test_no_message_holds_a_signature_and_every_request_does(web: Web, tmp_path: Path) -> None:
    found = opened(web, tmp_path, query="?sig=secret")
    assert "secret" not in found.url + found.shown(NAMES[0])
    assert NAMES[0] in found.shown(NAMES[0])
    del web.files[f"/set/{NAMES[0]}"]
    with pytest.raises(DataError, match="not found") as error:
        found.path(NAMES[0])
    found.path(NAMES[1])
    assert "secret" not in str(error.value)
    assert all(target.endswith("?sig=secret") for _, target, _ in web.requests)


def test_many_threads_and_two_processes_fetch_each_file_once(web: Web, tmp_path: Path) -> None:
    web.pace = 0.02
    command = [sys.executable, "-c", FETCHING, f"{web.url}/set", str(tmp_path), *NAMES]
    others = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = opened(web, tmp_path)
    with ThreadPoolExecutor(8) as threads:
        paths = list(threads.map(found.path, NAMES * 4))
    assert all(path.read_bytes() == content_of(path.name) for path in paths)
    for other in others:
        output, _ = other.communicate(timeout=60)
        assert output.split() == ["open"] + [str(SIZE)] * 4
    assert [asked(web, name) for name in NAMES] == [1] * 4
    assert kept(found) == NAMES


def test_one_takes_over_where_the_fetcher_is_killed(web: Web, tmp_path: Path) -> None:
    web.faults[f"/set/{NAMES[0]}"] = ["stall"]
    command = [sys.executable, "-c", FETCHING, f"{web.url}/set", str(tmp_path), NAMES[0]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "open\n"
        while not asked(web, NAMES[0]):
            time.sleep(0.01)
        found = opened(web, tmp_path)
        with ThreadPoolExecutor(1) as thread:
            waiting = thread.submit(found.path, NAMES[0])
            moved, ARRIVALS.trouble = ARRIVALS.moved, ""
            while not ARRIVALS.trouble:
                time.sleep(0.01)
            assert f"/set/{NAMES[0]}: another process is fetching it" in ARRIVALS.trouble
            assert ARRIVALS.moved == moved, "no byte has come"
            assert not waiting.done()
            other.send_signal(signal.SIGKILL)
            assert waiting.result(30).read_bytes() == content_of(NAMES[0])
    assert kept(found) == NAMES[:1]


@pytest.mark.parametrize("length", ["length", "chunked", "close"])
@pytest.mark.parametrize(
    "faults", [["damage"], ["less"], ["more"], [5000, 7000, 100], [503, 429, 500, 502, 503, 504], [0, 0, 1]]
)
def test_what_fails_a_few_times_is_had_in_the_end(
    web: Web, tmp_path: Path, faults: list[int | str], length: str
) -> None:
    found = opened(web, tmp_path)
    web.length, web.faults[f"/set/{NAMES[0]}"] = length, list(faults)
    assert found.path(NAMES[0]).read_bytes() == content_of(NAMES[0])
    assert kept(found) == NAMES[:1]
    assert not web.faults[f"/set/{NAMES[0]}"]


def test_what_is_damaged_for_ever_is_an_error_that_is_not_tried_again_at_once(
    web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    web.damaged.add(f"/set/{NAMES[0]}")
    found = opened(web, tmp_path)
    for _ in range(2):
        with pytest.raises(DataError, match=f"/set/{NAMES[0]}: damaged: its SHA-256 is another one"):
            found.path(NAMES[0])
    assert asked(web, NAMES[0]) == cache.DAMAGED_TRIES
    assert not kept(found)
    assert capsys.readouterr().err.count("fetched again") == cache.DAMAGED_TRIES - 1
    web.damaged.clear()
    monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + cache.REFUSED_SECONDS)
    assert found.path(NAMES[0]).read_bytes() == content_of(NAMES[0])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda content: content[:-1000], "19000 of 20000 bytes|HTTP 416"),
        (lambda content: content + b"0", "more than the 20000 bytes"),
        (lambda content: b"", "0 of 20000 bytes"),
        (lambda content: content[::-1], "SHA-256"),
        (None, "not found"),
    ],
)
def test_another_file_than_the_manifests_is_an_error_that_says_so(
    web: Web, tmp_path: Path, change: object, told: str
) -> None:
    found = opened(web, tmp_path)
    content = web.files.pop(f"/set/{NAMES[0]}")
    if callable(change):
        web.files[f"/set/{NAMES[0]}"] = change(content)
    with pytest.raises(DataError, match=told):
        found.path(NAMES[0])
    assert not kept(found)


def test_storage_that_is_away_is_waited_for(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(attempts, "PAUSE_SECONDS", 0.001)
    found, web.away = opened(web, tmp_path), True
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(found.path, NAMES[0])
        while asked(web, NAMES[0]) < 2 * attempts.TOLD:
            time.sleep(0.01)
        assert not waiting.done()
        assert f"{web.url}/set/{NAMES[0]}: " in ARRIVALS.trouble
        web.away = False
        assert waiting.result(30).read_bytes() == content_of(NAMES[0])
    assert not ARRIVALS.trouble
    told = capsys.readouterr().err
    assert told.count("tried again in") == attempts.TOLD
    assert told.count("are not told") == 1


def test_pauses_grow_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    ended = threading.Event()
    monkeypatch.setattr(ended, "wait", lambda seconds: pauses.append(seconds))
    tries = attempts.Tries("a", ended, patient=True)
    for _ in range(1200):
        tries.failed(OSError("away"))
    assert pauses[:5] == [1, 2, 4, 8, 10]
    assert pauses[-1] == attempts.LONGEST_PAUSE
    assert pauses[-1] < watch.STALL_SECONDS / 4  # else an outage that is shorter than a run's wait could end it


def test_nobody_waits_for_a_cache_that_is_closed(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "PAUSE_SECONDS", 60.0)
    found, web.away = opened(web, tmp_path), True
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(found.path, NAMES[0])
        while not asked(web, NAMES[0]):
            time.sleep(0.01)
        found.close()
        with pytest.raises(Exception, match="Server disconnected"):
            waiting.result(30)


def test_the_least_recently_used_make_room(web: Web, tmp_path: Path) -> None:
    found = opened(web, tmp_path, limit=3 * SIZE + 100)
    for name in (*NAMES[:3], NAMES[0], NAMES[3]):
        found.path(name)
    assert kept(found) == [NAMES[0], *NAMES[2:]]
    publish(web, edition=1)
    other = opened(web, tmp_path, limit=2 * SIZE)
    assert other.folder != found.folder
    assert other.path(NAMES[0]).read_bytes() == content_of(NAMES[0], 1), "of the set as it is now"
    assert (kept(other), kept(found)) == (NAMES[:1], [NAMES[3]]), "all sets share the room"


def test_files_of_others_are_neither_counted_nor_removed(web: Web, tmp_path: Path) -> None:
    """Whoever gives a whole disk as --cache has other folders on it."""
    others = [tmp_path / name for name in ("photos/a.jpg", f"{'a' * 32}/b.pt", "runs/c.coming")]
    for path in others:
        path.parent.mkdir()
        path.write_bytes(bytes(10 * SIZE))
    found = opened(web, tmp_path, limit=2 * SIZE)
    for name in NAMES:
        found.path(name)
    assert all(path.stat().st_size == 10 * SIZE for path in others)
    assert kept(found) == NAMES[2:]


def test_a_file_that_is_in_use_stays_readable(web: Web, tmp_path: Path) -> None:
    found = opened(web, tmp_path, limit=SIZE)
    with open(found.path(NAMES[0]), "rb") as file:
        found.path(NAMES[1])
        assert kept(found) == NAMES[1:2]
        assert file.read() == content_of(NAMES[0])


def test_what_does_not_fit_is_one_line_and_removes_nothing_of_others(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(RunError, match=r"no room for a file of 20,000 bytes .*: --cache-gb 1e-05, free on the disk"):
        opened(web, tmp_path, limit=10_000).path(NAMES[0])
    usage = bounded_folder.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(bounded_folder.shutil, "disk_usage", lambda _path: usage._replace(free=SIZE - 1))
    with pytest.raises(RunError, match="free on the disk 19,999 bytes"):
        opened(web, tmp_path).path(NAMES[0])
    monkeypatch.setattr(bounded_folder.shutil, "disk_usage", lambda _path: usage._replace(free=SIZE))
    found = opened(web, tmp_path)
    found.path(NAMES[0])
    assert found.room.available() == 2 * SIZE
    assert (tmp_path / "mine.txt").read_text() == "kept"

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RunError, match=f"--cache {tmp_path}: disk full: No space left on device"):
        found.path(NAMES[1])
    assert kept(found) == NAMES[:1]


def test_room_is_waited_for_while_others_have_what_was_removed_open(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "ROOM_SECONDS", 100.0)
    usage, free = bounded_folder.shutil.disk_usage(tmp_path), [SIZE] * 9
    monkeypatch.setattr(
        bounded_folder.shutil, "disk_usage", lambda _path: usage._replace(free=free.pop(0) if free else SIZE)
    )
    found = opened(web, tmp_path)
    found.path(NAMES[0])
    free[:] = [0, 0, 0, 0, 0, SIZE, SIZE]
    assert found.path(NAMES[1]).read_bytes() == content_of(NAMES[1])
    assert kept(found) == NAMES[1:2]


def test_files_of_others_in_its_folder_are_neither_counted_nor_removed(web: Web, tmp_path: Path) -> None:
    mine = tmp_path / "photographs/train-00000.beton"
    mine.parent.mkdir()
    mine.write_bytes(bytes(SIZE))
    os.utime(mine, (0, 0))
    found = opened(web, tmp_path, limit=SIZE)
    assert found.capacity() == SIZE
    for name in NAMES[:2]:
        found.path(name)
    assert mine.exists()
    assert kept(found) == NAMES[1:2]


def test_left_overs_of_killed_processes_are_removed_and_others_not(web: Web, tmp_path: Path) -> None:
    found = opened(web, tmp_path)
    stale, held = (found.folder / f".{name}{bounded_folder.COMING}" for name in NAMES[:2])
    stale.write_bytes(bytes(SIZE))
    with open(held, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        found.path(NAMES[2])
        assert kept(found) == [held.name, NAMES[2]]


@pytest.mark.parametrize("damage", [lambda path: os.truncate(path, 10), lambda path: path.write_bytes(bytes(SIZE))])
def test_a_file_that_a_loss_of_power_has_spoilt_is_fetched_again(
    web: Web, tmp_path: Path, damage: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = opened(web, tmp_path).path(NAMES[0])
    content = json.loads(web.files["/set/manifest.json"])
    content["splits"]["train"][0]["glimpses"] = list(glimpses(path))
    web.files["/set/manifest.json"] = json.dumps(content).encode()
    path = opened(web, tmp_path).path(NAMES[0])
    assert callable(damage)
    damage(path)
    assert opened(web, tmp_path).path(NAMES[0]).read_bytes() == content_of(NAMES[0])


def test_a_manifest_of_an_earlier_start_does_while_storage_is_away(
    web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened(web, tmp_path).path(NAMES[0])
    web.away = True
    assert opened(web, tmp_path).path(NAMES[0]).read_bytes() == content_of(NAMES[0])
    assert f"note: {web.url}/set does not answer: its manifest of an earlier start is taken" in capsys.readouterr().err
    with pytest.raises(RunError, match=r"/set/manifest.json: .*given up after 4 tries"):
        opened(web, tmp_path / "another")
    web.away = False
    del web.files["/set/manifest.json"]
    with pytest.raises(
        UserError, match=r"/set/manifest.json: not found.*; what lies elsewhere is trained on once it is converted"
    ):
        opened(web, tmp_path)


def test_of_processes_that_ask_at_once_one_fetches_the_manifest(web: Web, tmp_path: Path) -> None:
    web.pace = 0.02
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: opened(web, tmp_path).folder, range(4)))
    assert len(set(found)) == 1
    assert asked(web, "manifest.json") == 1


def test_the_manifest_comes_anew_where_the_clock_was_ahead_once(web: Web, tmp_path: Path) -> None:
    before = opened(web, tmp_path).folder
    for path in tmp_path.iterdir():
        os.utime(path, (2**32, 2**32))
    publish(web, edition=1)
    assert opened(web, tmp_path).folder != before


@pytest.mark.parametrize("content", [b"", b"<html>", b"[]", b'{"version": 9}'])
def test_a_malformed_manifest_is_one_line_with_the_url(web: Web, tmp_path: Path, content: bytes) -> None:
    web.files["/set/manifest.json"] = content
    with pytest.raises(DataError, match=f"^{web.url}/set/manifest.json: ") as error:
        opened(web, tmp_path)
    assert str(tmp_path) not in str(error.value)
