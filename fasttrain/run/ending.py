"""How a run ended: RUN/ending.json, written by its training, and what can be known of one that left none.

A run that goes on removes it, so that it is there only while nobody trains.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import time
from dataclasses import asdict, dataclass
from typing import Any

from fasttrain.run.folder import LOCK, has_saved
from fasttrain.system.cli import said, warn
from fasttrain.system.durable import reason, write_json
from fasttrain.system.errors import UserError
from fasttrain.system.lock import is_held
from fasttrain.system.regular import read_at_most

FILE = "ending.json"
WRITTEN = "done", "stopped", "failed"
MOST = 500  # characters of a line
MAX_BYTES = 1 << 16  # of the file
LARGEST = 1 << 62  # step
TIME = "%Y-%m-%d %H:%M:%S%z"


@dataclass(frozen=True)
class Ending:
    """state: "done", all its steps are; "stopped" by a signal, "failed" by an error, which line tells. step: the last
    that was done. time: local, as TIME has it.

    Of a run without such a file: "running", "killed" (this version leaves none only then), or "unknown", where line
    says why.
    """

    state: str
    line: str = ""
    step: int = 0
    time: str = ""

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError for what a damaged file may hold."""
        for name, kind in (("state", str), ("line", str), ("step", int), ("time", str)):
            if type(getattr(self, name)) is not kind:
                raise TypeError(f"{name} is no {kind.__name__}")
        if not 0 <= self.step <= LARGEST:
            raise ValueError("step is no number of steps")


def begin_again(run: pathlib.Path) -> None:
    """A run begins or goes on: how it ended before says nothing any more. Raises OSError."""
    (run / FILE).unlink(missing_ok=True)


def keep_ending(run: pathlib.Path, step: int, stopped: int, error: BaseException | None) -> None:
    """Record how training has ended: by an error, a signal's number, or (0, None) done.

    Never raises OSError: an error of its own must not stand in for the one that ended the run. An error before the run
    has gone on, such as a refusal, leaves what stands there, also nothing: step is 0 then, and one was saved.
    """
    if error and (os.path.lexists(run / FILE) or (not step and _may_have_saved(run))):
        return
    if isinstance(error, KeyboardInterrupt):
        state, line = "stopped", f"by a second {signal.SIGINT.name}, at once"
    elif error:
        state, line = "failed", _line(error)
    else:
        state, line = ("stopped", f"by {signal.Signals(stopped).name}") if stopped else ("done", "")
    try:
        write_json(run / FILE, asdict(Ending(state, line, step, time.strftime(TIME))))
    except OSError as fault:
        warn(f"{run / FILE} can't be written: {reason(fault)}")


def _may_have_saved(run: pathlib.Path) -> bool:
    with contextlib.suppress(UserError):
        if has_saved(run):
            return True
    return any((run / "checkpoints").glob("*"))  # of an earlier version, or before it was recorded


def _line(error: BaseException) -> str:
    """What finish() says of it; for an unexpected one, its kind and first line."""
    text = said(error) if isinstance(error, OSError) else str(error)
    if type(error).__module__.partition(".")[0] != "fasttrain" and not isinstance(error, OSError):
        text = f"{type(error).__name__}: {(text.splitlines() or [''])[0]}"
    return " ".join(text.split())[:MOST]


def ending_of(run: pathlib.Path, record: dict[str, Any]) -> Ending:
    """How a run ended, or that it has not. record: its config.json."""
    try:
        if is_held(run / LOCK):
            return Ending("running")
    except OSError as error:
        return Ending("unknown", f"whether it runs can't be told here: {said(error)}")
    try:
        ending = Ending(**json.loads(read_at_most(run / FILE, MAX_BYTES)))
    except FileNotFoundError:
        if "steps" in record:  # which is written where an ending will be
            return Ending("killed", "nobody trains it, and it has not said how it ended")
        older = (run / "metrics.jsonl").exists()  # which is begun after `steps` is recorded
        why = "is by a version that kept no endings" if older else "never began its first step"
        return Ending("unknown", f"not running; it {why}")
    except OSError as error:
        return Ending("unknown", said(error))
    except (ValueError, TypeError, RecursionError) as error:
        return Ending("unknown", f"{run / FILE} is damaged: {error}")
    return ending if ending.state in WRITTEN else Ending("unknown", f"{run / FILE} is damaged: {ending.state!r}")
