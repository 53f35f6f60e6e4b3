"""What an evaluation keeps on the disk while it lasts, so that the same command goes on after any interruption."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
import shutil
from typing import Any

from fasttrain.engine.ranks import Ranks
from fasttrain.system.errors import UserError
from fasttrain.system.lock import Lock, lock

FOLDER = "evaluation.part"
LOCK = "lock"


class Scratch:
    """RUN/evaluation.part/<digest>: a folder that all ranks share, named after what its content follows from.

    It stays when what is done in it fails, and goes when it is done. What earlier evaluations have left of other
    weights or images, and no process uses, goes at once.
    """

    def __init__(self, run: pathlib.Path, key: dict[str, Any], ranks: Ranks) -> None:
        """key: what the content follows from, as JSON has it."""
        self._all, self._ranks = run / FOLDER, ranks
        self.folder = self._all / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        self._held: Lock | None = None

    def __enter__(self) -> Scratch:
        """Raises UserError where another process works in the folder."""
        self._ranks.together(self._claim if self._ranks.is_main else lambda: None)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        if kind is None and self._ranks.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # another evaluation is in it
                self._all.rmdir()
        if self._held:
            self._held.close()

    def _claim(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._held = lock(self.folder / LOCK, f"another process is evaluating the same in {self.folder}")
        for other in self._all.iterdir():
            if other != self.folder and other.is_dir() and not other.is_symlink():
                with contextlib.suppress(UserError, OSError), lock(other / LOCK, ""):
                    shutil.rmtree(other, ignore_errors=True)
