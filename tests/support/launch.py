"""Starting training jobs in tests the way launchers do, and waiting for what they write and for their end."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
import torch
from support.commands import ROOT
from support.forks import Done, on_ranks

from fasttrain.run.checkpoint import load_checkpoint, saved_checkpoints
from fasttrain.train import main

TINY = [
    "--arch", "small", "--size", "16", "--batch-size", "16", "--queue-size", "100", "--dim", "16", "--epochs", "4",
    "--lr", "0.8", "--log-every", "2",
]  # fmt: skip
ENDLESS = ["--epochs", "100000", "--checkpoint-every", "4"]


def train(data: pathlib.Path | str, run: pathlib.Path, *more: object) -> int:
    """Train in this process; returns the exit status."""
    return main(["--data", str(data), "--run", str(run), *TINY, *map(str, more)])


def train_on_ranks(
    folder: pathlib.Path, count: int, data: pathlib.Path | str, run: pathlib.Path, *more: object
) -> list[Done]:
    """Train on ranks without a launcher; `folder` takes what they write."""
    return on_ranks(folder, count, main, ["--data", str(data), "--run", str(run), *TINY, *map(str, more)])


def command(data: pathlib.Path, run: pathlib.Path, *more: object) -> list[str]:
    """The command line of a training process."""
    return [sys.executable, *map(str, (ROOT / "fasttrain/train.py", "--data", data, "--run", run, *TINY, *more))]


def launcher(data: pathlib.Path, run: pathlib.Path, *more: object) -> list[str]:
    """The command line of torchrun, as every launcher ends."""
    return ["bash", *map(str, (ROOT / "recipes/torchrun.sh", "--data", data, "--run", run, *TINY, *more))]


def environment(**variables: object) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("PET_")}
    return {**own, "PYTHON": sys.executable, "PYTHONPATH": "", **{name: str(v) for name, v in variables.items()}}


@contextlib.contextmanager
def started(words: list[str], log: pathlib.Path, **variables: object) -> Iterator[subprocess.Popen[bytes]]:
    """A command in a session of its own, its output in `log`; whatever is left of it is killed in the end."""
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            words, stdout=file, stderr=subprocess.STDOUT, env=environment(**variables), start_new_session=True
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for_step(run: pathlib.Path, step: int, *processes: subprocess.Popen, seconds: float = 120) -> int:
    """Return the newest checkpoint's step once it is `step` or later; fails when a process ends or time is up first."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        newest = next(iter(saved_checkpoints(run / "checkpoints")), None)
        if newest and int(newest.stem.removeprefix("step-")) >= step:
            return int(newest.stem.removeprefix("step-"))
        assert all(process.poll() is None for process in processes), f"a process ended before step {step}"
        time.sleep(0.02)
    raise AssertionError(f"no checkpoint of step {step} after {seconds} s")


def wait_for_end(*pids: int, seconds: float = 60) -> None:
    """Wait until each has ended, whether or not its parent has asked how; fails when time is up first.

    In a container whose first process asks after nobody, a killed process that lost its parent stays as a zombie.
    """
    deadline = time.monotonic() + seconds
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                assert time.monotonic() < deadline, f"process {pid} has not ended after {seconds} s"
                time.sleep(0.02)


def final_state(run: pathlib.Path) -> dict:
    return load_checkpoint(saved_checkpoints(run / "checkpoints")[0]).state


def equal(a: Any, b: Any, path: str = "") -> list[str]:
    """Every difference between two nested states, bit for bit."""
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        return [] if same else [path]
    if isinstance(a, dict):
        if set(a) != set(b):
            return [f"{path}: {set(a) ^ set(b)}"]
        return [difference for key in a for difference in equal(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list | tuple):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in equal(x, y, f"{path}/{i}")]
    return [] if a == b or path.startswith("/config/") else [f"{path}: {a} {b}"]
