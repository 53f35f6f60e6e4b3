"""Files that are old, new or absent, never half: whatever ends the process or the machine while they are written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fasttrain.system.regular import regular_descriptor

MAX_JSON_BYTES = 1 << 30


class NewFile:
    """A file that is written under a temporary name in the same folder until it is whole."""

    def __init__(self, path: Path, buffering: int = -1) -> None:
        """Open the temporary file, as `file`; buffering: as for open()."""
        self._path, self._temporary = path, temporary_path(path)
        # A left-over is removed and not opened: it may be a link, or have another name elsewhere.
        self._temporary.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        descriptor = os.open(self._temporary, flags, 0o666)
        self.file: BinaryIO = open(descriptor, "wb", buffering)  # noqa: SIM115 - closed by publish or discard

    def flush(self) -> None:
        """Write to the disk what the file holds so far. Raises OSError."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def publish(self) -> None:
        """Flush it to the disk and give it its name, in place of an older one. Raises OSError."""
        self.flush()
        self.file.close()
        publish(self._temporary, self._path)

    def discard(self) -> None:
        """Remove the temporary file; nothing once it has its name."""
        with contextlib.suppress(OSError):  # closing writes what is buffered, which fails again on a full disk
            self.file.close()
        self._temporary.unlink(missing_ok=True)


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a new file, and put it in the place of an older one.

    Raises what `write` does, and OSError; the temporary file is then gone and the old one is still there.
    """
    with naming(path):
        new = NewFile(path)
        try:
            write(new.file)
            new.publish()
        finally:
            new.discard()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the system in here that names no file, as that of a full disk, names this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def reason(error: OSError) -> str:
    """What the system says, without the name of a file."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"{'disk full: ' if full else ''}{error.strerror or error}"


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file as replace_file does."""
    replace_file(path, lambda file: file.write(f"{json.dumps(value, indent=1)}\n".encode("ascii")))


def read_json(path: Path, follow: bool = True) -> Any:  # noqa: ANN401 - whatever it holds
    """Return what a JSON file holds; nothing that it says or is can hang or end the process.

    follow: whether it may be a link. Raises OSError, also for no regular file, and ValueError for what is malformed or
    larger than MAX_JSON_BYTES.
    """
    descriptor = regular_descriptor(path, os.O_RDONLY | (0 if follow else os.O_NOFOLLOW))
    with open(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        if size > MAX_JSON_BYTES:
            raise ValueError(f"larger than {MAX_JSON_BYTES} bytes")
        return parse_json(file.read(size))  # not the limit: memory for as much would be taken first


def parse_json(content: bytes) -> Any:  # noqa: ANN401
    """Return what a JSON text holds. Raises ValueError for what is malformed."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("too deeply nested") from None


def temporary_path(path: Path) -> Path:
    """Return the name that a file has, in the same folder, until it is complete."""
    return path.with_name(f".{path.name}.tmp")


def publish(temporary: Path, path: Path) -> None:
    """Give a complete file its name, and make the name survive a loss of power."""
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
