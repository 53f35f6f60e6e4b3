"""What a person sees on stderr while images are worked on: how far it is, and which images were skipped."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from fasttrain.dataprep.manifest import FILE_NAME

SECONDS_BETWEEN_LINES = 5.0
SKIPS_SHOWN = 20


@contextlib.contextmanager
def progress(total: int, done: int = 0) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each image: a bar on a terminal, a line every few seconds otherwise.

    Args:
        total: images in all.
        done: those of them that an earlier run finished.
    """
    if not sys.stderr.isatty():
        yield _plain_progress(total, done)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]} images/s"), TimeRemainingColumn())
    start, count = time.perf_counter(), 0
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, completed=done, rate="-")

        def advance() -> None:
            nonlocal count
            count += 1
            if count % 16 == 0 or count == total - done:  # the bar is redrawn ten times a second at most anyway
                bar.update(task, completed=done + count, rate=f"{count / (time.perf_counter() - start):.0f}")

        yield advance


def _plain_progress(total: int, done: int) -> Callable[[], None]:
    start = last = time.perf_counter()
    count = 0

    def advance() -> None:
        nonlocal count, last
        count += 1
        now = time.perf_counter()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            rate = count / (now - start)
            left = (total - done - count) / rate
            print(f"{done + count}/{total} images, {rate:.0f} images/s, {left:.0f} s left", file=sys.stderr, flush=True)

    return advance


class Note:
    """Hears of every image written or skipped; names the first skipped ones on stderr."""

    def __init__(self, advance: Callable[[], None], quiet: bool = False) -> None:
        """Advance is called for every image: what `progress` yields. A quiet one names none."""
        self._advance = advance
        self._skipped = SKIPS_SHOWN + 1 if quiet else 0

    def __call__(self, path: str, reason: str | None) -> None:
        """Take note of one image; reason: why it is skipped, None if it is written."""
        self._advance()
        if reason is None:
            return
        self._skipped += 1
        if self._skipped <= SKIPS_SHOWN:
            print(f"skipped {path}: {reason}", file=sys.stderr)
        elif self._skipped == SKIPS_SHOWN + 1:
            print(f"more images are skipped; {FILE_NAME} will list them all", file=sys.stderr)
