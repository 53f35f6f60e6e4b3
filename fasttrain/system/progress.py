"""What a person sees on stderr while images are worked on: how far it is, how fast, and how long it takes yet."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

SECONDS_BETWEEN_LINES = 5.0


@contextlib.contextmanager
def progress(
    total: int, done: int = 0, title: str = "", unit: str = "images", quiet: bool = False
) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the number of images just done: a bar on a terminal, a line now and then otherwise.

    Args:
        total: images in all.
        done: those of them that an earlier run finished.
        title: what is done to them; shown before the figures.
        unit: what is counted.
        quiet: show nothing, as all processes but the first do.
    """
    if quiet:
        yield lambda images: None
        return
    if not sys.stderr.isatty():
        yield _plain_progress(total, done, f"{title}: " if title else "", unit)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn(f"{{task.fields[rate]}} {unit}/s"), TimeRemainingColumn(),
    )  # fmt: skip
    start, count, shown = time.perf_counter(), 0, 0
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, completed=done, rate="-")

        def advance(images: int) -> None:
            nonlocal count, shown
            count += images
            if count >= shown + 16 or count == total - done:  # the bar is redrawn ten times a second at most anyway
                shown = count
                bar.update(task, completed=done + count, rate=f"{count / (time.perf_counter() - start):.0f}")

        yield advance


def _plain_progress(total: int, done: int, prefix: str, unit: str) -> Callable[[int], None]:
    start = last = time.perf_counter()
    count = 0

    def advance(images: int) -> None:
        nonlocal count, last
        count += images
        now = time.perf_counter()
        if count and now - last >= SECONDS_BETWEEN_LINES:
            last = now
            rate = count / (now - start)
            left = (total - done - count) / rate
            figures = f"{done + count}/{total} {unit}, {rate:.0f} {unit}/s, {left:.0f} s left"
            print(f"{prefix}{figures}", file=sys.stderr, flush=True)

    return advance
