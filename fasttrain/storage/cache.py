"""A data set that lies elsewhere, behind a URL: its manifest and, as they are needed, its files come to this machine.

`DIR/SET/` holds them under their own names; SET is a digest of the manifest, so that a set that is converted anew, at
the same URL, has another folder. `DIR/URL` is a digest of the URL, and tells which SET lay there last. A file comes
under a temporary name, locked: who else wants it, thread or process, waits, and takes over where its fetcher has died.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fasttrain.formats.manifest import FILE_NAME, Manifest, ManifestError, Shard, SideFile, glimpses
from fasttrain.storage.attempts import tried, without_secrets
from fasttrain.storage.bounded_folder import COMING, LOCK, BoundedFolder, digest
from fasttrain.storage.remote import RemoteFile, is_http, opened
from fasttrain.storage.transfer import received
from fasttrain.system.durable import MAX_JSON_BYTES, replace_file
from fasttrain.system.errors import DataError, RunError, UserError, note
from fasttrain.system.lock import Lock
from fasttrain.system.regular import read_at_most
from fasttrain.system.watch import ARRIVALS, Watch

DAMAGED_TRIES = 3  # for a file that comes with other bytes than the manifest says
ROOM_SECONDS = 30.0  # for which room is waited for: others close what is removed, or end what comes to them
REFUSED_SECONDS = 600.0  # after which one that could not be had is asked for again
_POLL_SECONDS = 0.1


class Cache:
    """Fetches the files of a set as they are asked for: a Near.

    folder: with the manifest. room: that its files share with those of other sets.
    """

    def __init__(self, url: str, store: Any, folder: Path, manifest: Manifest, room: BoundedFolder) -> None:  # noqa: ANN401
        """store: fsspec's, of the URL. manifest: of the folder."""
        self.url, self.folder, self.room = without_secrets(url), folder, room
        self._url, self._store = url, store
        shards = (shard for of_split in manifest.splits.values() for shard in of_split)
        self._files: dict[str, Shard | SideFile] = {file.name: file for shard in shards for file in shard.files()}
        self._seen: set[str] = set()  # files that this process knows to be sound
        self._receiving: set[str] = set()  # files that come to this process
        self._refused: dict[str, tuple[float, DataError]] = {}  # until when, and why
        self._ended = threading.Event()

    def path(self, name: str) -> Path:
        """Where a file of the set can be read now; fetched first if it is not there, however long that takes.

        Called from many threads and processes: one of them fetches. Storage that does not answer is waited for.

        Raises:
            DataError: it is missing or damaged where it lies, or may not be read.
            RunError: the cache has no room for it.
        """
        path = self.folder / name
        if name in self._seen and _touched(path):
            return path
        if not (_touched(path) and self._is_sound(path)):
            self._fetch(path)
        self._seen.add(name)
        return path

    def shown(self, name: str) -> str:
        """How messages call a file; touches no storage."""
        return without_secrets(below(self._url, name))

    def capacity(self) -> int:
        """How many bytes of files can be near at once, of all processes of this machine."""
        return self.room.available()

    def close(self) -> None:
        """Nobody waits for a file any more: what fails is not tried again."""
        self._ended.set()

    def _is_sound(self, path: Path) -> bool:
        """Look at a file that has lain there since before: a loss of power may have left anything. Remove a bad one."""
        stated = self._files[path.name]
        with contextlib.suppress(OSError):
            wanted = stated.glimpses if isinstance(stated, Shard) else ()
            if path.stat().st_size == stated.num_bytes and (not wanted or glimpses(path) == wanted):
                return True
        path.unlink(missing_ok=True)
        return False

    def _fetch(self, path: Path) -> None:
        coming, moved = path.with_name(f".{path.name}{COMING}"), None
        while True:
            until, refused = self._refused.get(path.name, (0.0, None))
            if refused and time.monotonic() < until:
                raise refused
            with _claimed(coming, self.room) as descriptor:
                if path.exists():
                    return
                if descriptor is not None:
                    self._receiving.add(path.name)
                    try:
                        self._receive(path.name, descriptor)
                    finally:
                        self._receiving.discard(path.name)
                    os.fdatasync(descriptor)  # a loss of power leaves zeros in a file that has its size already
                    os.replace(coming, path)
                    return
            with contextlib.suppress(FileNotFoundError):
                now = coming.stat().st_mtime_ns
                if moved not in (None, now):  # bytes come to another process, or thread
                    ARRIVALS.came()
                elif path.name not in self._receiving and not ARRIVALS.trouble:
                    ARRIVALS.trouble = f"{self.shown(path.name)}: another process is fetching it"
                moved = now
            time.sleep(_POLL_SECONDS)

    def _receive(self, name: str, descriptor: int) -> None:
        """Write a file as the manifest says it is."""
        stated = self._files[name]
        self._make_room(descriptor, stated.num_bytes)
        file = _file_below(self._store, self._url, name, stated.num_bytes)
        try:
            for number in range(DAMAGED_TRIES):
                if not (wrong := self._wrong_with(file, stated.sha256, descriptor)):
                    return
                if number + 1 < DAMAGED_TRIES:
                    note(f"{wrong}: fetched again")
        except UserError as error:
            wrong = str(error)
        refused = DataError(wrong)
        self._refused[name] = time.monotonic() + REFUSED_SECONDS, refused
        raise refused

    def _make_room(self, descriptor: int, num_bytes: int) -> None:
        deadline = time.monotonic() + ROOM_SECONDS
        while True:
            try:
                return self.room.take(descriptor, num_bytes)
            except RunError:
                if num_bytes > self.room.limit or time.monotonic() > deadline or self._ended.wait(_POLL_SECONDS):
                    raise

    def _wrong_with(self, file: RemoteFile, sha256: str, descriptor: int) -> str:
        """Receive a file once; say what is wrong with what has come, "" for nothing."""
        found = hashlib.sha256()
        try:
            with open(descriptor, "wb", closefd=False) as stream:
                stream.seek(0)
                for block in received(self._store, self._ended, file, 0, patient=True):
                    found.update(block)
                    stream.write(block)
        except RunError as error:
            return str(error)
        except OSError as error:
            raise self.room.failed(error) from None
        return "" if found.hexdigest() == sha256 else f"{self.shown(file.path)}: damaged: its SHA-256 is another one"


def open_cache(url: str, folder: Path, limit: int) -> Cache:
    """The set at a URL, with its manifest as it is now, or was at an earlier start if its storage does not answer.

    folder: of the cache. limit: bytes of all that lies in it. Of processes that ask at once, one fetches.

    Raises:
        UserError, RunError: there is none, or it can't be had.
        ManifestError: it is malformed.
    """
    room, mark, watch = BoundedFolder(folder, limit), folder / digest(url.encode()), Watch("manifest", str)
    asked = _state(mark)
    with watch.patrol(), watch.at(without_secrets(below(url, FILE_NAME))), room.locked(f".{mark.name}{LOCK}"):
        store, _ = opened(url)
        if _state(mark) == asked:  # no other process has fetched it meanwhile
            try:
                content = _manifest_of(store, url)
                of_set = folder / digest(content)
                of_set.mkdir(exist_ok=True)
                replace_file(of_set / FILE_NAME, lambda file: file.write(content))
                _load(of_set, url)
                replace_file(mark, lambda file: file.write(of_set.name.encode()))
            except UserError as error:
                wanted = "; what lies elsewhere is trained on once it is converted (convert.py)"
                raise UserError(f"{error}{wanted if 'not found' in str(error) else ''}") from None
            except RunError:
                if not mark.exists():
                    raise
                note(f"{without_secrets(url)} does not answer: its manifest of an earlier start is taken")
                mark.touch()
        of_set = folder / read_at_most(mark, len(mark.name)).decode()
    return Cache(url, store, of_set, _load(of_set, url), room)


def below(url: str, name: str) -> str:
    """Return the URL of a file in the folder that a URL names; a query, as of a signature, is kept."""
    bare, query = re.fullmatch("([^?#]*)(.*)", url).groups() if is_http(url) else (url, "")  # type: ignore[union-attr]
    return f"{bare.rstrip('/')}/{name}{query}"


def _file_below(store: Any, url: str, name: str, size: int | None) -> RemoteFile:  # noqa: ANN401
    """What is known of a file without asking the storage."""
    address = below(url, name)
    return RemoteFile(address if is_http(url) else store._strip_protocol(address), name, size, "", "", "")


def _manifest_of(store: Any, url: str) -> bytes:  # noqa: ANN401
    file = _file_below(store, url, FILE_NAME, None)
    if not is_http(url):  # which tells the size with the content
        store.invalidate_cache()
        info = tried(lambda: store.info(file.name), without_secrets(below(url, FILE_NAME)))
        file = file._replace(size=int(info["size"]))
    content = bytearray()
    for block in received(store, threading.Event(), file, 0):
        content += block
        if len(content) > MAX_JSON_BYTES:
            raise UserError(f"{without_secrets(below(url, FILE_NAME))}: larger than {MAX_JSON_BYTES} bytes")
    return bytes(content)


def _load(of_set: Path, url: str) -> Manifest:
    try:
        return Manifest.load(of_set)
    except ManifestError as error:
        raise ManifestError(str(error).replace(str(of_set), without_secrets(url))) from None


def _state(mark: Path) -> tuple[int, int] | None:
    """Another one each time the file is written or touched, whatever the clock says."""
    with contextlib.suppress(FileNotFoundError):
        status = mark.stat()
        return status.st_ino, status.st_mtime_ns
    return None


@contextlib.contextmanager
def _claimed(coming: Path, room: BoundedFolder) -> Iterator[int | None]:
    """Lock the file that another one comes as, to write it; None where another thread or process has. It is removed
    where it is left there."""
    try:
        descriptor = os.open(coming, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with Lock(descriptor):
            if not _is_ours(descriptor, coming):
                yield None
                return
            try:
                yield descriptor
            finally:
                if _is_at(descriptor, coming):
                    coming.unlink()
    except OSError as error:
        raise room.failed(error) from None


def _is_ours(descriptor: int, coming: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return _is_at(descriptor, coming)  # not renamed, or removed, between opening and locking


def _is_at(descriptor: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False


def _touched(path: Path) -> bool:
    """Whether a file is there, which is used now."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    except PermissionError:  # another user's
        pass
    return True
