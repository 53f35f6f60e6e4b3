"""The ranks of a job without a launcher: forks of one process that has imported torch, so that each starts at once."""

import ctypes
import multiprocessing
import os
import pathlib
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

# The process that is forked starts with the first use, and imports what takes seconds only once.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["pytest", "fasttrain.train"])
SECONDS = 120  # in which every job here has to end


class Ended(NamedTuple):
    """How a rank ended: its exit status (minus the signal that killed it), and what it wrote to stderr."""

    status: int
    errors: str


def free_port() -> int:
    """A port of this machine that nobody listened at a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def on_ranks(
    folder: pathlib.Path, count: int, function: Callable[..., int | None], *arguments: object, hangs: int | None = None
) -> list[Ended]:
    """Call function(*arguments), defined in a module, on every rank of a job; `folder` takes what they write.

    What the function returns is the rank's exit status, None is 0. The rank `hangs` is not waited for, but killed once
    the others have ended. Fails if another has not ended after SECONDS.
    """
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    logs = [folder / f"rank-{rank}.log" for rank in range(count)]
    ranks = []
    for rank, log in enumerate(logs):
        variables = {name: str(value) for name, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}
        ranks.append(_FORKS.Process(target=_run, args=(variables, log, function, arguments)))
        ranks[-1].start()
    try:
        deadline = time.monotonic() + SECONDS
        others = [rank for number, rank in enumerate(ranks) if number != hangs]
        for rank in others:
            rank.join(max(0.0, deadline - time.monotonic()))
        assert not any(rank.is_alive() for rank in others), [log.read_text() for log in logs]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    return [Ended(rank.exitcode or 0, log.read_text()) for rank, log in zip(ranks, logs, strict=True)]


def succeed(ended: list[Ended]) -> None:
    """Asserts that every rank has ended well."""
    assert not any(rank.status for rank in ended), [rank.errors for rank in ended]


def _run(
    variables: dict[str, str], log: pathlib.Path, function: Callable[..., int | None], arguments: tuple[object, ...]
) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.environ.update(variables)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status = function(*arguments) or 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    ctypes.pythonapi.Py_Exit(status)  # as a program ends; multiprocessing would leave out atexit and destructors
