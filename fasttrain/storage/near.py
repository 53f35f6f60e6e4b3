"""Where the files of a data set can be read: in a folder, or in one that they are fetched to first."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol


class Near(Protocol):
    """Makes the files of a data set readable on this machine."""

    def path(self, name: str) -> Path:
        """Where a file of the set can be read now; fetched first where it lies elsewhere, however long that takes.

        Called from many threads. Raises DataError, OSError.
        """

    def shown(self, name: str) -> str:
        """How messages call a file; touches no storage."""

    def capacity(self) -> int | None:
        """How many bytes of files can be near at once, of all processes of this machine; None: all are here."""

    def close(self) -> None:
        """Nobody waits for a file any more."""


class Folder(NamedTuple):
    """A folder on this machine."""

    folder: Path

    def path(self, name: str) -> Path:
        return self.folder / name

    def shown(self, name: str) -> str:
        return str(self.folder / name)

    def capacity(self) -> None:
        return None

    def close(self) -> None:
        pass
