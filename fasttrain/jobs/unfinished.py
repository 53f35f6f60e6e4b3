"""Features that are not complete yet: the folder OUT.part, from which the same command goes on after any interruption.

It holds the rows and labels so far, up to where they are known to be on the disk, and the settings they follow from.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fasttrain.formats.embedding import HEADER_BYTES, check_free, check_same
from fasttrain.system.durable import read_json, temporary_path, write_json
from fasttrain.system.errors import UserError
from fasttrain.system.lock import lock
from fasttrain.system.workers import Workers

SAVE_SECONDS = 5.0  # between two states that are safe on the disk: what a kill costs
LOCK, STATE, PROGRESS, FEATURES, LABELS = FILES = "lock", "state.json", "progress.json", "features", "labels"
_TEMPORARY = {temporary_path(Path(name)).name for name in FILES}


@dataclass
class Progress:
    """batches: done. images: rows written. not_finite: those with something that is no number. failed: images without
    a row, as {"split", "index" (in it), "name", "reason"}."""

    batches: int = 0
    images: int = 0
    not_finite: int = 0
    failed: list[dict[str, Any]] = field(default_factory=list)


def folder_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.part")


class Unfinished:
    """The folder, locked as long as this is open. progress: what is done, to be changed by append alone."""

    def __init__(self, out: Path, settings: dict[str, Any], about: dict[str, Any], width: int) -> None:
        """settings: what decides the rows, as JSON has it. about: what else the first start tells. width: of a row.

        Raises UserError where another process is writing, where the folder holds anything else, and for what was
        begun with other settings.
        """
        self._folder, self._width = folder_of(out), width
        self.features, self._stack = self._folder / FEATURES, contextlib.ExitStack()
        if not self._folder.exists():
            check_free(out)
        self._folder.mkdir(parents=True, exist_ok=True)
        if strange := set(os.listdir(self._folder)) - {*FILES, *_TEMPORARY}:
            raise UserError(f"{self._folder} holds {min(strange)}, which is not this command's: name another file")
        with contextlib.ExitStack() as stack:
            stack.enter_context(lock(self._folder / LOCK, f"{out}: another process is writing it"))
            self.about, self.progress = self._begin(out, {**about, **settings}, settings)
            self._features = stack.enter_context(self._open(FEATURES, HEADER_BYTES + 4 * width * self.progress.images))
            self._labels = stack.enter_context(self._open(LABELS, 4 * self.progress.images))
            self._thread, self._saving, self._saved = Workers(1), Future[None](), time.monotonic()
            stack.callback(self._thread.close)
            self._stack = stack.pop_all()
        self._saving.set_result(None)

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def _begin(self, out: Path, about: dict[str, Any], settings: dict[str, Any]) -> tuple[dict[str, Any], Progress]:
        state, progress = self._folder / STATE, self._folder / PROGRESS
        if not state.exists():
            progress.unlink(missing_ok=True)
            write_json(state, about)
            return about, Progress()
        try:
            begun = dict(read_json(state, follow=False))
            found = Progress(**read_json(progress, follow=False)) if progress.exists() else Progress()
        except (OSError, ValueError, TypeError):
            raise self._damaged() from None
        check_same(out, begun, settings)
        return begun, found

    def _open(self, name: str, num_bytes: int) -> BinaryIO:
        """A file to append to, cut to what is known to be whole."""
        descriptor = os.open(self._folder / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        file = open(descriptor, "r+b")  # noqa: SIM115 - closed with this object
        if self.progress.images and os.fstat(descriptor).st_size < num_bytes:
            file.close()
            raise self._damaged()
        file.truncate(num_bytes)
        file.seek(num_bytes)
        return file

    def _damaged(self) -> UserError:
        return UserError(f"{self._folder} is damaged: remove it to begin anew")

    def append(self, rows_NF: np.ndarray, label_N: np.ndarray, failed: Sequence[dict[str, Any]]) -> None:
        """One batch: fp32 rows, their labels (-1: none), and the images that have no row. Raises OSError."""
        self._features.write(np.ascontiguousarray(rows_NF, np.float32).data)
        self._labels.write(np.ascontiguousarray(label_N, np.int32).data)
        progress = self.progress
        progress.batches += 1
        progress.images += len(rows_NF)
        progress.not_finite += int((~np.isfinite(rows_NF)).any(1).sum())
        progress.failed += failed
        # The disk may take its time: no batch waits for it.
        if time.monotonic() - self._saved > SAVE_SECONDS and self._saving.done():
            self._save()

    def _save(self) -> None:
        """Begin to have the disk hold what there is so far. Raises what the time before has raised."""
        self._saving.result()
        self._features.flush()
        self._labels.flush()
        self._saving, self._saved = self._thread.submit(self._sync, asdict(self.progress)), time.monotonic()

    def _sync(self, progress: dict[str, Any]) -> None:
        for file in (self._features, self._labels):
            os.fsync(file.fileno())
        write_json(self._folder / PROGRESS, progress)

    def complete(self) -> dict[str, Any]:
        """Have the disk hold everything; returns what the finished file tells of itself."""
        self._saving.result()
        self._save()
        self._saving.result()
        progress = self.progress
        counts = {"images": progress.images, "width": self._width, "not_finite": progress.not_finite}
        return {**self.about, **counts, "failed": progress.failed}

    def labels(self) -> Iterator[int]:
        """The label of every row; once complete."""
        with open(self._folder / LABELS, "rb") as file:
            while block := file.read(1 << 16):
                yield from np.frombuffer(block, np.int32).tolist()


def clear(out: Path) -> None:
    """Remove what an unfinished file has left, if anything."""
    folder = folder_of(out)
    for path in (folder / name for name in (*FILES, *_TEMPORARY)):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it is not there, or another process has just come to look
        folder.rmdir()
