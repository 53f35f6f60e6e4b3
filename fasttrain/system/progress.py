"""What a person sees on stderr while images are worked on: how far it is, and which images were skipped."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

SECONDS_BETWEEN_LINES = 5.0


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
