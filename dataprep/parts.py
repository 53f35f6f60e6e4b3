"""`--part I/N`: several processes, at one time or another, fill one OUT; each writes a share of the shards.

Every part has a lock of its own for as long as it runs, a file in OUT. Another one is held for moments, by whoever
begins or ends. A conversion in one piece locks the folder, which parts lock too, but not against each other.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fasttrain.dataprep.plan import PlannedShard
from fasttrain.system.errors import UserError, note
from fasttrain.system.lock import Lock, is_held, lock

_PART = re.compile(r"([1-9][0-9]{0,5})/([1-9][0-9]{0,5})")
_LOCK = re.compile(r"\.part(?:s|-[0-9]+-of-[0-9]+)\.lock")
_MOMENT_SECONDS = 3600.0  # whoever ends reads the records of all shards


class Part(NamedTuple):
    """The number of a part, from 1, and of how many."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Read `I/N`; UserError for anything else."""
        found = _PART.fullmatch(text)
        part = cls(int(found[1]), int(found[2])) if found else cls(1, 0)
        if part.number > part.of:
            raise UserError(f"--part {text}: not I/N with I from 1 to N, as 3/8")
        return part

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def share(self, plan: list[PlannedShard]) -> list[PlannedShard]:
        """Return the shards of this part, which follow one another."""
        return plan[(self.number - 1) * len(plan) // self.of : self.number * len(plan) // self.of]


def is_part_lock(name: str) -> bool:
    """Whether a name in OUT is that of a lock of parts."""
    return bool(_LOCK.fullmatch(name))


def moment(folder: Path) -> Lock:
    """Keep other parts from beginning or ending for a moment; UserError where one takes an hour for it."""
    path, taken = folder / ".parts.lock", f"{folder}: another part has been beginning or ending for long"
    try:
        return lock(path, taken)
    except UserError:
        note("another part begins or ends: it is waited for")
        return lock(path, taken, _MOMENT_SECONDS)


@contextlib.contextmanager
def lock_part(folder: Path, part: Part) -> Iterator[None]:
    """Keep out the same part, those of another division, and a conversion in one piece. Raises UserError."""
    with contextlib.ExitStack() as held:
        held.enter_context(lock(folder, f"{folder}: another conversion, in one piece, is writing here", shared=True))
        with moment(folder):
            if other := next((name for name in _running(folder) if not name.endswith(f"-of-{part.of}.lock")), None):
                raise UserError(f"{folder}: parts of another division are being written here ({other})")
            own = folder / f".part-{part.number}-of-{part.of}.lock"
            held.enter_context(lock(own, f"{folder}: part {part} is being written by another process"))
        yield


def check_no_part(folder: Path) -> None:
    """Raise UserError where a part is being written: of file systems on which folders can't be locked."""
    if name := next(_running(folder), None):
        raise UserError(f"{folder}: a part is being written here ({name})")


def _running(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob(".part-*-of-*.lock")):
        with contextlib.suppress(OSError):
            if is_held(path):
                yield path.name
