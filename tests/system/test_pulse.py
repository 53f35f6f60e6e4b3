"""Ranks that die, stop or are late, without a word to those who wait for them."""

import ctypes
import os
import pathlib
import signal
import socket
import time

import pytest
from support.forks import Done, on_ranks

from fasttrain.engine.ranks import Ranks
from fasttrain.system import pulse

KILLED = -signal.SIGKILL  # a stopped rank, in the end


def _busy(what: str, which: int) -> None:
    """One rank does what is asked, the others are busy, as if waiting for a GPU: only the pulse can end them there."""
    # a rank that lives must get a core for a moment within QUIET, on a busy machine too
    pulse.EVERY, pulse.QUIET, pulse.LONGER, pulse.GRACE = 0.2, 6.0, 6.0, 0.5
    ranks = Ranks("cpu")
    if what == "late":  # later than QUIET, but alive
        time.sleep(9.0 if ranks.rank == which else 0.0)
        ranks.close()
        return
    if ranks.rank == which:
        time.sleep(0.5)  # some meetings later
        if what == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if what == "die":
            os._exit(3)
        ctypes.pythonapi.Py_Exit(4)  # as raise SystemExit ends a program, which forks here leave before destructors
    time.sleep(600)


def line_of(rank: Done) -> str:
    (line,) = [line for line in rank.stderr.splitlines() if "sign of life" in line]
    return line.split(": error: ")[1]


@pytest.mark.parametrize(
    ("what", "which", "statuses"),
    [("stop", 1, [1, KILLED]), ("stop", 0, [KILLED, 1]), ("die", 1, [1, 3]), ("raise", 1, [1, 4])],
)
def test_a_busy_rank_ends_when_another_shows_no_sign_of_life(
    tmp_path: pathlib.Path, what: str, which: int, statuses: list[int]
) -> None:
    ended = on_ranks(tmp_path, 2, _busy, what, which, hangs=which if what == "stop" else None)
    assert [rank.returncode for rank in ended] == statuses, ended
    assert line_of(ended[1 - which]).startswith(f"process {which}, on {socket.gethostname()}, shows no sign of life")


def test_the_first_rank_names_the_one_that_is_missing_and_nobody_blames_another(tmp_path: pathlib.Path) -> None:
    ended = on_ranks(tmp_path, 3, _busy, "stop", 1, hangs=1)
    assert [rank.returncode for rank in ended] == [1, KILLED, 1], ended
    assert line_of(ended[0]).startswith(f"process 1, on {socket.gethostname()}, shows no sign of life")
    assert line_of(ended[2]).startswith("another process of this job shows no sign of life")


def test_a_rank_that_is_late_to_close_is_waited_for(tmp_path: pathlib.Path) -> None:
    ended = on_ranks(tmp_path, 2, _busy, "late", 1)
    assert [rank.returncode for rank in ended] == [0, 0], ended
    assert "sign of life" not in "".join(rank.stderr for rank in ended)
