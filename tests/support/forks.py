"""Processes of our programs that start at once: forks of one that has imported torch and the commands.

What a launcher or a fresh interpreter adds is left out; support.launch and support.commands start those.
"""

import atexit
import multiprocessing
import os
import pathlib
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess

from support.commands import ROOT

_CONTEXT = multiprocessing.get_context("forkserver")  # its server starts with the first fork
_COMMANDS = ("train", "evaluate", "embed", "dataprep.convert", "dataprep.verify")
_JOBS = (
    "jobs.train",
    "jobs.evaluate",
    "jobs.embed",
    "jobs.report",
)  # with torch, which commands import when they need it
_OURS = [f"fasttrain.{name}" for name in (*_COMMANDS, *_JOBS)]
_CONTEXT.set_forkserver_preload(["pytest", "tyro", *_OURS])
SECONDS = 120  # in which every process here has to end

Function = Callable[..., int | None]
Done = subprocess.CompletedProcess[str]
RunCommand = Callable[..., Done]  # conftest's fixture of that name


class Fork:
    """A process that calls function(*arguments), defined in a module; what that returns is its status, None is 0."""

    def __init__(self, folder: pathlib.Path, function: Function, *arguments: object, **variables: object) -> None:
        """folder: takes what it writes. variables: of its environment, besides this process's own."""
        self._place = pathlib.Path(tempfile.mkdtemp(dir=folder))
        environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
        self.process: ForkServerProcess = _CONTEXT.Process(
            target=_run, args=(self._place, environment, function, arguments)
        )
        self.process.start()

    def wait(self, deadline: float) -> None:
        """Wait for its end, at most until a time of the monotonic clock."""
        self.process.join(max(0.0, deadline - time.monotonic()))

    def kill(self) -> Done:
        """End it, if it has not ended; returns how it did, and what it wrote."""
        self.process.kill()
        self.process.join()
        stdout, stderr = ((self._place / name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess([], self.process.exitcode or 0, stdout, stderr)


def _run(place: pathlib.Path, environment: dict[str, str], function: Function, arguments: tuple[object, ...]) -> None:
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status = function(*arguments) or 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()  # as at the end of a program; the rest of that, which takes a second, is left out
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def finished(folder: pathlib.Path, function: Function, *arguments: object, **variables: object) -> Done:
    """Call function(*arguments) in a process of its own (see Fork), and wait for its end."""
    return _all_ended([Fork(folder, function, *arguments, **variables)])[0]


def on_ranks(
    folder: pathlib.Path, count: int, function: Function, *arguments: object, hangs: int | None = None
) -> list[Done]:
    """Call function(*arguments) on every rank of a job (see Fork), and wait for their ends.

    The rank `hangs` is not waited for, but killed once the others have ended.
    """
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    ranks = [Fork(folder, function, *arguments, **common, RANK=rank, LOCAL_RANK=rank) for rank in range(count)]
    return _all_ended(ranks, hangs)


def _all_ended(forks: list[Fork], hangs: int | None = None) -> list[Done]:
    deadline = time.monotonic() + SECONDS
    for number, fork in enumerate(forks):
        if number != hangs:
            fork.wait(deadline)
    late = [number for number, fork in enumerate(forks) if fork.process.is_alive() and number != hangs]
    done = [fork.kill() for fork in forks]
    assert not late, f"{late} had not ended after {SECONDS} s: {done}"
    return done


def succeed(done: list[Done]) -> None:
    """Asserts that all of them have ended well."""
    assert not any(one.returncode for one in done), [one.stderr for one in done]


def with_small_files(num_bytes: int, function: Callable[..., int], *arguments: object) -> int:
    """Call it where no file may be larger, which stands for a full disk: a write fails halfway."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    return function(*arguments)


def free_port() -> int:
    """A port of this machine that nobody listened at a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_script(*words: object, cwd: pathlib.Path) -> Done:
    """Run a script of the checkout, named by its path there, with these options, in another folder."""
    return finished(cwd, _script, [str(ROOT / str(words[0])), *map(str, words[1:])], cwd)


def _script(words: list[str], cwd: pathlib.Path) -> None:
    os.chdir(cwd)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
