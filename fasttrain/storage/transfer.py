"""The bytes of a file that is far away, from any place on, whatever happens on the way."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

from fasttrain.storage import attempts
from fasttrain.storage.attempts import without_secrets
from fasttrain.storage.remote import RemoteFile, is_http, is_remote
from fasttrain.system.errors import RunError, UserError

BLOCK_BYTES, SMALLEST_BLOCK = 1 << 23, 1 << 18  # asked for at once; less after failures: a slow line takes too long
STREAM_BYTES = 1 << 20  # of a response of HTTP, at once


def received(
    store: Any,  # noqa: ANN401 - fsspec's file system
    ended: threading.Event,
    file: RemoteFile,
    start: int,
    patient: bool = False,
) -> Iterator[bytes]:
    """Yield the bytes of a file from a place on. Where the way to it is cut, they go on from there.

    ended: once it is set, nothing is tried again. patient: as of Tries.

    Raises:
        UserError, RunError: it can't be read, has changed since it was listed, or the store fails.
    """
    blocks: Iterator[bytes] | None = None
    about = without_secrets(store.unstrip_protocol(file.name))
    tries = attempts.Tries(about, ended, patient)
    while file.size is None or start < file.size:
        try:
            if blocks is None:
                blocks = _blocks(store, file, start, max(SMALLEST_BLOCK, BLOCK_BYTES >> (2 * tries.failures)))
            block = attempts.limited(functools.partial(next, blocks, b""), attempts.SECONDS)
            if not block and file.size is not None:
                raise attempts.Cut(f"ended after {start} of {file.size} bytes")
        except Exception as error:
            blocks = None
            tries.failed(error)
            continue
        if not block:
            return
        tries.succeeded()
        start += len(block)
        if file.size is not None and start > file.size:
            raise RunError(f"{about}: more than the {file.size} bytes it had when it was listed: it has changed")
        yield block


def _blocks(store: Any, file: RemoteFile, start: int, size: int) -> Iterator[bytes]:  # noqa: ANN401
    from fsspec.asyn import AsyncFileSystem

    if is_remote(file.name) and is_http(file.name):
        yield from _response(store, file, start)
    elif isinstance(store, AsyncFileSystem):  # which looks up a file's size again when it opens it
        assert file.size is not None
        for place in range(start, file.size, size):
            end = min(place + size, file.size)
            block = store.cat_file(file.name, start=place, end=end)
            if len(block) != end - place:
                raise attempts.Cut(f"{len(block)} bytes came of {end - place}")
            yield block
    else:
        with store.open(file.name, "rb", cache_type="none", size=file.size) as stream:
            stream.seek(start)
            while block := stream.read(size):
                yield block


def _response(store: Any, file: RemoteFile, start: int) -> Iterator[bytes]:  # noqa: ANN401
    """Yield the bytes of a response of HTTP from a place on, also of a server that begins with the first."""
    headers = {**store.kwargs["headers"], **({"Range": f"bytes={start}-"} if start else {})}
    # A size keeps fsspec from asking for it; without blocks it gives the response as it comes.
    with contextlib.closing(store.open(file.name, "rb", block_size=0, size=1, headers=headers)) as stream:
        answer = stream.r.headers
        if file.mark and answer.get("ETag", file.mark).removeprefix("W/") != file.mark.removeprefix("W/"):
            raise RunError(f"{without_secrets(file.name)}: it has changed since it was listed")
        if file.size is None and "Content-Length" not in answer and answer.get("Transfer-Encoding") != "chunked":
            raise UserError(f"{without_secrets(file.name)}: the server says neither its size nor where it ends")
        partial = stream.r.status == 206
        if partial and not answer.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise attempts.Cut("the server sent another part than was asked for")
        passed = start if partial else 0
        while block := stream.read(STREAM_BYTES):  # what has come, that many at most
            wanted = block[max(0, start - passed) :]
            passed += len(block)
            if wanted:
                yield wanted
