"""What an evaluation keeps on the disk while it lasts, so that the same command goes on after any interruption."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
import shutil
from collections.abc import Iterable
from typing import Any

from fasttrain.engine.ranks import Ranks
from fasttrain.system.errors import UserError
from fasttrain.system.lock import Lock, lock

FOLDER = "evaluation.part"
LOCK = "lock"
CLAIM = f".{FOLDER}.lock"  # in the run folder: one that is about to lock its folders must not lose them to another
PATIENCE_SECONDS = 60.0  # for another, which may be removing what is stale


class Scratch:
    """RUN/evaluation.part: a folder for each key, which all ranks share, named after what its content follows from.

    They stay when what is done in them fails, and go when all of it is done. What earlier evaluations have left of
    other weights or images, and no process uses, goes at once.
    """

    def __init__(self, run: pathlib.Path, keys: Iterable[dict[str, Any]], ranks: Ranks) -> None:
        """keys: what the content of each folder follows from, as JSON has it."""
        self._run, self._all, self._ranks = run, run / FOLDER, ranks
        self._folders = [self.folder(key) for key in keys]
        self._held = contextlib.ExitStack()

    def folder(self, key: dict[str, Any]) -> pathlib.Path:
        """Of one of the keys."""
        return self._all / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]

    def __enter__(self) -> Scratch:
        """Raises UserError where another process works in one of the folders, or the ranks do not have the same."""
        names_WK = self._ranks.gather([folder.name for folder in self._folders])
        self._ranks.together(lambda: self._claim(names_WK) if self._ranks.is_main else None)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        if kind is None and self._ranks.is_main:
            for folder in self._folders:
                shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # another evaluation is in it
                self._all.rmdir()
        self._held.close()

    def _claim(self, names_WK: list[list[str]]) -> None:
        if any(names != names_WK[0] for names in names_WK):
            raise UserError(
                f"the processes have found different checkpoints, images or settings of {self._run}, which is perhaps "
                "being trained: start the same command again"
            )
        with lock(self._run / CLAIM, f"another process is about to evaluate {self._run}", PATIENCE_SECONDS):
            with contextlib.ExitStack() as held:  # none of them stays locked where one can't be
                for folder in dict.fromkeys(self._folders):
                    held.enter_context(self._locked(folder))
                self._held = held.pop_all()
            for other in self._all.iterdir():
                if other not in self._folders and other.is_dir() and not other.is_symlink():
                    with contextlib.suppress(UserError, OSError), lock(other / LOCK, ""):
                        shutil.rmtree(other, ignore_errors=True)

    def _locked(self, folder: pathlib.Path) -> Lock:
        folder.mkdir(parents=True, exist_ok=True)
        return lock(folder / LOCK, f"another process is evaluating the same in {folder}")
