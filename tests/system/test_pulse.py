"""Ranks that die, stop or are late, without a word to those who wait for them."""

import socket
import subprocess
import sys

import pytest
from support.commands import ROOT
from support.launch import environment

# One rank does what is asked while the others are busy, as if waiting for a GPU: only the pulse can end them there.
BUSY = """
import os, signal, sys, time
from fasttrain.engine import ranks as dist
from fasttrain.system import pulse
pulse.EVERY, pulse.QUIET, pulse.LONGER, pulse.GRACE = 0.2, 2.0, 2.0, 0.5
ranks = dist.Ranks("cpu")
what, which = sys.argv[1], int(sys.argv[2])
if what == "late":  # later than QUIET, but alive
    time.sleep(5.0 if ranks.rank == which else 0.0)
    ranks.close()
    raise SystemExit(0)
time.sleep(0.5)
if ranks.rank == which:
    if what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "die":
        os._exit(3)
    raise SystemExit(4)
time.sleep(60)
"""


def on_ranks(tmp_path, what, which, count=2):
    """Statuses of all ranks but one that is stopped (None), and the errors of the others."""
    (tmp_path / "busy.py").write_text(BUSY)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    jobs = [
        subprocess.Popen(
            [sys.executable, tmp_path / "busy.py", what, str(which)], stderr=subprocess.PIPE, text=True,
            env={**environment(**common, RANK=rank, LOCAL_RANK=rank), "PYTHONPATH": str(ROOT)},
        )
        for rank in range(count)
    ]  # fmt: skip
    try:
        running = [job for rank, job in enumerate(jobs) if (what, rank) != ("stop", which)]
        errors = [job.communicate(timeout=50)[1] for job in running]
        return [job.poll() for job in jobs], errors
    finally:
        for job in jobs:
            job.kill()
            job.communicate()


def line_of(errors):
    (line,) = [line for line in errors.splitlines() if "sign of life" in line]
    return line.removeprefix("busy.py: error: ")


@pytest.mark.parametrize(
    ("what", "which", "statuses"),
    [("stop", 1, [1, None]), ("stop", 0, [None, 1]), ("die", 1, [1, 3]), ("raise", 1, [1, 4])],
)
def test_a_busy_rank_ends_when_another_shows_no_sign_of_life(tmp_path, what, which, statuses):
    found, errors = on_ranks(tmp_path, what, which)
    assert found == statuses, errors
    assert line_of("".join(errors)).startswith(f"process {which}, on {socket.gethostname()}, shows no sign of life")


def test_the_first_rank_names_the_one_that_is_missing_and_nobody_blames_another(tmp_path):
    found, errors = on_ranks(tmp_path, "stop", 1, count=3)
    assert found == [1, None, 1], errors
    first, third = map(line_of, errors)
    assert first.startswith(f"process 1, on {socket.gethostname()}, shows no sign of life")
    assert third.startswith("another process of this job shows no sign of life")


def test_a_rank_that_is_late_to_close_is_waited_for(tmp_path):
    found, errors = on_ranks(tmp_path, "late", 1)
    assert found == [0, 0], errors
    assert "sign of life" not in "".join(errors)
