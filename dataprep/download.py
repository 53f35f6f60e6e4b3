"""The copy of a remote source, beside OUT for the time of a conversion: `OUT.source`.

`copy.json` says what it is a copy of, `files/` holds what is whole, under the names of the source, and `parts/` what is
under way. It is a copy because the images of every shard lie all over the source: read in place, each would cost a
round trip. convert.py locks OUT, and with it the copy.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fasttrain.dataprep.shards import checksum
from fasttrain.storage.attempts import without_secrets
from fasttrain.storage.remote import REQUESTS, Remote, RemoteFile, list_remote, protocol_of
from fasttrain.storage.transfer import BLOCK_BYTES, received
from fasttrain.system.durable import naming, read_json, reason, temporary_path, write_json
from fasttrain.system.errors import RunError, UserError
from fasttrain.system.ordered import map_in_order
from fasttrain.system.progress import progress
from fasttrain.system.watch import Watch

_MARKER, _FILES, _PARTS = "copy.json", "files", "parts"
SYNC_BYTES = 1 << 26  # are on the disk before more is written: what a download goes on from after a loss of power


def copy_folder(out: Path) -> Path:
    """Return where the copy for a conversion into `out` lies."""
    return Path(f"{os.path.abspath(out)}.source")


def list_source(source: str, out: Path) -> Remote:
    """List a URL; of a repository, at the commit that an unfinished copy beside `out` is of.

    Raises what list_remote does, and UserError where the copy is of another source, or could not be found by a pattern.
    """
    marker = _read_marker(copy_folder(out))
    if marker and marker["source"] != without_secrets(source):
        raise _left_over(copy_folder(out), marker)
    remote = list_remote(marker["pinned"] if marker and protocol_of(source) == "hf" else source)
    is_pattern = remote.within and all(file.path != remote.within for file in remote.files)
    if is_pattern and any(sign in str(copy_folder(out)) for sign in "*?[{"):
        raise UserError(f"{out}: name an OUT without * ? [ {{, as they would be taken for a part of the pattern")
    return remote


def begin_copy(source: str, remote: Remote, out: Path) -> None:
    """Make the folder of the copy, or check that what lies there is one of this listing; UserError if not."""
    folder = copy_folder(out)
    pinned = remote.url if protocol_of(source) == "hf" else ""
    wanted = {"source": without_secrets(source), "pinned": pinned, "listing": remote.digest(times=True)}
    marker = _read_marker(folder)
    if marker not in (None, wanted):
        raise _left_over(folder, marker)
    for name in ("", _FILES, _PARTS):
        (folder / name).mkdir(exist_ok=True)
    if marker is None:
        write_json(folder / _MARKER, wanted)


def copied(remote: Remote, out: Path) -> Path:
    """Download what is missing; return the path that stands for the source.

    Raises:
        UserError, RunError: of the store, as `received` does; no room; or the source has changed meanwhile. What is
            whole stays, and the next call goes on.
    """
    folder = copy_folder(out)
    try:
        if missing := _prepared(folder, remote):
            _download(folder, remote, missing)
            _check_unchanged(folder, remote)
    except OSError as error:
        kept = "finished files are kept, run the same command again to continue"
        raise RunError(f"{error.filename or folder}: {reason(error)}: {kept}") from None
    return folder / _FILES / remote.within


def remove_copy(out: Path) -> None:
    """Remove the copy; nothing if there is none, or if it is something else. Its mark goes last."""
    folder = copy_folder(out)
    if _read_marker(folder, refuse=False) is not None:
        for name in (_FILES, _PARTS):
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / _MARKER).unlink()
        with contextlib.suppress(OSError):  # somebody put something there
            folder.rmdir()


def _read_marker(folder: Path, refuse: bool = True) -> dict[str, Any] | None:
    """Return what the mark of a copy says, None if the folder is new or empty; UserError if it is something else."""
    try:
        marker = read_json(folder / _MARKER, follow=False)
        if isinstance(marker, dict) and marker.keys() == {"source", "pinned", "listing"}:
            return marker
    except FileNotFoundError:
        begun = {_FILES, _PARTS, temporary_path(folder / _MARKER).name}  # and then killed
        if not folder.exists() or begun.issuperset(os.listdir(folder)):
            return None
    except (OSError, ValueError):
        pass
    if refuse:
        raise UserError(f"{folder} is in the way and holds no copy of a source: remove it, or name another OUT")
    return None


def _left_over(folder: Path, marker: dict[str, Any]) -> UserError:
    return UserError(
        f"{folder} holds a copy of {marker['source']} as it was for another conversion: remove it, or name another OUT"
    )


def _prepared(folder: Path, remote: Remote) -> list[tuple[int, RemoteFile]]:
    """Make the folders; return the files that are missing, with their numbers. UserError, RunError: no place."""
    paths = [*remote.folders, *(file.path for file in remote.files)]
    if len({path.casefold() for path in paths}) < len(paths) and (folder / _MARKER.upper()).exists():
        raise UserError(f"{without_secrets(remote.url)}: names differ only in case, which {folder} can't tell apart")
    for path in remote.folders:
        (folder / _FILES / path).mkdir(parents=True, exist_ok=True)
    numbered = enumerate(remote.files)
    missing = [(number, file) for number, file in numbered if not _is_whole(folder / _FILES / file.path, file)]
    needed, free = sum(file.size or 0 for _, file in missing), shutil.disk_usage(folder).free
    started = sum(entry.stat().st_size for entry in os.scandir(folder / _PARTS))
    if needed - started > free:
        raise RunError(f"{folder}: the copy takes {needed - started:,} bytes more, and {free:,} are free")
    return missing


def _is_whole(path: Path, file: RemoteFile) -> bool:
    """Whether a file has its name, which it gets when it is whole, and its size."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and file.size in (None, status.st_size)


def _download(folder: Path, remote: Remote, missing: list[tuple[int, RemoteFile]]) -> None:
    total = sum(file.size or 0 for file in remote.files)
    done = total - sum(file.size or 0 for _, file in missing)
    lock, rest = threading.Lock(), done % 10**6
    watch: Watch[str] = Watch("part of a file", str)

    def moved(num_bytes: int) -> None:
        nonlocal rest
        with lock:
            whole, rest = divmod(rest + num_bytes, 10**6)
            if whole:
                advance(whole)
        watch.moved()

    ended = threading.Event()
    receive = functools.partial(received, remote.store, ended)

    def fetch(numbered: tuple[int, RemoteFile]) -> None:
        with watch.at(numbered[1].path):
            _fetch(folder, *numbered, receive, moved)

    fetched = map_in_order(fetch, missing, REQUESTS)
    with (
        contextlib.closing(fetched),
        watch.patrol(),
        progress(total // 10**6, done // 10**6, "download", "MB") as advance,
    ):
        try:
            for _ in fetched:
                pass
        finally:  # also where one of them fails: the others are waited for, but try no more
            ended.set()


def _fetch(
    folder: Path,
    number: int,
    file: RemoteFile,
    receive: Callable[[RemoteFile, int], Iterator[bytes]],
    moved: Callable[[int], None],
) -> None:
    """Download one file, from where an earlier try got to, and give it its name."""
    part, path = folder / _PARTS / str(number), folder / _FILES / file.path
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    with naming(path), open(descriptor, "r+b") as stream:
        # What is certainly on the disk: the last block before a sync may not be.
        size = os.fstat(descriptor).st_size if file.size is not None else 0
        at = max(0, min(size, file.size or 0) - BLOCK_BYTES - 1) // SYNC_BYTES * SYNC_BYTES
        stream.truncate(at)
        stream.seek(at)
        moved(at)
        for block in receive(file, at):
            stream.write(block)
            if (at + len(block)) // SYNC_BYTES > at // SYNC_BYTES:
                _flush(stream)
            at += len(block)
            moved(len(block))
        _flush(stream)
    if file.sha256 and checksum(part) != file.sha256:
        part.unlink()
        raise RunError(f"{path}: it came with another SHA-256: run the same command again")
    os.replace(part, path)


def _flush(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _check_unchanged(folder: Path, remote: Remote) -> None:
    """Raise RunError if the source is listed otherwise now than before the download."""
    again = list_remote(remote.url)
    if again.digest(times=True) == remote.digest(times=True):
        return
    now = {file.path: file for file in again.files}
    changed = next((file.path for file in remote.files if now.get(file.path) != file), "a file that is new")
    raise RunError(
        f"{without_secrets(remote.url)} changed while it was downloaded, first {changed}: "
        f"remove {folder} and what it was for, and begin again"
    )
