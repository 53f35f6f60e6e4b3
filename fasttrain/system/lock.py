"""Locks that keep a second process out of a folder; the system drops them with the process, however it ends."""

from __future__ import annotations

import fcntl
import os
import sys
import time
import weakref
from pathlib import Path
from types import TracebackType

from fasttrain.system.errors import UserError
from fasttrain.system.regular import regular_descriptor

_EVERY = 0.2  # seconds between two tries


class Lock:
    """Is held until close(), the end of a `with` block, or until nothing refers to it any more."""

    def __init__(self, descriptor: int) -> None:
        """descriptor: of an open file or folder that is locked; becomes this object's own."""
        self.close = weakref.finalize(self, os.close, descriptor)

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def lock(path: Path, taken: str, patience: float = 0.0, shared: bool = False) -> Lock:
    """Lock a folder for this process.

    path: the folder, or a file in it, which is made: over NFS only files can be locked. A file system without locks
    gets a warning. Raises UserError, whose text is `taken`, when another process holds it still after `patience`
    seconds, and FileNotFoundError where the folder is not there, or not any more.

    shared: others may have it so, too; without a warning, as they have other locks against each other.
    """
    is_folder = path.is_dir()
    flags = os.O_RDONLY if is_folder else os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK  # a FIFO is not waited for
    deadline = time.monotonic() + patience
    while True:
        descriptor = os.open(path, flags, 0o666)
        held = Lock(descriptor)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            held.close()
            if time.monotonic() >= deadline:
                raise UserError(taken) from None
            time.sleep(_EVERY)
            continue
        except OSError as error:
            reason = f"{path if is_folder else path.parent} can't be locked ({error.strerror})"
            if not shared:
                print(f"warning: {reason}: two processes could write here at once", file=sys.stderr, flush=True)
            return held
        if _is_at(path, descriptor):
            return held
        held.close()  # its holder has moved it away: what lies there now has another lock


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def is_held(path: Path) -> bool:
    """Does a process hold the lock of a file, of another machine too where the file system carries locks there?

    It is taken for an instant to find out, shared, so that several who ask do not take each other for a holder. Raises
    OSError where that can't be known: no permission, or a file system without locks.
    """
    try:
        descriptor = regular_descriptor(path)
    except FileNotFoundError:
        return False
    with Lock(descriptor):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
