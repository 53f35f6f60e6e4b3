"""Files that are written far away: each is whole there or absent, as far as the store can promise that.

Object stores show an object once its upload is complete. In others (sftp, smb, …) a file has a temporary name until it
is whole, and is then moved. What fails for a passing reason is tried again (fasttrain.storage.attempts).
"""

from __future__ import annotations

import base64
import contextlib
import errno
import functools
import hashlib
import re
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fasttrain.storage import attempts
from fasttrain.storage.attempts import Tries, limited, tried, without_secrets
from fasttrain.system.errors import UserError

LEAST_BYTES_PER_SECOND = 1 << 18  # an upload that is slower counts as one that hangs
_REMOVED_AT_ONCE = 1000  # what one request of S3 can name
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp")


def temporary_of(name: str) -> str:
    """Return the name of the file that a temporary name stands for; "" for any other name."""
    found = _TEMPORARY.fullmatch(name)
    return found[1] if found else ""


def list_folder(store: Any, folder: str) -> dict[str, int]:  # noqa: ANN401 - fsspec's file system
    """Return the bytes of what lies directly in a folder, by name; -1 for no file. Empty if there is no such folder.

    Raises:
        UserError, RunError: there is a file of that name, it can't be listed, or the store fails.
    """
    shown = without_secrets(store.unstrip_protocol(folder))

    def look() -> list[dict[str, Any]]:
        store.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            return list(store.ls(folder, detail=True))
        return []

    found: dict[str, int] = {}
    for info in tried(look, shown, attempts.LISTING_SECONDS):
        name, is_file = info["name"].rstrip("/"), info["type"] == "file" and not info["name"].endswith("/")
        if name.lstrip("/") != folder.strip("/"):
            found[name.rpartition("/")[2]] = int(info["size"]) if is_file else -1
        elif is_file and info["size"]:  # empty, it is how tools mark a folder
            raise UserError(f"{shown}: not a folder")
    return found


def make_folder(store: Any, folder: str) -> None:  # noqa: ANN401
    """Make a folder, where a store has any: one of objects would make a bucket of a name that was typed wrong."""
    if not _is_of_objects(store):
        tried(lambda: store.makedirs(folder, exist_ok=True), without_secrets(store.unstrip_protocol(folder)))


def read_small(store: Any, name: str) -> bytes | None:  # noqa: ANN401
    """Return what a file of a store holds, None if there is no such file. Raises UserError, RunError."""

    def read() -> bytes | None:
        with contextlib.suppress(FileNotFoundError):
            return bytes(store.cat_file(name))
        return None

    return tried(read, without_secrets(store.unstrip_protocol(name)))


def upload(store: Any, path: Path, name: str, moved: Callable[[], None]) -> None:  # noqa: ANN401
    """Write a file of this machine to a store, in place of an older one, and compare what arrived.

    moved: called whenever some of it is on its way.

    Raises:
        UserError, RunError: it can't be written there, or the store fails.
    """
    num_bytes = path.stat().st_size
    tries = Tries(without_secrets(store.unstrip_protocol(name)))
    put = _put_object if _is_of_objects(store) else _put_and_move
    while True:
        try:
            seconds = attempts.SECONDS + num_bytes / LEAST_BYTES_PER_SECOND
            return limited(functools.partial(put, store, path, name, moved), seconds)
        except Exception as error:
            tries.failed(error)


def remove(store: Any, names: Sequence[str]) -> None:  # noqa: ANN401
    """Remove files from a store; those that are gone already are passed over. Raises UserError, RunError."""

    def one(name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            store.rm_file(name)

    def several(part: Sequence[str]) -> None:
        try:
            store.rm(part)
        except FileNotFoundError:
            for name in part:
                one(name)

    step = _REMOVED_AT_ONCE if _is_of_objects(store) else 1
    for start in range(0, len(names), step):
        part = list(names[start : start + step])
        call = functools.partial(several, part) if step > 1 else functools.partial(one, part[0])
        tried(call, without_secrets(store.unstrip_protocol(part[0])), attempts.LISTING_SECONDS)


def _is_of_objects(store: Any) -> bool:  # noqa: ANN401
    """Whether a store is one of objects (S3, GCS, Azure): fsspec's asynchronous ones are, those that can be written."""
    from fsspec.asyn import AsyncFileSystem

    return isinstance(store, AsyncFileSystem)


def _put_object(store: Any, path: Path, name: str, moved: Callable[[], None]) -> None:  # noqa: ANN401
    _in_place_of(store, name, lambda: store.put_file(str(path), name, callback=_callback(moved)))
    try:
        _check_arrived(store, path, name)
    except attempts.Cut:
        store.rm_file(name)
        raise


def _put_and_move(store: Any, path: Path, name: str, moved: Callable[[], None]) -> None:  # noqa: ANN401
    folder, _, last = name.rpartition("/")
    temporary = f"{folder}/.{last}.{secrets.token_hex(4)}.tmp"  # another one for whoever writes the same file meanwhile
    try:
        store.put_file(str(path), temporary, callback=_callback(moved))
        _check_arrived(store, path, temporary)
        _in_place_of(store, name, lambda: store.mv(temporary, name))
    except BaseException:
        with contextlib.suppress(Exception):  # it is there no more, or the store is down
            store.rm_file(temporary)
        raise


def _in_place_of(store: Any, name: str, write: Callable[[], object]) -> None:  # noqa: ANN401
    """Write a file; an older one is removed before, where a store asks for that."""
    try:
        write()
    except OSError as error:
        if not isinstance(error, FileExistsError) and error.errno != errno.EEXIST:
            raise
        store.rm_file(name)
        write()


def _check_arrived(store: Any, path: Path, name: str) -> None:  # noqa: ANN401
    """Compare the size, and the MD5 where the store states it. An ETag may be one, or not: nothing tells which."""
    store.invalidate_cache()
    info, num_bytes = store.info(name), path.stat().st_size
    if info["size"] != num_bytes:
        raise attempts.Cut(f"{info['size']} bytes arrived of {num_bytes}")
    if stated := info.get("md5Hash"):
        with open(path, "rb") as file:
            digest = hashlib.md5(usedforsecurity=False)
            while block := file.read(1 << 20):
                digest.update(block)
        if base64.b64encode(digest.digest()).decode() != stated:
            raise attempts.Cut("it arrived with another MD5")


def _callback(moved: Callable[[], None]) -> Any:  # noqa: ANN401
    from fsspec.callbacks import Callback

    return Callback(hooks={"moved": lambda *_, **__: moved()})
