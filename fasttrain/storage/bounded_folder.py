"""A folder on this machine for files that come from elsewhere, bounded: the least recently used make room for others.

All processes of a machine share it, and all sets in it share the bound. A file's time is when it was last asked for.
What is removed while it is mapped stays readable; its place on the disk is free once nobody has it open.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fasttrain.formats.manifest import FILE_NAME
from fasttrain.system.durable import reason
from fasttrain.system.errors import RunError
from fasttrain.system.lock import Lock, is_held

SPARE_BYTES, SPARE_PART = 2 << 30, 20  # of the disk are left free, or one part of so many where that is less
COMING = ".coming"  # ends the name of a file until it is whole; whoever fetches it keeps it locked
LOCK = ".lock"
_DIGITS = 32  # of a SHA-256 in a name
_SET = re.compile(f"[0-9a-f]{{{_DIGITS}}}")


class _Kept(NamedTuple):
    time: int  # ns
    num_bytes: int
    path: Path


def digest(content: bytes) -> str:
    """Return what the folder of a set is called, of what tells it from others."""
    return hashlib.sha256(content).hexdigest()[:_DIGITS]


class BoundedFolder:
    """At most `limit` bytes of files, in folders of sets below a folder; manifests are neither counted nor removed.

    What else lies in that folder is left alone, whoever put it there.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        """Make the folder. Raises RunError where that can't be."""
        self.folder, self.limit = folder, limit
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self.failed(error) from None

    def failed(self, error: OSError) -> RunError:
        """What the system says, in one line."""
        return RunError(f"--cache {self.folder}: {reason(error)}")

    def available(self) -> int:
        """Return how many bytes its files can have together: what is free on the disk bounds them, too."""
        return min(self.limit, sum(each.num_bytes for each in self._kept()) + self._free())

    def take(self, descriptor: int, num_bytes: int) -> None:
        """Make room for a file that is open for writing, and give it its size.

        Raises:
            RunError: there is no room, whatever is removed.
        """
        with self.locked():
            kept = self._kept()
            used = sum(each.num_bytes for each in kept)
            for each in sorted(each for each in kept if not each.path.name.endswith(COMING)):
                if num_bytes <= min(self.limit - used, self._free()):
                    break
                with contextlib.suppress(OSError):  # of another user
                    each.path.unlink()  # which frees no disk while somebody has it open
                    used -= each.num_bytes
            if num_bytes > min(self.limit - used, self._free()):
                raise RunError(
                    f"--cache {self.folder}: no room for a file of {num_bytes:,} bytes beside those that are coming: "
                    f"--cache-gb {self.limit / 1e9:g}, free on the disk {shutil.disk_usage(self.folder).free:,} bytes"
                )
            try:
                os.posix_fallocate(descriptor, 0, max(1, num_bytes))  # a full disk is told before bytes come
            except OSError as error:
                raise self.failed(error) from None

    @contextlib.contextmanager
    def locked(self, name: str = LOCK) -> Iterator[None]:
        """Keep other processes and threads out meanwhile. Raises RunError where nothing can be locked."""
        try:
            descriptor = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            held = Lock(descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            raise self.failed(error) from None
        with held:
            yield

    def _free(self) -> int:
        usage = shutil.disk_usage(self.folder)
        return usage.free - min(SPARE_BYTES, usage.total // SPARE_PART)

    def _kept(self) -> list[_Kept]:
        """The files of sets; what killed processes have left of them is removed. Nobody else's folder is looked into:
        a cache may have been put where other things lie."""
        found = []
        for folder in filter(_is_of_set, os.scandir(self.folder)):
            for entry in os.scandir(folder):
                with contextlib.suppress(OSError):  # another process has just removed it
                    path, status = Path(entry.path), entry.stat(follow_symlinks=False)
                    if entry.name.endswith(COMING) and not is_held(path):
                        path.unlink()
                    elif entry.name != FILE_NAME:
                        found.append(_Kept(status.st_mtime_ns, status.st_size, path))
        return found


def _is_of_set(entry: os.DirEntry[str]) -> bool:
    named = _SET.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
    return bool(named) and os.path.exists(os.path.join(entry.path, FILE_NAME))
